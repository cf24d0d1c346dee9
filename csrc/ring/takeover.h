/* SPDX-License-Identifier: Apache-2.0
 *
 * Adopt a ring from a dead worker: set its cursors by the ring and the in-flight log (inflight.h).
 */
#ifndef VF_TAKEOVER_H
#define VF_TAKEOVER_H

#include "base/seed_fault.h"
#include "ring/inflight.h"
#include "ring/vring_format.h"

/* Start a mapped split ring whose popped chains are all completed: at its used index, with an empty log. */
static inline void vf_takeover_begin(struct vf_vring *vr, struct vf_inflight_header *header, struct vf_inflight_entry *log,
				     uint16_t state)
{
	if (!vr->is_packed) {
		vf_split_start(&vr->split, 0);
		state = vr->split.published_used_idx;
	}
	vf_vring_start(vr, state);
	vf_log_begin(header, log, vr->size, vf_vring_log_format(vr), vf_vring_avail_state(vr), vf_vring_used_state(vr));
}

/* Whether the ring itself shows that the driver waits for nothing. A packed ring never does: it has no index. */
static inline int vf_takeover_is_idle(const struct vf_vring *vr)
{
	return !vr->is_packed && vf_split_is_idle(&vr->split);
}

/* Forget the published heads: the `published_count` ones after the noted used index. */
static inline void vf_takeover_forget_published(const struct vf_split *vr, struct vf_inflight_entry *log,
						uint32_t entry_count, uint16_t logged_used_idx,
						uint32_t published_count)
{
	if (vr->in_order) {
		/* The used ring names only the last head of each run, but the order of a head is its place in the avail ring. */
		for (uint32_t i = 0; i < entry_count; i++)
			if (log[i].order && (uint16_t)((uint16_t)log[i].order - logged_used_idx) < published_count)
				vf_log_set(&log[i], 0);
		return;
	}
	for (uint32_t i = 0; i < published_count; i++) {
		uint32_t head = vf_split_used_head(vr, (uint16_t)(logged_used_idx + i));

		if (head < vr->size)
			vf_log_set(&log[head], 0);
	}
}

/*
 * A published batch may still be in the log. The log's used index, written after the clearing, tells how far back to search.
 * forget: whether to forget such a batch (a fault that tests build in does not).
 */
static inline int vf_takeover_split(struct vf_vring *vr, struct vf_inflight_header *header, struct vf_inflight_entry *log,
				    int forget)
{
	struct vf_split *split = &vr->split;
	uint16_t logged_used_idx = (uint16_t)header->last_used_idx, next_idx;
	int published_count = vf_split_used_since(split, logged_used_idx);
	uint32_t entry_count = header->entry_count, count = 0;

	if (published_count < 0)
		return -VF_RING_LOG;
	if (forget)
		vf_takeover_forget_published(split, log, entry_count, logged_used_idx, (uint32_t)published_count);
	for (uint32_t i = 0; i < entry_count; i++) {
		if (log[i].order == 0)
			continue;
		if (i >= split->size)
			return -VF_RING_LOG;
		count++;
	}
	/* Everything made available before this index was either completed or is in the log. */
	next_idx = (uint16_t)(logged_used_idx + (uint32_t)published_count + count);
	if (!vf_split_could_take(split, next_idx))
		return -VF_RING_LOG;
	vf_split_start(split, next_idx);
	return (int)count;
}

/* All popped chains are still in the ring, and are popped again: there is nothing to replay from the log. */
static inline int vf_takeover_packed(struct vf_vring *vr, struct vf_inflight_header *header, int forget)
{
	struct vf_packed *packed = &vr->packed;
	uint16_t position = (uint16_t)header->last_used_idx;
	uint32_t noted_slot = position & VF_PACKED_SLOT_MASK;
	int passed = forget ? vf_packed_find_used(packed, &position, (uint16_t)header->next_used_idx) : 0;

	if (passed < 0)
		return passed;
	if (header->working) {
		uint32_t distance = (header->working - 1u + packed->size - noted_slot) % packed->size;

		if (distance < (uint32_t)passed)
			vf_log_work(header, 0); /* completed: no request is to blame */
	}
	return vf_packed_start(packed, position);
}

/*
 * Start a mapped ring where a dead worker stopped. state: its start, for a packed ring from which nothing was popped. Returns
 * how many requests of the log to replay, or -enum vf_ring_error.
 */
static inline int vf_takeover(struct vf_vring *vr, struct vf_inflight_header *header, struct vf_inflight_entry *log,
			      uint16_t state, int forget)
{
	int count;

	if (header->state == VF_LOG_VOID) {
		vf_takeover_begin(vr, header, log, state);
		return 0;
	}
	if (!vf_log_is_ours(header, vf_vring_log_format(vr), vr->size, VF_QUEUE_SIZE_MAX))
		return -VF_RING_LOG_FOREIGN;
	count = vr->is_packed ? vf_takeover_packed(vr, header, forget) : vf_takeover_split(vr, header, log, forget);
	if (count >= 0) {
		/* In this order: between the two stores the note is as old as before. */
		vf_log_announce(header, vf_vring_used_state(vr));
		vf_log_note(header, vf_vring_avail_state(vr), vf_vring_used_state(vr));
	}
	return count;
}

/* Reverse the order of the log before it is replayed. */
static inline void vf_seed_disorder(struct vf_inflight_entry *entries, uint32_t count)
{
	uint64_t low = UINT64_MAX, high = 0;

	if (VF_SEED_FAULT != VF_SEED_DISORDER)
		return;
	for (uint32_t i = 0; i < count; i++) {
		uint64_t order = entries[i].order;

		if (order && order < low)
			low = order;
		if (order > high)
			high = order;
	}
	for (uint32_t i = 0; i < count; i++)
		if (entries[i].order)
			entries[i].order = low + (high - entries[i].order);
}

#endif
