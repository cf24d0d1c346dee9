/* SPDX-License-Identifier: Apache-2.0
 *
 * The device's side of a split virtqueue (VIRTIO 1.3, 2.7). The driver is an adversary: it can change any of this
 * memory at any time. Each field is therefore loaded once, into a local, and every index is checked before use.
 */
#ifndef VF_VRING_SPLIT_H
#define VF_VRING_SPLIT_H

#include "memory/iotlb.h"
#include "ring/vring.h"

struct vf_split {
	const struct vf_desc *desc;
	const uint16_t *avail_flags;
	const uint16_t *avail_idx;
	const uint16_t *avail_ring;
	const uint16_t *used_event; /* after the last avail entry */
	uint16_t *used_flags;
	uint16_t *used_idx;
	struct vf_used_elem *used_ring;
	uint16_t *avail_event; /* after the last used entry */

	uint32_t size; /* 1..32768, a power of two */
	uint16_t mask;
	uint16_t last_avail_idx; /* next entry to pop; free-running */
	uint16_t seen_avail_idx; /* the driver's index at the last check */
	uint16_t last_used_idx; /* next entry to fill; not yet published from published_used_idx on */
	uint16_t published_used_idx;
	uint16_t decided_used_idx; /* published index at the last interrupt decision */
	uint8_t event_idx;
	uint8_t indirect;
	uint8_t in_order;
	uint8_t first; /* after a start it is unknown whether the driver wants one: the first publication interrupts */

	/* IN_ORDER: one used entry stands for a run of buffers, of which it names the last (VIRTIO 1.3, 2.7.9). */
	uint16_t run_idx; /* where the entry of the run goes */
	uint8_t run_full; /* all of the last buffer was used, so that another one may follow in the same run */
	uint32_t run_head; /* of the last buffer */
	uint32_t run_bytes;
};

static inline size_t vf_split_desc_bytes(uint32_t size)
{
	return (size_t)size * sizeof(struct vf_desc);
}

/* flags, idx, ring, used_event */
static inline size_t vf_split_avail_bytes(uint32_t size)
{
	return 6u + 2u * (size_t)size;
}

/* flags, idx, ring, avail_event */
static inline size_t vf_split_used_bytes(uint32_t size)
{
	return 6u + sizeof(struct vf_used_elem) * (size_t)size;
}

/* Point at mapped areas. The caller has checked size, alignment and extent. Cursors are left alone. */
static inline void vf_split_set_areas(struct vf_split *vr, void *desc, void *avail, void *used)
{
	vr->desc = desc;
	vr->avail_flags = avail;
	vr->avail_idx = vr->avail_flags + 1;
	vr->avail_ring = vr->avail_flags + 2;
	vr->used_event = vr->avail_ring + vr->size;
	vr->used_flags = used;
	vr->used_idx = vr->used_flags + 1;
	vr->used_ring = (struct vf_used_elem *)(vr->used_flags + 2);
	vr->avail_event = (uint16_t *)(vr->used_ring + vr->size);
}

/* Start at last_avail_idx; the used index continues from where the ring says it is. Areas are set. */
static inline void vf_split_start(struct vf_split *vr, uint16_t last_avail_idx)
{
	uint16_t used_idx = vf_load_relaxed_u16(vr->used_idx);

	vr->last_avail_idx = last_avail_idx;
	vr->seen_avail_idx = last_avail_idx;
	vr->last_used_idx = used_idx;
	vr->published_used_idx = used_idx;
	vr->decided_used_idx = used_idx;
	vr->run_idx = used_idx;
	vr->first = 1;
}

/* How many entries are available, at most size; -VF_RING_AVAIL_OVERRUN when the driver's index is further ahead. */
static inline int vf_split_available(struct vf_split *vr)
{
	uint16_t count = (uint16_t)(vr->seen_avail_idx - vr->last_avail_idx);

	if (count)
		return count;
	vr->seen_avail_idx = vf_load_acquire_u16(vr->avail_idx); /* Barrier A */
	count = (uint16_t)(vr->seen_avail_idx - vr->last_avail_idx);
	if (vf_unlikely(count > vr->size)) {
		vr->seen_avail_idx = vr->last_avail_idx;
		return -VF_RING_AVAIL_OVERRUN;
	}
	return count;
}

/* A descriptor in private memory, by two loads. */
static inline struct vf_desc vf_split_load_desc(const struct vf_desc *from)
{
	const uint64_t *words = (const uint64_t *)(const void *)from;
	uint64_t addr = vf_load_relaxed_u64(&words[0]);
	uint64_t rest = vf_load_relaxed_u64(&words[1]);

	return (struct vf_desc){
		.addr = addr,
		.len = (uint32_t)rest,
		.flags = (uint16_t)(rest >> 32),
		.next = (uint16_t)(rest >> 48),
	};
}

/* Append an indirect table (VIRTIO 1.3, 2.7.5.3). 0 or -enum vf_ring_error. */
static inline int vf_split_walk_indirect(struct vf_iotlb *tlb, const struct vf_desc *table, struct vf_chain *chain)
{
	uint32_t count = table->len / (uint32_t)sizeof(struct vf_desc);
	uint32_t run, slot = 0;

	if (table->len == 0 || table->len % sizeof(struct vf_desc) || count > VF_QUEUE_SIZE_MAX)
		return -VF_RING_INDIRECT_SIZE;
	if (table->addr > UINT64_MAX - (table->len - 1u))
		return -VF_RING_INDIRECT_UNMAPPED;
	const uint8_t *va = vf_iotlb_translate(tlb, table->addr, table->len, VF_PERM_RO, &run);
	/* A table whose start is aligned and which one region holds is read in place. */
	int in_place = va && run == table->len && (uintptr_t)va % sizeof(uint64_t) == 0;

	/* Bounded by the capacity of the chain, which ends loops too. */
	for (;;) {
		struct vf_desc desc;

		if (vf_likely(in_place)) {
			desc = vf_split_load_desc((const struct vf_desc *)(const void *)va + slot);
		} else if (vf_iotlb_copy_from(tlb, table->addr + slot * sizeof(desc), &desc, sizeof(desc))) {
			return -VF_RING_INDIRECT_UNMAPPED;
		}
		if (vf_unlikely(desc.flags & VF_DESC_F_INDIRECT))
			return -VF_RING_INDIRECT_NESTED;
		if (vf_unlikely(chain->segment_count == chain->segment_max))
			return -VF_RING_CHAIN_TOO_LONG;
		vf_chain_add(chain, desc.addr, desc.len, desc.flags);
		if (!(desc.flags & VF_DESC_F_NEXT))
			return 0;
		if (vf_unlikely(desc.next >= count))
			return -VF_RING_NEXT_RANGE;
		slot = desc.next;
	}
}

/*
 * Copy the chain that begins at descriptor `head`. 0 or -enum vf_ring_error. At most size direct descriptors are
 * followed, so that a loop ends.
 */
static inline int vf_split_walk(struct vf_split *vr, struct vf_iotlb *tlb, uint16_t head, struct vf_chain *chain)
{
	uint32_t slot = head;

	if (vf_unlikely(head >= vr->size))
		return -VF_RING_HEAD_RANGE;
	vf_chain_clear(chain, head);
	/* No chain is longer than the ring, and the segments have room for that. */
	while (chain->segment_count < vr->size) {
		struct vf_desc desc = vf_split_load_desc(&vr->desc[slot]);

		if (vf_unlikely(desc.flags & VF_DESC_F_INDIRECT)) {
			if (!vr->indirect)
				return -VF_RING_INDIRECT_NOT_OFFERED;
			if (desc.flags & VF_DESC_F_NEXT)
				return -VF_RING_INDIRECT_NEXT;
			return vf_split_walk_indirect(tlb, &desc, chain);
		}
		vf_chain_add(chain, desc.addr, desc.len, desc.flags);
		if (!(desc.flags & VF_DESC_F_NEXT))
			return 0;
		if (vf_unlikely(desc.next >= vr->size))
			return -VF_RING_NEXT_RANGE;
		slot = desc.next;
	}
	return -VF_RING_CHAIN_TOO_LONG;
}

/*
 * Pop the next chain. The caller has checked vf_split_available() > 0. 0 or -enum vf_ring_error; on an error the entry
 * counts as not popped.
 */
static inline int vf_split_pop(struct vf_split *vr, struct vf_iotlb *tlb, struct vf_chain *chain)
{
	uint16_t head = vf_load_relaxed_u16(&vr->avail_ring[vr->last_avail_idx & vr->mask]);
	int err = vf_split_walk(vr, tlb, head, chain);

	vr->last_avail_idx = (uint16_t)(vr->last_avail_idx + (err == 0));
	return err;
}

/*
 * How many entries the device has completed since `logged_used_idx`, which it noted at an earlier publication; -1 when
 * that cannot be.
 */
static inline int vf_split_used_since(const struct vf_split *vr, uint16_t logged_used_idx)
{
	uint16_t count = (uint16_t)(vf_load_acquire_u16(vr->used_idx) - logged_used_idx);

	return count <= vr->size ? count : -1;
}

/* Whether the driver waits for nothing: all available chains were completed. */
static inline int vf_split_is_idle(const struct vf_split *vr)
{
	return vf_load_acquire_u16(vr->avail_idx) == vf_load_relaxed_u16(vr->used_idx);
}

/* Whether the driver has made at least as many entries available as `last_avail_idx` counts as popped. */
static inline int vf_split_could_take(const struct vf_split *vr, uint16_t last_avail_idx)
{
	return (uint16_t)(vf_load_acquire_u16(vr->avail_idx) - last_avail_idx) <= vr->size;
}

/* The head in used entry `idx`; the size of the ring when it names none. */
static inline uint32_t vf_split_used_head(const struct vf_split *vr, uint16_t idx)
{
	uint32_t head = vf_load_relaxed_u32(&vr->used_ring[idx & vr->mask].id);

	return head < vr->size ? head : vr->size;
}

/* Undo the last pop: the chain counts as not popped. */
static inline void vf_split_unpop(struct vf_split *vr)
{
	vr->last_avail_idx--;
}

/*
 * Prefetch for the next `count` pops: their first descriptors, and the headers that these point at. No load depends on the previous
 * one, so the CPU has many of them in flight at once. Most chains have three adjacent descriptors: the cache line after the first
 * one comes by itself. Hints only: everything is loaded again, and checked, when it is popped. A prefetch neither faults nor
 * allocates a page.
 */
static inline void vf_split_prefetch(const struct vf_split *vr, const struct vf_iotlb *tlb, uint32_t count)
{
	const uint16_t *ring = vr->avail_ring;
	uint16_t mask = vr->mask, idx = vr->last_avail_idx, last = (uint16_t)(idx + count);

	for (; idx != last; idx++)
		vf_iotlb_prefetch(tlb, vf_peek_u64(&vr->desc[vf_peek_u16(&ring[idx & mask]) & mask].addr));
}

static inline void vf_split_put_used(struct vf_split *vr, uint16_t used_idx, uint32_t head, uint32_t written_bytes)
{
	struct vf_used_elem *elem = &vr->used_ring[used_idx & vr->mask];

	vf_store_relaxed_u32(&elem->id, head);
	vf_store_relaxed_u32(&elem->len, written_bytes);
}

/* Write the entry of the open run, if there is one. */
static inline void vf_split_end_run(struct vf_split *vr)
{
	if (vr->run_idx == vr->last_used_idx)
		return;
	vf_split_put_used(vr, vr->run_idx, vr->run_head, vr->run_bytes);
	vr->run_idx = vr->last_used_idx;
}

/* Push a chain; the next vf_split_publish() publishes it. full: the device has written all that it may write of it. With
 * IN_ORDER chains are pushed in the order in which they were popped. */
static inline void vf_split_push(struct vf_split *vr, uint16_t head, uint32_t written_bytes, int full)
{
	if (!vr->in_order) {
		vf_split_put_used(vr, vr->last_used_idx, head, written_bytes);
	} else {
		if (!vr->run_full)
			vf_split_end_run(vr);
		vr->run_head = head;
		vr->run_bytes = written_bytes;
		vr->run_full = full != 0;
	}
	vr->last_used_idx++;
}

/* Publish everything pushed, by one store. */
static inline void vf_split_publish(struct vf_split *vr)
{
	if (vr->in_order)
		vf_split_end_run(vr);
	vf_store_release_u16(vr->used_idx, vr->last_used_idx); /* Barrier B */
	vr->published_used_idx = vr->last_used_idx;
}

/* Whether the driver wants an interrupt for what was published since the last decision. */
static inline int vf_split_irq_wanted(struct vf_split *vr)
{
	uint16_t old_idx = vr->decided_used_idx, new_idx = vr->published_used_idx;
	int wanted;

	vf_fence_full(); /* Barrier D */
	if (vr->event_idx)
		wanted = vf_need_event(vf_load_relaxed_u16(vr->used_event), new_idx, old_idx);
	else
		wanted = !(vf_load_relaxed_u16(vr->avail_flags) & VF_AVAIL_F_NO_INTERRUPT);
	wanted |= vr->first;
	vr->first = 0;
	vr->decided_used_idx = new_idx;
	return wanted;
}

/* Published completions since the last interrupt decision. */
static inline uint32_t vf_split_irq_owed(const struct vf_split *vr)
{
	return (uint16_t)(vr->published_used_idx - vr->decided_used_idx);
}

/* No kicks while the device polls. With EVENT_IDX that is an event half the index space away: the one that
 * was asked for would be passed by the next request. */
static inline void vf_split_kick_disable(struct vf_split *vr)
{
	if (vr->event_idx)
		vf_store_relaxed_u16(vr->avail_event, (uint16_t)(vr->last_avail_idx + 0x7fffu));
	else
		vf_store_relaxed_u16(vr->used_flags, VF_USED_F_NO_NOTIFY);
}

/* Ask for a kick, then check again: true when a request came in between. */
static inline int vf_split_kick_enable(struct vf_split *vr)
{
	if (vr->event_idx)
		vf_store_relaxed_u16(vr->avail_event, vr->last_avail_idx);
	else
		vf_store_relaxed_u16(vr->used_flags, 0);
	vf_fence_full(); /* Barrier C */
	return vf_load_acquire_u16(vr->avail_idx) != vr->last_avail_idx;
}

#endif
