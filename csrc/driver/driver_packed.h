/* SPDX-License-Identifier: Apache-2.0
 *
 * The driver's side of a packed virtqueue (VIRTIO 1.3, 2.8). driver_vq.h says what each function does and checks that
 * there is room.
 *
 * A place in the ring is a free-running u16 here: its low bits are the slot, and the bit above them says how often the ring
 * was gone round, so that it is the inverse of the wrap counter. That is exact since 2 * size divides 2^16.
 *
 * A batch is published by one store: every descriptor but the very first is written as available. The device goes in order, so
 * it cannot get past the first one, whose flags are written at the end.
 */
#ifndef VF_DRIVER_PACKED_H
#define VF_DRIVER_PACKED_H

#include "driver/driver_ring.h"

/* The flags AVAIL and USED of a descriptor that is available at this place, ... */
static inline uint16_t vf_drv_packed_avail(const struct vf_drv_vq *vq, uint16_t pos)
{
	return pos & vq->size ? VF_PACKED_DESC_F_USED : VF_PACKED_DESC_F_AVAIL;
}

/* ... of one that is used there, ... */
static inline uint16_t vf_drv_packed_used(const struct vf_drv_vq *vq, uint16_t pos)
{
	return pos & vq->size ? 0 : VF_PACKED_DESC_F_AVAIL | VF_PACKED_DESC_F_USED;
}

/* ... and of one that is neither: it looks as one that was used when the ring was gone round before. */
static inline uint16_t vf_drv_packed_neither(const struct vf_drv_vq *vq, uint16_t pos)
{
	return pos & vq->size ? VF_PACKED_DESC_F_AVAIL | VF_PACKED_DESC_F_USED : 0;
}

/* A place as the kernel has it, and the event structures: the slot, and the wrap counter in bit 15. */
static inline uint16_t vf_drv_packed_off_wrap(const struct vf_drv_vq *vq, uint16_t pos)
{
	return (uint16_t)((pos & vq->mask) | (pos & vq->size ? 0u : 1u << VF_PACKED_EVENT_WRAP_BIT));
}

static inline void vf_drv_packed_set_event(struct vf_drv_vq *vq, uint16_t off_wrap, uint16_t flags)
{
	/* Both fields by one store, so that the device never sees one without the other. */
	vf_store_relaxed_u32((uint32_t *)(void *)vq->packed.driver_event, (uint32_t)flags << 16 | off_wrap);
}

/*
 * Continue at `start`, the device's position with nothing in flight, as vhost encodes it: bits 0 to 14 the slot of the
 * next available descriptor, bit 15 the driver's wrap counter, and in the upper half the same again for the next used one.
 * A fresh ring is 0x80008000. The descriptors are left as they are in a ring that has come that far.
 */
static inline int vf_drv_packed_init(struct vf_drv_vq *vq, void *desc, void *driver, void *device, uint32_t start)
{
	uint32_t slot = start & 0x7fffu;

	if (((uintptr_t)desc & 15u) || ((uintptr_t)driver & 3u) || ((uintptr_t)device & 3u))
		return -EINVAL;
	if (slot >= vq->size || start >> 16 != (start & 0xffffu))
		return -EINVAL;
	struct vf_drv_packed_areas *areas = &vq->packed;
	uint16_t pos = (uint16_t)(start >> 15 & 1u ? slot : slot + vq->size);
	areas->desc = desc;
	areas->driver_event = driver;
	areas->device_event = device;
	areas->avail_pos = areas->published_pos = areas->used_pos = pos;
	for (uint32_t i = 0; i < vq->size; i++) {
		uint16_t at = (uint16_t)(pos + i);
		vf_store_relaxed_u16(&areas->desc[at & vq->mask].flags, vf_drv_packed_neither(vq, at));
	}
	vf_drv_packed_set_event(vq, 0, VF_PACKED_EVENT_ENABLE);
	return 0;
}

static inline uint32_t vf_drv_packed_position(const struct vf_drv_vq *vq)
{
	return vf_drv_packed_off_wrap(vq, vq->packed.avail_pos) * 0x10001u;
}

/* The flags to write now into the first descriptor of a chain, which is to have `flags`. */
static inline uint16_t vf_drv_packed_head_flags(struct vf_drv_vq *vq, uint16_t flags)
{
	if (vq->avail_idx != vq->published_idx)
		return flags;
	vq->packed.first_flags = flags; /* of a batch: held back until it is published */
	return vf_drv_packed_neither(vq, vq->packed.avail_pos);
}

/* Account for a chain of `count` descriptors that stand in the ring. Returns its buffer ID. */
static inline uint16_t vf_drv_packed_added(struct vf_drv_vq *vq, uint32_t count, uint32_t writable_bytes, uint32_t cookie)
{
	uint16_t id = vq->free_head;
	struct vf_drv_desc_state *state = &vq->state[id];

	vq->free_head = state->next;
	vq->free_count = (uint16_t)(vq->free_count - count);
	state->tail = id;
	state->count = (uint16_t)count;
	state->cookie = cookie;
	state->writable_bytes = writable_bytes;
	vq->packed.avail_pos = (uint16_t)(vq->packed.avail_pos + count);
	vq->avail_idx++;
	return id;
}

static inline int vf_drv_packed_add(struct vf_drv_vq *vq, const struct vf_drv_segment *segments, uint32_t count,
				    uint32_t cookie)
{
	uint16_t id = vq->free_head, pos = vq->packed.avail_pos;
	uint32_t writable_bytes = 0;
	for (uint32_t i = 0; i < count; i++, pos++) {
		uint32_t flags = vf_drv_packed_avail(vq, pos) | (segments[i].writable ? VF_DESC_F_WRITE : 0u);
		if (i + 1u < count)
			flags |= VF_DESC_F_NEXT;
		if (i == 0)
			flags = vf_drv_packed_head_flags(vq, (uint16_t)flags);
		vq->packed.desc[pos & vq->mask] =
			(struct vf_packed_desc){ segments[i].iova, segments[i].len_bytes, id, (uint16_t)flags };
		writable_bytes += segments[i].writable ? segments[i].len_bytes : 0u;
	}
	return vf_drv_packed_added(vq, count, writable_bytes, cookie);
}

static inline int vf_drv_packed_add_three(struct vf_drv_vq *vq, const struct vf_drv_three *three, uint32_t cookie)
{
	struct vf_packed_desc *desc = vq->packed.desc;
	uint16_t id = vq->free_head, first = vq->packed.avail_pos;
	uint16_t second = (uint16_t)(first + 1u), third = (uint16_t)(first + 2u);
	desc[second & vq->mask] = (struct vf_packed_desc){
		three->data_iova, three->data_bytes, id,
		(uint16_t)(vf_drv_packed_avail(vq, second) | three->data_flags | VF_DESC_F_NEXT)
	};
	desc[third & vq->mask] = (struct vf_packed_desc){
		three->status_iova, 1, id, (uint16_t)(vf_drv_packed_avail(vq, third) | VF_DESC_F_WRITE)
	};
	uint16_t flags = (uint16_t)(vf_drv_packed_avail(vq, first) | VF_DESC_F_NEXT);
	desc[first & vq->mask] = (struct vf_packed_desc){ three->header_iova, three->header_bytes, id,
							  vf_drv_packed_head_flags(vq, flags) };
	return vf_drv_packed_added(vq, 3, vq->in_order ? vf_drv_three_writable(three) : 0, cookie);
}

static inline int vf_drv_packed_add_indirect(struct vf_drv_vq *vq, struct vf_packed_desc *table, uint64_t table_iova,
					     const struct vf_drv_segment *segments, uint32_t count, uint32_t cookie)
{
	uint16_t pos = vq->packed.avail_pos;
	uint32_t writable_bytes = 0;
	for (uint32_t i = 0; i < count; i++) {
		uint16_t flags = segments[i].writable ? VF_DESC_F_WRITE : 0u; /* no other counts here: 2.8.8 */
		table[i] = (struct vf_packed_desc){ segments[i].iova, segments[i].len_bytes, 0, flags };
		writable_bytes += segments[i].writable ? segments[i].len_bytes : 0u;
	}
	uint16_t flags = vf_drv_packed_head_flags(vq, (uint16_t)(vf_drv_packed_avail(vq, pos) | VF_DESC_F_INDIRECT));
	vq->packed.desc[pos & vq->mask] = (struct vf_packed_desc){ table_iova, 16u * count, vq->free_head, flags };
	return vf_drv_packed_added(vq, 1, writable_bytes, cookie);
}

/* Whether the device wants a kick for the descriptors from `old_pos` to before `new_pos` (VIRTIO 1.3, 2.8.7). */
static inline int vf_drv_packed_kick_wanted(const struct vf_drv_vq *vq, uint16_t new_pos, uint16_t old_pos)
{
	uint32_t event = vf_load_relaxed_u32((const uint32_t *)(const void *)vq->packed.device_event);
	if ((event >> 16 & 3u) != VF_PACKED_EVENT_DESC || !vq->event_idx)
		return (event >> 16 & 3u) != VF_PACKED_EVENT_DISABLE;
	uint32_t round_mask = 2u * vq->size - 1u;
	uint32_t event_pos = (event & 0x7fffu) + (event >> VF_PACKED_EVENT_WRAP_BIT & 1u ? 0u : vq->size);
	return ((new_pos - event_pos - 1u) & round_mask) < (uint16_t)(new_pos - old_pos);
}

static inline int vf_drv_packed_publish(struct vf_drv_vq *vq)
{
	struct vf_drv_packed_areas *areas = &vq->packed;
	uint16_t old_pos = areas->published_pos, new_pos = areas->avail_pos;
	/* Barrier A: all descriptors of the batch before the flags of its first; pairs with the device's acquire load. */
	vf_store_release_u16(&areas->desc[old_pos & vq->mask].flags, areas->first_flags);
	areas->published_pos = new_pos;
	vq->published_idx = vq->avail_idx;
	/* Barrier C: the flags before the check of what the device wants; pairs with its fence after enabling kicks. */
	vf_fence_full();
	return vf_drv_packed_kick_wanted(vq, new_pos, old_pos);
}

static inline bool vf_drv_packed_is_used(const struct vf_drv_vq *vq, uint16_t pos)
{
	/* Barrier B: pairs with the device's release store of the flags of the first used descriptor of a batch. */
	uint32_t flags = vf_load_acquire_u16(&vq->packed.desc[pos & vq->mask].flags);
	return (flags & (VF_PACKED_DESC_F_AVAIL | VF_PACKED_DESC_F_USED)) == vf_drv_packed_used(vq, pos);
}

static inline bool vf_drv_packed_has_used(const struct vf_drv_vq *vq)
{
	return vq->batch_count || vf_drv_packed_is_used(vq, vq->packed.used_pos);
}

/* Reap the chain that the used descriptor at used_pos names. 0, or -EPROTO when it is not in flight. */
static inline int vf_drv_packed_take(struct vf_drv_vq *vq, struct vf_drv_used *out)
{
	const struct vf_packed_desc *desc = &vq->packed.desc[vq->packed.used_pos & vq->mask];
	uint16_t id = vf_load_relaxed_u16(&desc->id);
	uint32_t written_bytes = vf_load_relaxed_u32(&desc->len);
	if (vf_unlikely(id >= vq->size || vq->state[id].count == 0 || vf_drv_vq_inflight(vq) == 0))
		return -EPROTO;
	vq->packed.used_pos = (uint16_t)(vq->packed.used_pos + vf_drv_ring_finish(vq, id, written_bytes, out));
	return 0;
}

/* The same under IN_ORDER: the descriptor names the last chain of a batch, and the next one stands after the whole batch.
 * Buffer IDs are numbered in the order of adding. */
static inline int vf_drv_packed_take_in_order(struct vf_drv_vq *vq, struct vf_drv_used *out)
{
	uint16_t added = (uint16_t)(vq->avail_idx - vq->last_used_idx);
	uint16_t oldest = (uint16_t)((vq->free_head - added) & vq->mask);
	if (vq->batch_count == 0) {
		const struct vf_packed_desc *desc = &vq->packed.desc[vq->packed.used_pos & vq->mask];
		uint16_t id = vf_load_relaxed_u16(&desc->id);
		uint16_t chains = (uint16_t)(((id - oldest) & vq->mask) + 1u);
		vq->batch_bytes = vf_load_relaxed_u32(&desc->len);
		if (vf_unlikely(id >= vq->size || chains > vf_drv_vq_inflight(vq)))
			return -EPROTO;
		vq->batch_count = chains;
	}
	vq->packed.used_pos = (uint16_t)(vq->packed.used_pos + vf_drv_ring_finish_next(vq, oldest, out));
	return 0;
}

static inline int vf_drv_packed_reap(struct vf_drv_vq *vq, struct vf_drv_used *out, uint32_t max)
{
	int taken = 0, rc = 0;
	if (vq->in_order)
		while (taken < (int)max && rc == 0 && vf_drv_packed_has_used(vq))
			taken += (rc = vf_drv_packed_take_in_order(vq, &out[taken])) == 0;
	else
		while (taken < (int)max && rc == 0 && vf_drv_packed_is_used(vq, vq->packed.used_pos))
			taken += (rc = vf_drv_packed_take(vq, &out[taken])) == 0;
	return taken ? taken : rc;
}

static inline void vf_drv_packed_disable_irq(struct vf_drv_vq *vq)
{
	if (vq->packed.irq_disabled)
		return;
	vq->packed.irq_disabled = true;
	vf_drv_packed_set_event(vq, 0, VF_PACKED_EVENT_DISABLE);
}

static inline bool vf_drv_packed_enable_irq(struct vf_drv_vq *vq)
{
	uint16_t off_wrap = vf_drv_packed_off_wrap(vq, vq->packed.used_pos);
	vq->packed.irq_disabled = false;
	vf_drv_packed_set_event(vq, off_wrap, vq->event_idx ? VF_PACKED_EVENT_DESC : VF_PACKED_EVENT_ENABLE);
	/* Barrier D: the wish before the second check; pairs with the device's fence after publishing used descriptors. */
	vf_fence_full();
	return vf_drv_packed_has_used(vq);
}

#endif
