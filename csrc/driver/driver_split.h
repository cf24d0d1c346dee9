/* SPDX-License-Identifier: Apache-2.0
 *
 * The driver's side of a split virtqueue (VIRTIO 1.3, 2.7). driver_vq.h says what each function does and checks that
 * there is room.
 */
#ifndef VF_DRIVER_SPLIT_H
#define VF_DRIVER_SPLIT_H

#include "driver/driver_ring.h"

/* Continue at index `start`, where a device resumes or where a test wants the wrap-around to be near. */
static inline int vf_drv_split_init(struct vf_drv_vq *vq, void *desc, void *avail, void *used, uint32_t start)
{
	if (((uintptr_t)desc & 15u) || ((uintptr_t)avail & 1u) || ((uintptr_t)used & 3u) || start > UINT16_MAX)
		return -EINVAL;
	struct vf_drv_split_areas *areas = &vq->split;
	uint16_t *a = avail;
	const uint16_t *u = used;
	areas->desc = desc;
	areas->avail_flags = a;
	areas->avail_idx = a + 1;
	areas->avail_ring = a + 2;
	areas->used_event = a + 2 + vq->size;
	areas->used_flags = u;
	areas->used_idx = u + 1;
	areas->used_ring = (const struct vf_used_elem *)(u + 2);
	areas->avail_event = u + 2 + 4u * vq->size;
	vq->avail_idx = vq->published_idx = vq->last_used_idx = (uint16_t)start;
	vf_store_relaxed_u16(areas->avail_idx, vq->avail_idx);
	if (vq->event_idx)
		vf_store_relaxed_u16(areas->used_event, (uint16_t)(start - 1u));
	return 0;
}

static inline void vf_drv_split_avail_put(struct vf_drv_vq *vq, uint16_t head)
{
	vf_store_relaxed_u16(&vq->split.avail_ring[vq->avail_idx & vq->mask], head);
	vq->avail_idx++;
}

static inline int vf_drv_split_add(struct vf_drv_vq *vq, const struct vf_drv_segment *segments, uint32_t count,
				   uint32_t cookie)
{
	struct vf_drv_desc_state *state = vq->state;
	uint16_t head = vq->free_head, slot = head, tail = head;
	uint32_t writable_bytes = 0;
	for (uint32_t i = 0; i < count; i++) {
		uint16_t next = state[slot].next;
		uint32_t flags = segments[i].writable ? VF_DESC_F_WRITE : 0u;
		if (i + 1u < count)
			flags |= VF_DESC_F_NEXT;
		vq->split.desc[slot] = (struct vf_desc){ segments[i].iova, segments[i].len_bytes, (uint16_t)flags, next };
		writable_bytes += segments[i].writable ? segments[i].len_bytes : 0u;
		state[slot].tag = 0;
		tail = slot;
		slot = next;
	}
	vq->free_head = slot;
	vq->free_count = (uint16_t)(vq->free_count - count);
	state[head].tail = tail;
	state[head].count = (uint16_t)count;
	state[head].cookie = cookie;
	state[head].writable_bytes = writable_bytes;
	vf_drv_split_avail_put(vq, head);
	return head;
}

static inline int vf_drv_split_add_three(struct vf_drv_vq *vq, const struct vf_drv_three *three, uint32_t cookie)
{
	struct vf_drv_desc_state *state = vq->state;
	struct vf_desc *desc = vq->split.desc;
	uint16_t head = vq->free_head, second = state[head].next, tail = state[second].next;
	desc[head] = (struct vf_desc){ three->header_iova, three->header_bytes, VF_DESC_F_NEXT, second };
	desc[second] = (struct vf_desc){ three->data_iova, three->data_bytes,
					 (uint16_t)(three->data_flags | VF_DESC_F_NEXT), tail };
	desc[tail] = (struct vf_desc){ three->status_iova, 1, VF_DESC_F_WRITE, 0 };
	vq->free_head = state[tail].next;
	vq->free_count = (uint16_t)(vq->free_count - 3u);
	state[head].tail = tail;
	state[head].count = 3;
	state[head].tag = state[second].tag = state[tail].tag = 0;
	state[head].cookie = cookie;
	if (vq->in_order)
		state[head].writable_bytes = vf_drv_three_writable(three);
	vf_drv_split_avail_put(vq, head);
	return head;
}

/*
 * The same, without IN_ORDER, for a header and a status that always belong to the same cookie, which is below 65535: three
 * descriptors that had that cookie before hold both already. A tag says so. It is cleared in each descriptor that something
 * else is written to, and the free list, last in, first out, keeps a tagged chain together as long as its head is in it.
 */
static inline void vf_drv_split_add_tagged(struct vf_drv_vq *vq, const struct vf_drv_three *three, uint32_t cookie)
{
	struct vf_drv_desc_state *state = vq->state;
	struct vf_desc *desc = vq->split.desc;
	uint16_t head = vq->free_head, second = state[head].next, tail;
	if (vf_unlikely(state[head].tag != cookie + 1u)) {
		tail = state[second].next;
		desc[head] = (struct vf_desc){ three->header_iova, three->header_bytes, VF_DESC_F_NEXT, second };
		desc[second].next = tail;
		desc[tail] = (struct vf_desc){ three->status_iova, 1, VF_DESC_F_WRITE, 0 };
		state[head].tail = tail;
		state[head].tag = (uint16_t)(cookie + 1u);
		state[head].cookie = cookie;
		state[second].tag = state[tail].tag = 0;
	}
	tail = state[head].tail;
	desc[second].addr = three->data_iova;
	desc[second].len = three->data_bytes;
	desc[second].flags = (uint16_t)(three->data_flags | VF_DESC_F_NEXT);
	vq->free_head = state[tail].next;
	vq->free_count = (uint16_t)(vq->free_count - 3u);
	state[head].count = 3;
	vf_drv_split_avail_put(vq, head);
}

static inline int vf_drv_split_add_indirect(struct vf_drv_vq *vq, struct vf_desc *table, uint64_t table_iova,
					    const struct vf_drv_segment *segments, uint32_t count, uint32_t cookie)
{
	uint16_t head = vq->free_head;
	struct vf_drv_desc_state *state = &vq->state[head];
	uint32_t writable_bytes = 0;
	for (uint32_t i = 0; i < count; i++) {
		uint32_t flags = segments[i].writable ? VF_DESC_F_WRITE : 0u;
		if (i + 1u < count)
			flags |= VF_DESC_F_NEXT;
		table[i] = (struct vf_desc){ segments[i].iova, segments[i].len_bytes, (uint16_t)flags, (uint16_t)(i + 1u) };
		writable_bytes += segments[i].writable ? segments[i].len_bytes : 0u;
	}
	vq->split.desc[head] = (struct vf_desc){ table_iova, 16u * count, VF_DESC_F_INDIRECT, 0 };
	vq->free_head = state->next;
	vq->free_count--;
	state->tail = head;
	state->count = 1;
	state->tag = 0;
	state->cookie = cookie;
	state->writable_bytes = writable_bytes;
	vf_drv_split_avail_put(vq, head);
	return head;
}

static inline int vf_drv_split_publish(struct vf_drv_vq *vq)
{
	uint16_t old_idx = vq->published_idx, new_idx = vq->avail_idx;
	/* Barrier A: descriptors and avail entries before the index; pairs with the device's acquire load. */
	vf_store_release_u16(vq->split.avail_idx, new_idx);
	vq->published_idx = new_idx;
	/* Barrier C: the index before the check of what the device wants; pairs with its fence after enabling kicks. */
	vf_fence_full();
	if (vq->event_idx)
		return vf_need_event(vf_load_relaxed_u16(vq->split.avail_event), new_idx, old_idx);
	return !(vf_load_relaxed_u16(vq->split.used_flags) & VF_USED_F_NO_NOTIFY);
}

/* Chains finished and not reaped yet: a count, or -EPROTO when the device claims more than it was given. */
static inline int vf_drv_split_used_count(const struct vf_drv_vq *vq)
{
	/* Barrier B: pairs with the device's release store of used->idx. */
	uint16_t count = (uint16_t)(vf_load_acquire_u16(vq->split.used_idx) - vq->last_used_idx);
	if (vf_unlikely(count > vf_drv_vq_inflight(vq)))
		return -EPROTO;
	return count;
}

/* Reap the chain that the next used element names. 0, or -EPROTO when it is not in flight. */
static inline int vf_drv_split_take(struct vf_drv_vq *vq, struct vf_drv_used *out)
{
	const struct vf_used_elem *elem = &vq->split.used_ring[vq->last_used_idx & vq->mask];
	uint32_t id = vf_load_relaxed_u32(&elem->id);
	uint32_t written_bytes = vf_load_relaxed_u32(&elem->len);
	if (vf_unlikely(id >= vq->size || vq->state[id].count == 0))
		return -EPROTO;
	__builtin_prefetch(&vq->split.desc[id], 1); /* the next chain begins here */
	vf_drv_ring_finish(vq, (uint16_t)id, written_bytes, out);
	return 0;
}

/* Look at the chain that the next used element names, of those that vf_drv_split_used_count() found: its head, and its cookie.
 * -1 when that is no chain of three; the cookie is UINT32_MAX when vf_drv_split_add_tagged() has not added it. */
static inline int vf_drv_split_peek_tagged(const struct vf_drv_vq *vq, uint32_t *cookie)
{
	uint32_t id = vf_load_relaxed_u32(&vq->split.used_ring[vq->last_used_idx & vq->mask].id);
	if (vf_unlikely(id >= vq->size || vq->state[id].count != 3))
		return -1;
	*cookie = vq->state[id].tag - 1u;
	return (int)id;
}

/* Reap the chain that was looked at. */
static inline void vf_drv_split_take_tagged(struct vf_drv_vq *vq, uint16_t head)
{
	struct vf_drv_desc_state *state = &vq->state[head];
	vq->state[state->tail].next = vq->free_head;
	vq->free_head = head;
	vq->free_count = (uint16_t)(vq->free_count + 3u);
	state->count = 0;
	vq->last_used_idx++;
}

/* The same under IN_ORDER. An element names the last chain of a batch, and the next `count` chains at most, those that the
 * used index covers, can be of it. */
static inline int vf_drv_split_take_in_order(struct vf_drv_vq *vq, uint32_t count, struct vf_drv_used *out)
{
	uint16_t oldest = (uint16_t)((vq->free_head + vq->free_count) & vq->mask);
	if (vq->batch_count == 0) {
		const struct vf_used_elem *elem = &vq->split.used_ring[vq->last_used_idx & vq->mask];
		uint32_t id = vf_load_relaxed_u32(&elem->id);
		uint32_t at = oldest, chains = 1;
		vq->batch_bytes = vf_load_relaxed_u32(&elem->len);
		while (vf_unlikely(at != id)) {
			if (chains++ == count)
				return -EPROTO;
			at = (at + vq->state[at].count) & vq->mask;
		}
		vq->batch_count = (uint16_t)chains;
	}
	vf_drv_ring_finish_next(vq, oldest, out);
	return 0;
}

static inline int vf_drv_split_reap(struct vf_drv_vq *vq, struct vf_drv_used *out, uint32_t max)
{
	int count = vf_drv_split_used_count(vq), most = count < (int)max ? count : (int)max, taken = 0;
	if (vq->in_order)
		while (taken < most && vf_likely(vf_drv_split_take_in_order(vq, (uint32_t)(count - taken), &out[taken]) == 0))
			taken++;
	else
		while (taken < most && vf_likely(vf_drv_split_take(vq, &out[taken]) == 0))
			taken++;
	return taken || most == 0 ? taken : -EPROTO;
}

/* With EVENT_IDX the event index just stays behind: the device passes it once in 65536 chains. */
static inline void vf_drv_split_disable_irq(struct vf_drv_vq *vq)
{
	if (!vq->event_idx)
		vf_store_relaxed_u16(vq->split.avail_flags, VF_AVAIL_F_NO_INTERRUPT);
}

static inline bool vf_drv_split_enable_irq(struct vf_drv_vq *vq)
{
	if (vq->event_idx)
		vf_store_relaxed_u16(vq->split.used_event, vq->last_used_idx);
	else
		vf_store_relaxed_u16(vq->split.avail_flags, 0);
	/* Barrier D: the wish before the second check; pairs with the device's fence after publishing used->idx. */
	vf_fence_full();
	return vf_drv_split_used_count(vq) != 0;
}

#endif
