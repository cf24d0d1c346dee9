/* SPDX-License-Identifier: Apache-2.0
 *
 * Adjacent requests of a batch as one preadv() or pwritev(), for the engines sync and cached. A request that begins where
 * the previous one has ended is collected, and so are those that continue from there, until another kind of request or the
 * end of the round (flush) comes. Random requests pay a comparison.
 *
 * Collected requests are carried out before anything that was submitted after them, so the order of the ring remains. If
 * the one call fails or is short, they are carried out one by one: each has its own result.
 */
#ifndef VF_MERGE_H
#define VF_MERGE_H

#include "base/barrier.h"
#include "engine/engine.h"

#define VF_MERGE_MAX 32u /* requests of one call */
#define VF_MERGE_IOV_MAX 128u /* and their segments */
#define VF_MERGE_BYTES (256u << 10) /* and their bytes: larger ones gain nothing */
#define VF_MERGE_PATIENCE 32u /* requests that are not collected after one was collected in vain */

struct vf_merge {
	uint64_t last_end_bytes; /* the end of the previous request; ~0: do not collect the next one */
	uint8_t op; /* of the collected requests */
	uint32_t held_count;
	uint32_t iov_count;
	uint32_t patience;
	uint64_t left_bytes;
	struct vf_req *held[VF_MERGE_MAX];
	struct iovec iov[VF_MERGE_IOV_MAX];
	uint32_t done_count; /* carried out, not yet reaped */
	struct vf_req *done[]; /* a place for each slot */
};

/* Set engine->merge, if the store's requests are to be merged. 0 or -ENOMEM. */
int vf_merge_open(struct vf_engine *engine, uint32_t slot_count);
void vf_merge_close(struct vf_engine *engine);

/* Carries out a single request as submit() would. */
typedef int vf_merge_one(struct vf_engine *engine, struct vf_req *req);

/* Collect a transfer that begins where the previous one has ended; 0: it cannot be collected. */
int vf_merge_hold(struct vf_engine *engine, struct vf_req *req);

/* Carry out the collected requests; rw_flags: of the read. */
void vf_merge_flush(struct vf_engine *engine, vf_merge_one *one, int rw_flags);

/* As reap(), of collected requests. */
uint32_t vf_merge_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max);

/* An engine's submit(). */
static inline int vf_merge_submit(struct vf_engine *engine, struct vf_req *req, vf_merge_one *one, int rw_flags)
{
	struct vf_merge *merge = engine->merge;

	if (!merge)
		return one(engine, req);
	if (req->op == VF_OP_WRITE || (req->op == VF_OP_READ && !engine->store.read_map.base)) {
		int is_next = req->offset_bytes == merge->last_end_bytes;

		merge->last_end_bytes = req->offset_bytes + req->left_bytes;
		if (vf_unlikely(is_next) && vf_merge_hold(engine, req))
			return 0;
	}
	if (vf_unlikely(merge->held_count))
		vf_merge_flush(engine, one, rw_flags);
	return one(engine, req);
}

/* Whether something waits to be reaped. */
static inline int vf_merge_has_done(const struct vf_engine *engine)
{
	return engine->merge && engine->merge->done_count;
}

#endif
