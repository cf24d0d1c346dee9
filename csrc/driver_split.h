/* SPDX-License-Identifier: Apache-2.0
 *
 * The driver's side of a split virtqueue (VIRTIO 1.3, 2.7): what a kernel's virtio_ring does, for tests and benchmarks.
 * One thread owns a vq. Nothing here blocks, allocates or calls the system.
 *
 * Descriptors in flight and free ones are linked through a private table, so that a device that scribbles over the
 * descriptor table cannot lead the driver astray.
 */
#ifndef VF_DRIVER_SPLIT_H
#define VF_DRIVER_SPLIT_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "barrier.h"
#include "vring.h"

/* One buffer of a chain, as the driver names it. */
struct vf_drv_segment {
	uint64_t iova;
	uint32_t len_bytes;
	uint32_t writable; /* by the device */
};

/* Private state of a descriptor; tail, count and cookie mean something only for the head of a chain in flight. */
struct vf_drv_desc_state {
	uint16_t next; /* in the free list or in the chain */
	uint16_t tail;
	uint16_t count; /* descriptors the chain occupies; 0 = not the head of a chain in flight */
	uint16_t reserved;
	uint32_t cookie;
};

struct vf_drv_used {
	uint32_t cookie;
	uint32_t written_bytes;
	uint16_t head;
};

struct vf_drv_vq {
	/* shared with the device */
	struct vf_desc *desc;
	uint16_t *avail_flags;
	uint16_t *avail_idx_shared;
	uint16_t *avail_ring;
	uint16_t *used_event; /* after the avail ring; the device reads it with EVENT_IDX */
	const uint16_t *used_flags;
	const uint16_t *used_idx_shared;
	const struct vf_used_elem *used_ring;
	const uint16_t *avail_event; /* after the used ring; the device writes it with EVENT_IDX */
	/* private */
	struct vf_drv_desc_state *state;
	uint16_t size;
	uint16_t mask;
	uint16_t free_head;
	uint16_t free_count;
	uint16_t avail_idx; /* chains added */
	uint16_t published_idx; /* chains the device has been shown */
	uint16_t last_used_idx; /* chains reaped */
	bool event_idx;
};

/* Take over zeroed ring memory. `state` holds `size` entries; both are borrowed for the vq's life. -EINVAL when the size
 * is no power of two from 2 to 32768 or an area is misaligned. */
static inline int vf_drv_vq_init(struct vf_drv_vq *vq, uint32_t size, void *desc, void *avail, void *used,
				 struct vf_drv_desc_state *state, bool event_idx)
{
	if (size < 2 || size > VF_QUEUE_SIZE_MAX || (size & (size - 1)))
		return -EINVAL;
	if (((uintptr_t)desc & 15u) || ((uintptr_t)avail & 1u) || ((uintptr_t)used & 3u))
		return -EINVAL;
	uint16_t *a = avail;
	const uint16_t *u = used;
	memset(vq, 0, sizeof(*vq));
	vq->desc = desc;
	vq->avail_flags = a;
	vq->avail_idx_shared = a + 1;
	vq->avail_ring = a + 2;
	vq->used_event = a + 2 + size;
	vq->used_flags = u;
	vq->used_idx_shared = u + 1;
	vq->used_ring = (const struct vf_used_elem *)(u + 2);
	vq->avail_event = u + 2 + 4u * size;
	vq->state = state;
	vq->size = (uint16_t)size;
	vq->mask = (uint16_t)(size - 1u);
	vq->free_count = (uint16_t)size;
	vq->event_idx = event_idx;
	for (uint32_t i = 0; i < size; i++)
		state[i] = (struct vf_drv_desc_state){ .next = (uint16_t)((i + 1u) & vq->mask) };
	return 0;
}

/* Continue at index `idx` (free-running), where a device resumes or where a test wants the wrap-around to be near. */
static inline void vf_drv_vq_set_idx(struct vf_drv_vq *vq, uint16_t idx)
{
	vq->avail_idx = vq->published_idx = vq->last_used_idx = idx;
	vf_store_relaxed_u16(vq->avail_idx_shared, idx);
	if (vq->event_idx)
		vf_store_relaxed_u16(vq->used_event, (uint16_t)(idx - 1u));
}

/* Chains that the device holds or has finished and that have not been reaped. */
static inline uint16_t vf_drv_vq_inflight(const struct vf_drv_vq *vq)
{
	return (uint16_t)(vq->published_idx - vq->last_used_idx);
}

static inline void vf_drv_avail_put(struct vf_drv_vq *vq, uint16_t head)
{
	vf_store_relaxed_u16(&vq->avail_ring[vq->avail_idx & vq->mask], head);
	vq->avail_idx++;
}

/* Add one chain of direct descriptors. Returns its head, or -ENOSPC when so many are not free. The device sees it only
 * after vf_drv_vq_publish(). */
static inline int vf_drv_vq_add(struct vf_drv_vq *vq, const struct vf_drv_segment *segments, uint32_t count,
				uint32_t cookie)
{
	if (vf_unlikely(count == 0 || count > vq->free_count))
		return -ENOSPC;
	struct vf_drv_desc_state *state = vq->state;
	uint16_t head = vq->free_head, slot = head, tail = head;
	for (uint32_t i = 0; i < count; i++) {
		uint16_t next = state[slot].next;
		uint32_t flags = segments[i].writable ? VF_DESC_F_WRITE : 0u;
		if (i + 1u < count)
			flags |= VF_DESC_F_NEXT;
		vq->desc[slot] = (struct vf_desc){ segments[i].iova, segments[i].len_bytes, (uint16_t)flags, next };
		tail = slot;
		slot = next;
	}
	vq->free_head = slot;
	vq->free_count = (uint16_t)(vq->free_count - count);
	state[head].tail = tail;
	state[head].count = (uint16_t)count;
	state[head].cookie = cookie;
	vf_drv_avail_put(vq, head);
	return head;
}

/* vf_drv_vq_add() for the commonest chain, header, data and status, with nothing to loop over. */
static inline int vf_drv_vq_add_three(struct vf_drv_vq *vq, uint64_t header_iova, uint32_t header_bytes, uint64_t data_iova,
				      uint32_t data_bytes, uint16_t data_flags, uint64_t status_iova, uint32_t cookie)
{
	if (vf_unlikely(vq->free_count < 3))
		return -ENOSPC;
	struct vf_drv_desc_state *state = vq->state;
	uint16_t head = vq->free_head, second = state[head].next, tail = state[second].next;
	vq->desc[head] = (struct vf_desc){ header_iova, header_bytes, VF_DESC_F_NEXT, second };
	vq->desc[second] = (struct vf_desc){ data_iova, data_bytes, (uint16_t)(data_flags | VF_DESC_F_NEXT), tail };
	vq->desc[tail] = (struct vf_desc){ status_iova, 1, VF_DESC_F_WRITE, 0 };
	vq->free_head = state[tail].next;
	vq->free_count = (uint16_t)(vq->free_count - 3u);
	state[head].tail = tail;
	state[head].count = 3;
	state[head].cookie = cookie;
	vf_drv_avail_put(vq, head);
	return head;
}

/* Fill an indirect table of `count` descriptors. */
static inline void vf_drv_table_fill(struct vf_desc *table, const struct vf_drv_segment *segments, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		uint32_t flags = segments[i].writable ? VF_DESC_F_WRITE : 0u;
		if (i + 1u < count)
			flags |= VF_DESC_F_NEXT;
		table[i] = (struct vf_desc){ segments[i].iova, segments[i].len_bytes, (uint16_t)flags, (uint16_t)(i + 1u) };
	}
}

/* Add one chain whose descriptors are in `table` (at IOVA `table_iova`, borrowed until the chain is reaped): it takes a
 * single descriptor of the ring. Returns its head or -ENOSPC. */
static inline int vf_drv_vq_add_indirect(struct vf_drv_vq *vq, struct vf_desc *table, uint64_t table_iova,
					 const struct vf_drv_segment *segments, uint32_t count, uint32_t cookie)
{
	if (vf_unlikely(count == 0 || vq->free_count == 0))
		return -ENOSPC;
	vf_drv_table_fill(table, segments, count);
	uint16_t head = vq->free_head;
	struct vf_drv_desc_state *state = &vq->state[head];
	vq->desc[head] = (struct vf_desc){ table_iova, 16u * count, VF_DESC_F_INDIRECT, 0 };
	vq->free_head = state->next;
	vq->free_count--;
	state->tail = head;
	state->count = 1;
	state->cookie = cookie;
	vf_drv_avail_put(vq, head);
	return head;
}

/* Show the device what was added. Returns 1 when it wants a kick, else 0. */
static inline int vf_drv_vq_publish(struct vf_drv_vq *vq)
{
	uint16_t old_idx = vq->published_idx, new_idx = vq->avail_idx;
	if (old_idx == new_idx)
		return 0;
	/* Barrier A: descriptors and avail entries before the index; pairs with the device's acquire load. */
	vf_store_release_u16(vq->avail_idx_shared, new_idx);
	vq->published_idx = new_idx;
	/* Barrier C: the index before the look at what the device wants; pairs with its fence after enabling kicks. */
	vf_fence_full();
	if (vq->event_idx)
		return vf_need_event(vf_load_relaxed_u16(vq->avail_event), new_idx, old_idx);
	return !(vf_load_relaxed_u16(vq->used_flags) & VF_USED_F_NO_NOTIFY);
}

/* Chains finished and not reaped yet: a count, or -EPROTO when the device claims more than it was given. */
static inline int vf_drv_vq_used_count(const struct vf_drv_vq *vq)
{
	/* Barrier B: pairs with the device's release store of used->idx. */
	uint16_t count = (uint16_t)(vf_load_acquire_u16(vq->used_idx_shared) - vq->last_used_idx);
	if (vf_unlikely(count > vf_drv_vq_inflight(vq)))
		return -EPROTO;
	return count;
}

/* Take the next finished chain; only after vf_drv_vq_used_count() said there is one. Returns 0, or -EPROTO when the
 * device names a chain that is not in flight. */
static inline int vf_drv_vq_reap(struct vf_drv_vq *vq, struct vf_drv_used *out)
{
	const struct vf_used_elem *elem = &vq->used_ring[vq->last_used_idx & vq->mask];
	uint32_t id = vf_load_relaxed_u32(&elem->id);
	out->written_bytes = vf_load_relaxed_u32(&elem->len);
	if (vf_unlikely(id >= vq->size || vq->state[id].count == 0))
		return -EPROTO;
	struct vf_drv_desc_state *head = &vq->state[id];
	out->head = (uint16_t)id;
	out->cookie = head->cookie;
	/* Last in, first out: the descriptors used next are those still in the cache. */
	vq->state[head->tail].next = vq->free_head;
	vq->free_head = (uint16_t)id;
	vq->free_count = (uint16_t)(vq->free_count + head->count);
	head->count = 0;
	vq->last_used_idx++;
	return 0;
}

/* Ask for no interrupts. With EVENT_IDX the event index just stays behind: the device passes it once in 65536 chains. */
static inline void vf_drv_vq_disable_irq(struct vf_drv_vq *vq)
{
	if (!vq->event_idx)
		vf_store_relaxed_u16(vq->avail_flags, VF_AVAIL_F_NO_INTERRUPT);
}

/* Ask for an interrupt at the next finished chain. Returns what vf_drv_vq_used_count() says afterwards: sleep only at 0. */
static inline int vf_drv_vq_enable_irq(struct vf_drv_vq *vq)
{
	if (vq->event_idx)
		vf_store_relaxed_u16(vq->used_event, vq->last_used_idx);
	else
		vf_store_relaxed_u16(vq->avail_flags, 0);
	/* Barrier D: the wish before the second look; pairs with the device's fence after publishing used->idx. */
	vf_fence_full();
	return vf_drv_vq_used_count(vq);
}

#endif
