/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared by the driver's side of both ring formats: the state of a vq, its private tables, and the order in which
 * chains come back. The formats are driver_split.h and driver_packed.h; driver_vq.h is the seam that chooses.
 *
 * One thread owns a vq. Nothing here blocks, allocates or calls the system. Chains in flight are kept in private tables,
 * so a device that scribbles over the ring cannot mislead the driver.
 */
#ifndef VF_DRIVER_RING_H
#define VF_DRIVER_RING_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/barrier.h"
#include "ring/vring.h"
#include "ring/vring_packed_abi.h"

/* One buffer of a chain, as the driver names it. */
struct vf_drv_segment {
	uint64_t iova;
	uint32_t len_bytes;
	uint32_t writable; /* by the device */
};

/* The commonest chain of a block device: a header, one data buffer and the status byte. */
struct vf_drv_three {
	uint64_t header_iova;
	uint64_t data_iova;
	uint64_t status_iova;
	uint32_t header_bytes;
	uint32_t data_bytes;
	uint32_t data_flags; /* VF_DESC_F_WRITE, or 0 where the device reads the data */
};

static inline uint32_t vf_drv_three_writable(const struct vf_drv_three *three)
{
	return 1u + (three->data_flags ? three->data_bytes : 0u);
}

/*
 * Private state under one number: of a descriptor in a split ring, of a buffer ID in a packed one. All but `next` mean
 * something only where a chain in flight is known by that number.
 *
 * IN_ORDER never relinks: numbers are taken round and round, and what is in flight lies side by side (VIRTIO 1.3, 2.7.9).
 */
struct vf_drv_desc_state {
	uint16_t next; /* in the free list or in the chain */
	uint16_t tail; /* last number of the chain; the ID itself in a packed ring, which takes one a chain */
	uint16_t count; /* descriptors that the chain occupies; 0 = no chain in flight has this number */
	uint16_t tag; /* of vf_drv_split_add_tagged(); 0 = none */
	uint32_t cookie;
	uint32_t writable_bytes; /* bytes that the device has written of a chain that it skips under IN_ORDER */
};

struct vf_drv_used {
	uint32_t cookie;
	uint32_t written_bytes;
	uint16_t head; /* what vf_drv_vq_add() returned */
};

/* The areas of a split ring, shared with the device. */
struct vf_drv_split_areas {
	struct vf_desc *desc;
	uint16_t *avail_flags;
	uint16_t *avail_idx;
	uint16_t *avail_ring;
	uint16_t *used_event; /* after the avail ring; the device reads it with EVENT_IDX */
	const uint16_t *used_flags;
	const uint16_t *used_idx;
	const struct vf_used_elem *used_ring;
	const uint16_t *avail_event; /* after the used ring; the device writes it with EVENT_IDX */
};

/* The areas of a packed ring, shared with the device, and where both sides stand in it; see driver_packed.h. */
struct vf_drv_packed_areas {
	struct vf_packed_desc *desc;
	struct vf_packed_event *driver_event;
	const struct vf_packed_event *device_event;
	uint16_t avail_pos; /* of the next descriptor to make available */
	uint16_t published_pos; /* of the first one that is not published */
	uint16_t used_pos; /* of the next used descriptor */
	uint16_t first_flags; /* of published_pos: what is stored there shows the device all that was added */
	bool irq_disabled; /* the contents of driver_event */
};

struct vf_drv_vq {
	union {
		struct vf_drv_split_areas split;
		struct vf_drv_packed_areas packed;
	};
	struct vf_drv_desc_state *state;
	uint16_t size;
	uint16_t mask;
	uint16_t free_head; /* number that the next chain begins with */
	uint16_t free_count; /* descriptors */
	uint16_t avail_idx; /* chains added; free-running, as the two below */
	uint16_t published_idx; /* published chains */
	uint16_t last_used_idx; /* chains reaped */
	uint16_t batch_count; /* IN_ORDER: chains of one used element that are not reaped yet */
	uint32_t batch_bytes; /* what that element says of the last of them */
	bool event_idx;
	bool in_order;
	bool is_packed;
};

/* Chains that the device holds or has finished and that have not been reaped. */
static inline uint16_t vf_drv_vq_inflight(const struct vf_drv_vq *vq)
{
	return (uint16_t)(vq->published_idx - vq->last_used_idx);
}

/* Link all numbers into the free list, in a circle. */
static inline void vf_drv_ring_link(struct vf_drv_vq *vq)
{
	vq->free_head = 0;
	vq->free_count = vq->size;
	for (uint32_t i = 0; i < vq->size; i++)
		vq->state[i] = (struct vf_drv_desc_state){ .next = (uint16_t)((i + 1u) & vq->mask) };
}

/* Take back the chain `id`, which is in flight: hand out what is known of it and free its descriptors. Returns how many
 * those are. */
static inline uint16_t vf_drv_ring_finish(struct vf_drv_vq *vq, uint16_t id, uint32_t written_bytes, struct vf_drv_used *out)
{
	struct vf_drv_desc_state *head = &vq->state[id];
	uint16_t count = head->count;

	*out = (struct vf_drv_used){ head->cookie, written_bytes, id };
	/* Last in, first out: the descriptors used next are those still in the cache. */
	if (!vq->in_order) {
		vq->state[head->tail].next = vq->free_head;
		vq->free_head = id;
	}
	vq->free_count = (uint16_t)(vq->free_count + count);
	head->count = 0;
	vq->last_used_idx++;
	return count;
}

/* IN_ORDER, with a batch begun: take back its next chain, `id`, the oldest in flight. Only the last one was named by the
 * device; those before it were used completely. Returns how many descriptors it had. */
static inline uint16_t vf_drv_ring_finish_next(struct vf_drv_vq *vq, uint16_t id, struct vf_drv_used *out)
{
	vq->batch_count--;
	return vf_drv_ring_finish(vq, id, vq->batch_count ? vq->state[id].writable_bytes : vq->batch_bytes, out);
}

#endif
