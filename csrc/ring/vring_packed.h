/* SPDX-License-Identifier: Apache-2.0
 *
 * The device's side of a packed virtqueue (VIRTIO 1.3, 2.8). As in vring_split.h the driver is an adversary: each field
 * is loaded once, into a local, and checked before use.
 *
 * Chains are completed in the order in which they were popped, also if the driver has not asked for that (IN_ORDER). So a used
 * element stands where its own chain began, and no descriptor in flight is ever overwritten: the next worker finds the
 * descriptors of all requests that it has to replay.
 *
 * Each element is visible to the driver once it is written. Before that, its end and the number of its descriptors are written
 * to the in-flight log, so that the next worker can follow the elements from the last noted position (vf_packed_find_used).
 */
#ifndef VF_VRING_PACKED_H
#define VF_VRING_PACKED_H

#include "memory/iotlb.h"
#include "ring/inflight.h"
#include "ring/vring.h"
#include "ring/vring_packed_abi.h"

#define VF_PACKED_SLOT_MASK 0x7fffu /* of a position: a slot, and its wrap counter above */

struct vf_packed {
	struct vf_packed_desc *desc;
	const struct vf_packed_event *driver_event;
	struct vf_packed_event *device_event;
	struct vf_inflight_header *log_header;
	struct vf_inflight_entry *log; /* one a slot: order is how many descriptors the used element there stands for */

	uint32_t size; /* 1..32768 */
	uint16_t avail_slot; /* next one to pop */
	uint16_t used_slot; /* next one to complete, once the open run is written */
	uint32_t taken_count; /* descriptors popped and not completed */
	uint32_t given_count; /* descriptors completed since the last interrupt decision */
	uint32_t owed_count; /* chains of these */
	uint8_t avail_wrap_counter;
	uint8_t used_wrap_counter;
	uint8_t event_idx;
	uint8_t indirect;
	uint8_t in_order;
	uint8_t first; /* as in struct vf_split */

	/* IN_ORDER: one used element stands for a run of buffers, of which it names the last (VIRTIO 1.3, 2.8.9). Without it each
	 * run has one buffer. */
	uint16_t run_id;
	uint8_t run_full;
	uint32_t run_count; /* descriptors of the run that is open; 0 = none is */
	uint32_t run_chain_count;
	uint32_t run_bytes;
};

static inline size_t vf_packed_desc_bytes(uint32_t size)
{
	return (size_t)size * sizeof(struct vf_packed_desc);
}

static inline void vf_packed_set_areas(struct vf_packed *vr, void *desc, void *driver_event, void *device_event)
{
	vr->desc = desc;
	vr->driver_event = driver_event;
	vr->device_event = device_event;
}

/* A slot and its wrap counter as vhost has them: 15 bits and one. */
static inline uint16_t vf_packed_position(uint16_t slot, uint8_t wrap_counter)
{
	return (uint16_t)(slot | (uint32_t)wrap_counter << VF_PACKED_EVENT_WRAP_BIT);
}

static inline uint16_t vf_packed_avail_position(const struct vf_packed *vr)
{
	return vf_packed_position(vr->avail_slot, vr->avail_wrap_counter);
}

static inline uint16_t vf_packed_used_position(const struct vf_packed *vr)
{
	return vf_packed_position(vr->used_slot, vr->used_wrap_counter);
}

/* Move a slot and its wrap counter by count descriptors, at most the size of the ring. */
static inline void vf_packed_advance(const struct vf_packed *vr, uint16_t *slot, uint8_t *wrap_counter, uint32_t count)
{
	uint32_t at = *slot + count; /* below 2^17 */

	if (at >= vr->size) {
		at -= vr->size;
		*wrap_counter ^= 1u;
	}
	*slot = (uint16_t)at;
}

/* Start where nothing is in flight. -VF_RING_LOG for a slot outside the ring. */
static inline int vf_packed_start(struct vf_packed *vr, uint16_t position)
{
	uint16_t slot = position & VF_PACKED_SLOT_MASK;

	if (slot >= vr->size)
		return -VF_RING_LOG;
	vr->avail_slot = vr->used_slot = slot;
	vr->avail_wrap_counter = vr->used_wrap_counter = (uint8_t)(position >> VF_PACKED_EVENT_WRAP_BIT);
	vr->taken_count = vr->given_count = vr->owed_count = vr->run_count = vr->run_chain_count = 0;
	vr->first = 1;
	return 0;
}

static inline int vf_packed_flags_avail(uint16_t flags, uint8_t wrap_counter)
{
	uint32_t avail = (flags >> VF_PACKED_DESC_F_AVAIL_BIT) & 1u, used = (flags >> VF_PACKED_DESC_F_USED_BIT) & 1u;

	return avail == wrap_counter && used != wrap_counter;
}

/* Whether there is a chain to pop. */
static inline int vf_packed_available(const struct vf_packed *vr)
{
	uint16_t flags = vf_load_acquire_u16(&vr->desc[vr->avail_slot].flags); /* Barrier A */

	return vf_packed_flags_avail(flags, vr->avail_wrap_counter);
}

/* All of a descriptor but its address: len, id and flags. */
static inline uint64_t vf_packed_load_rest(const struct vf_packed_desc *desc)
{
	return vf_load_acquire_u64((const uint64_t *)(const void *)&desc->len);
}

/* Append an indirect table (VIRTIO 1.3, 2.8.7): its descriptors follow each other, and of their flags WRITE alone counts. 0 or
 * -enum vf_ring_error. */
static inline int vf_packed_walk_indirect(struct vf_iotlb *tlb, uint64_t addr, uint32_t len, struct vf_chain *chain)
{
	uint32_t count = len / (uint32_t)sizeof(struct vf_packed_desc);
	uint32_t run;

	if (len == 0 || len % sizeof(struct vf_packed_desc))
		return -VF_RING_INDIRECT_SIZE;
	if (count > chain->segment_max)
		return -VF_RING_CHAIN_TOO_LONG;
	if (addr > UINT64_MAX - (len - 1u))
		return -VF_RING_INDIRECT_UNMAPPED;
	const uint8_t *va = vf_iotlb_translate(tlb, addr, len, VF_PERM_RO, &run);
	int in_place = va && run == len && (uintptr_t)va % sizeof(uint64_t) == 0;

	for (uint32_t i = 0; i < count; i++) {
		struct vf_packed_desc desc;

		if (vf_likely(in_place)) {
			const uint64_t *words = (const uint64_t *)(const void *)(va + i * sizeof(desc));
			uint64_t rest = vf_load_relaxed_u64(&words[1]);

			vf_chain_add(chain, vf_load_relaxed_u64(&words[0]), (uint32_t)rest, (uint32_t)(rest >> 48));
			continue;
		}
		if (vf_iotlb_copy_from(tlb, addr + i * sizeof(desc), &desc, sizeof(desc)))
			return -VF_RING_INDIRECT_UNMAPPED;
		vf_chain_add(chain, desc.addr, desc.len, desc.flags);
	}
	return 0;
}

/* Copy the chain whose first descriptor, already seen to be available, has `rest`. 0 or -enum vf_ring_error. */
static inline int vf_packed_walk(struct vf_packed *vr, struct vf_iotlb *tlb, uint64_t rest, struct vf_chain *chain)
{
	uint32_t slot = vr->avail_slot, room = vr->size - vr->taken_count;

	vf_chain_clear(chain, (uint16_t)slot);
	for (uint32_t count = 1; count <= room; count++) {
		uint64_t addr = vf_load_relaxed_u64(&vr->desc[slot].addr);
		uint32_t flags = (uint32_t)(rest >> 48);

		/* The driver names the buffer in the last descriptor of its chain. */
		chain->id = (uint16_t)(rest >> 32);
		chain->slot_count = count;
		if (vf_unlikely(flags & VF_DESC_F_INDIRECT)) {
			if (!vr->indirect)
				return -VF_RING_INDIRECT_NOT_OFFERED;
			/* VIRTIO 1.3, 2.8.7: a table is a chain of its own. */
			if (flags & VF_DESC_F_NEXT || count > 1u)
				return -VF_RING_INDIRECT_NEXT;
			return vf_packed_walk_indirect(tlb, addr, (uint32_t)rest, chain);
		}
		vf_chain_add(chain, addr, (uint32_t)rest, flags);
		if (!(flags & VF_DESC_F_NEXT))
			return 0;
		slot = slot + 1u < vr->size ? slot + 1u : 0;
		rest = vf_packed_load_rest(&vr->desc[slot]);
	}
	/* More than the ring holds: a loop, or descriptors that are in flight made available again. */
	return room == vr->size ? -VF_RING_CHAIN_TOO_LONG : -VF_RING_AVAIL_OVERRUN;
}

/* Count the next chain, of so many descriptors, as popped. */
static inline void vf_packed_took(struct vf_packed *vr, uint32_t slot_count)
{
	vf_packed_advance(vr, &vr->avail_slot, &vr->avail_wrap_counter, slot_count);
	vr->taken_count += slot_count;
}

/* Pop the next chain. 0, VF_RING_EMPTY, or -enum vf_ring_error; it counts as popped only with 0. */
static inline int vf_packed_pop(struct vf_packed *vr, struct vf_iotlb *tlb, struct vf_chain *chain)
{
	uint64_t rest = vf_packed_load_rest(&vr->desc[vr->avail_slot]); /* Barrier A */

	if (!vf_packed_flags_avail((uint16_t)(rest >> 48), vr->avail_wrap_counter))
		return VF_RING_EMPTY;
	int err = vf_packed_walk(vr, tlb, rest, chain);
	if (vf_unlikely(err))
		return err;
	vf_packed_took(vr, chain->slot_count);
	return 0;
}

/* Hints only, as vf_split_prefetch(): the driver puts its chains side by side, and most have three descriptors. */
static inline void vf_packed_prefetch(const struct vf_packed *vr, const struct vf_iotlb *tlb, uint32_t count)
{
	uint32_t slot = vr->avail_slot;

	for (uint32_t i = 0; i < count; i++) {
		vf_iotlb_prefetch(tlb, vf_peek_u64(&vr->desc[slot].addr));
		slot += 3u;
		if (slot >= vr->size)
			slot -= slot < 2u * vr->size ? vr->size : slot;
	}
}

/* Write the used element of the open run, if there is one: the driver sees it at once. */
static inline void vf_packed_end_run(struct vf_packed *vr)
{
	uint64_t flags = vr->used_wrap_counter ? VF_PACKED_DESC_F_AVAIL | VF_PACKED_DESC_F_USED : 0;
	uint16_t slot = vr->used_slot;

	if (vr->run_count == 0)
		return;
	flags |= vr->run_bytes ? VF_DESC_F_WRITE : 0;
	vf_packed_advance(vr, &vr->used_slot, &vr->used_wrap_counter, vr->run_count);
	vf_log_set(&vr->log[slot], vr->run_count);
	vf_log_announce(vr->log_header, vf_packed_used_position(vr));
	vf_store_release_u64((uint64_t *)(void *)&vr->desc[slot].len,
			     flags << 48 | (uint64_t)vr->run_id << 32 | vr->run_bytes); /* Barrier B */
	vr->taken_count -= vr->run_count;
	vr->given_count += vr->run_count;
	vr->owed_count += vr->run_chain_count;
	vr->run_count = vr->run_chain_count = 0;
}

/* Push a chain, in the order of popping. It is published with the next vf_packed_publish() at the latest. full: as in
 * vf_split_push(). */
static inline void vf_packed_push(struct vf_packed *vr, uint16_t id, uint32_t slot_count, uint32_t written_bytes, int full)
{
	if (!vr->in_order || !vr->run_full)
		vf_packed_end_run(vr);
	vr->run_id = id;
	vr->run_bytes = written_bytes;
	vr->run_full = full != 0;
	vr->run_count += slot_count;
	vr->run_chain_count++;
}

static inline void vf_packed_publish(struct vf_packed *vr)
{
	vf_packed_end_run(vr);
}

/* Whether the driver wants an interrupt for what was completed since the last decision (VIRTIO 1.3, 2.8.10). */
static inline int vf_packed_irq_wanted(struct vf_packed *vr)
{
	uint16_t new_idx = vr->used_slot, old_idx = (uint16_t)(new_idx - vr->given_count), event;
	int wanted;

	vf_fence_full(); /* Barrier D */
	uint32_t wish = vf_load_relaxed_u32((const uint32_t *)(const void *)vr->driver_event);
	uint32_t flags = wish >> 16;

	if (flags == VF_PACKED_EVENT_DESC && vr->event_idx) {
		/* Relative to the lap of new_idx; one that is a lap or more behind was passed. */
		event = (uint16_t)(wish & VF_PACKED_SLOT_MASK);
		if ((wish >> VF_PACKED_EVENT_WRAP_BIT & 1u) != vr->used_wrap_counter)
			event = (uint16_t)(event - vr->size);
		wanted = vr->given_count > vr->size || vf_need_event(event, new_idx, old_idx);
	} else {
		wanted = flags != VF_PACKED_EVENT_DISABLE;
	}
	wanted |= vr->first;
	vr->first = 0;
	vr->given_count = vr->owed_count = 0;
	return wanted;
}

static inline void vf_packed_set_wish(struct vf_packed *vr, uint32_t off_wrap, uint32_t flags)
{
	vf_store_release_u32((uint32_t *)(void *)vr->device_event, flags << 16 | off_wrap);
}

static inline void vf_packed_kick_disable(struct vf_packed *vr)
{
	vf_packed_set_wish(vr, 0, VF_PACKED_EVENT_DISABLE);
}

/* Ask for a kick, then check again: true when a request came in between. */
static inline int vf_packed_kick_enable(struct vf_packed *vr)
{
	if (vr->event_idx)
		vf_packed_set_wish(vr, vf_packed_avail_position(vr), VF_PACKED_EVENT_DESC);
	else
		vf_packed_set_wish(vr, 0, VF_PACKED_EVENT_ENABLE);
	vf_fence_full(); /* Barrier C */
	return vf_packed_available(vr);
}

/* Whether the used element of the chain at a position has been published: the USED bit shows that, also when the driver has
 * made the slot available again. */
static inline int vf_packed_is_used(const struct vf_packed *vr, uint16_t slot, uint8_t wrap_counter)
{
	return ((vf_load_acquire_u16(&vr->desc[slot].flags) >> VF_PACKED_DESC_F_USED_BIT) & 1u) == wrap_counter;
}

/*
 * Find how far the dead worker got: start at its last noted position and skip the used elements that it published, up to the one
 * that it announced. Nothing can be told from the flags beyond that: a slot where no chain of this lap began looks like
 * one that was completed. The position in *position, and how many descriptors it lies further on; or -VF_RING_LOG when that
 * cannot be.
 */
static inline int vf_packed_find_used(const struct vf_packed *vr, uint16_t *position, uint16_t announced)
{
	uint16_t slot = *position & VF_PACKED_SLOT_MASK;
	uint8_t wrap_counter = (uint8_t)(*position >> VF_PACKED_EVENT_WRAP_BIT);
	uint32_t passed = 0;

	if (slot >= vr->size)
		return -VF_RING_LOG;
	while (*position != announced && vf_packed_is_used(vr, slot, wrap_counter)) {
		uint64_t count = vr->log[slot].order;

		if (count == 0 || count > vr->size - passed)
			return -VF_RING_LOG;
		vf_packed_advance(vr, &slot, &wrap_counter, (uint32_t)count);
		passed += (uint32_t)count;
		*position = vf_packed_position(slot, wrap_counter);
	}
	return (int)passed;
}

#endif
