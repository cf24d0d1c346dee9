/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared by all ring formats: structures of a split virtqueue (VIRTIO 1.3, 2.7), the chain that a pop fills, and the
 * reasons for which a ring fails. The formats themselves are vring_split.h and vring_packed.h: each offers start, pop,
 * push, publish and notification under the same names with its own prefix.
 */
#ifndef VF_VRING_H
#define VF_VRING_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "base/barrier.h"

#define VF_QUEUE_SIZE_MAX 32768u

#define VF_DESC_F_NEXT 1u
#define VF_DESC_F_WRITE 2u
#define VF_DESC_F_INDIRECT 4u
#define VF_AVAIL_F_NO_INTERRUPT 1u
#define VF_USED_F_NO_NOTIFY 1u

struct vf_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

struct vf_used_elem {
	uint32_t id;
	uint32_t len;
};

_Static_assert(sizeof(struct vf_desc) == 16, "VIRTIO 1.3, 2.7.5");
_Static_assert(sizeof(struct vf_used_elem) == 8, "VIRTIO 1.3, 2.7.8");

/* Why a queue has failed: the driver broke the ring itself, so nothing in it can be trusted. */
enum vf_ring_error {
	VF_RING_OK,
	VF_RING_AVAIL_OVERRUN, /* avail->idx is more than the queue size ahead */
	VF_RING_HEAD_RANGE, /* an avail entry names no descriptor */
	VF_RING_NEXT_RANGE, /* a next field names no descriptor */
	VF_RING_CHAIN_TOO_LONG, /* a loop, or more descriptors than allowed */
	VF_RING_INDIRECT_NOT_OFFERED, /* INDIRECT without the feature */
	VF_RING_INDIRECT_NESTED, /* INDIRECT inside an indirect table */
	VF_RING_INDIRECT_NEXT, /* INDIRECT and NEXT in one descriptor */
	VF_RING_INDIRECT_SIZE, /* table length is zero or no multiple of 16, or names too many */
	VF_RING_INDIRECT_UNMAPPED, /* table lies outside the IOTLB */
	VF_RING_HEAD_BUSY, /* an avail entry names a chain that is in flight */
	VF_RING_UNMAPPED, /* a ring area is not (any longer) mapped, or lacks permissions */
	VF_RING_MISALIGNED, /* a ring area is not aligned as VIRTIO 1.3, 2.7 asks */
	VF_RING_MEMORY_GONE, /* pages of a region have vanished (SIGBUS) */
	VF_RING_LOG, /* the in-flight log of the previous worker does not fit the ring */
	VF_RING_LOG_FOREIGN, /* it is no in-flight log, or of another version or geometry */
	VF_RING_POISON, /* a request kills workers even when they only refuse it */
	VF_RING_ERROR_COUNT,
};

/* A pop that found nothing, as opposed to 0 and -enum vf_ring_error. */
#define VF_RING_EMPTY 1

/* One descriptor, copied out of shared memory. */
struct vf_segment {
	uint64_t iova;
	uint32_t len;
	uint32_t writable; /* by the device: 0 or 1 */
};

/* A descriptor chain in private memory. */
struct vf_chain {
	uint16_t head; /* split: index of the first descriptor; packed: its slot. No two chains in flight share one. */
	uint16_t id; /* packed: the driver's name for the buffer; split: the head */
	uint32_t slot_count; /* packed: descriptors of the ring that it takes */
	uint32_t segment_count;
	uint32_t segment_max; /* capacity of segments, at least the size of the ring */
	struct vf_segment *segments;
	/* Of vf_chain_measure(). */
	uint64_t readable_bytes;
	uint64_t writable_bytes;
	struct vf_segment *last_writable; /* the last one that is not empty; NULL = none */
	uint8_t disorder; /* a readable segment after a writable one, against VIRTIO 1.3, 2.7.4.2 */
};

/* Length and direction of a segment as one number, which compares by one instruction. */
#define VF_SEGMENT_SHAPE(len, writable) ((uint64_t)(writable) << 32 | (len))

static inline uint64_t vf_segment_shape(const struct vf_segment *segment)
{
	uint64_t shape;

	memcpy(&shape, &segment->len, sizeof(shape));
	return shape;
}

static inline void vf_chain_clear(struct vf_chain *chain, uint16_t head)
{
	chain->head = head;
	chain->id = head;
	chain->segment_count = 0;
}

/* Append a descriptor; there is room. flags: VF_DESC_F_* */
static inline void vf_chain_add(struct vf_chain *chain, uint64_t iova, uint32_t len, uint32_t flags)
{
	struct vf_segment *segment = &chain->segments[chain->segment_count++];

	segment->iova = iova;
	segment->len = len;
	segment->writable = (flags / VF_DESC_F_WRITE) & 1u;
}

/* Sum up the bytes of each direction. No sum overflows: at most 2^15 segments of less than 2^32 bytes. */
static inline void vf_chain_measure(struct vf_chain *chain)
{
	chain->disorder = 0;
	chain->readable_bytes = 0;
	chain->writable_bytes = 0;
	chain->last_writable = NULL;
	for (uint32_t i = 0; i < chain->segment_count; i++) {
		struct vf_segment *segment = &chain->segments[i];

		if (!segment->writable) {
			chain->readable_bytes += segment->len;
			chain->disorder |= chain->last_writable != NULL;
		} else if (segment->len) {
			chain->writable_bytes += segment->len;
			chain->last_writable = segment;
		}
	}
}

/* True when moving an index from old_idx to new_idx passes event (VIRTIO 1.3, 2.7.10: all modulo 2^16). */
static inline int vf_need_event(uint16_t event, uint16_t new_idx, uint16_t old_idx)
{
	return (uint16_t)(new_idx - event - 1u) < (uint16_t)(new_idx - old_idx);
}

#endif
