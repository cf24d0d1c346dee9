/* SPDX-License-Identifier: Apache-2.0
 *
 * Included ahead of the generated _fuzz.c: lets the harness watch each chain that the loop takes and gives back.
 */
#ifndef FUZZ_HOOKS_H
#define FUZZ_HOOKS_H

#define _GNU_SOURCE 1
#include "queue/fast_path.h"
#include "queue/queue.h"

void fuzz_popped(const struct vf_chain *chain);
void fuzz_fast_path(const struct vf_req *req);
void fuzz_walked(const struct vf_chain *chain);
void fuzz_pushed(uint16_t head, uint32_t written_bytes);
void fuzz_pushed_next(uint32_t written_bytes);

static inline int fuzz_vring_pop(struct vf_vring *vr, struct vf_iotlb *tlb, struct vf_chain *chain)
{
	int err = vf_vring_pop(vr, tlb, chain);

	if (!err)
		fuzz_popped(chain);
	return err;
}

static inline int fuzz_fast_path_parse_split(struct vf_queue *q, struct vf_req *req)
{
	int plain = vf_fast_path_parse_split(q, req);

	if (plain > 0)
		fuzz_fast_path(req);
	return plain;
}

static inline int fuzz_fast_path_parse_packed(struct vf_queue *q, struct vf_req *req)
{
	int plain = vf_fast_path_parse_packed(q, req);

	if (plain > 0)
		fuzz_fast_path(req);
	return plain;
}

static inline int fuzz_split_walk(struct vf_split *vr, struct vf_iotlb *tlb, uint16_t head, struct vf_chain *chain)
{
	int err = vf_split_walk(vr, tlb, head, chain);

	if (!err)
		fuzz_walked(chain);
	return err;
}

static inline void fuzz_vring_push(struct vf_vring *vr, uint16_t head, uint16_t id, uint32_t slot_count, uint32_t written_bytes,
				   int full)
{
	fuzz_pushed(head, written_bytes);
	vf_vring_push(vr, head, id, slot_count, written_bytes, full);
}

static inline void fuzz_split_push(struct vf_split *vr, uint16_t head, uint32_t written_bytes, int full)
{
	fuzz_pushed(head, written_bytes);
	vf_split_push(vr, head, written_bytes, full);
}

/* A plain chain's id does not say which slot it began at, but its turn does. */
static inline void fuzz_packed_push(struct vf_packed *vr, uint16_t id, uint32_t slot_count, uint32_t written_bytes, int full)
{
	fuzz_pushed_next(written_bytes);
	vf_packed_push(vr, id, slot_count, written_bytes, full);
}

#define vf_split_push fuzz_split_push
#define vf_packed_push fuzz_packed_push
#define vf_vring_pop fuzz_vring_pop
#define vf_fast_path_parse_split fuzz_fast_path_parse_split
#define vf_fast_path_parse_packed fuzz_fast_path_parse_packed
#define vf_split_walk fuzz_split_walk
#define vf_vring_push fuzz_vring_push

#endif
