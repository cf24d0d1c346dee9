/* SPDX-License-Identifier: Apache-2.0
 *
 * What is done to a queue of the board under its lock, by clients and by the server: slots, requests, and finished ones, which
 * go to their owners. See board.h.
 */
#ifndef VF_BOARD_QUEUE_H
#define VF_BOARD_QUEUE_H

#include "board/lock.h"

#define VF_REAP_BATCH 16u

/* A finished request of the user that reaps. */
struct vf_finished {
	uint32_t slot;
	uint32_t status;
};

/* How many slots a user may have in flight on a queue: an equal share, so that nobody starves. */
static inline uint32_t vf_queue_quota(const struct vf_board_view *view, const struct vf_board_queue *queue)
{
	uint32_t users = vf_load_relaxed_u32(&queue->user_count);
	uint32_t quota = users > 1 ? view->geometry.slot_count / users : view->geometry.slot_count;

	return quota ? quota : 1;
}

static inline void vf_slot_free(const struct vf_board_view *view, const struct vf_board_parts *parts, uint32_t slot)
{
	uint32_t *free_count = &parts->queue->free_count, place = vf_load_relaxed_u32(free_count);

	vf_store_relaxed_u32(&parts->slots[slot].state, VF_SLOT_FREE);
	vf_fence_compiler();
	if (vf_likely(place < view->geometry.slot_count)) {
		parts->free_slots[place] = (uint16_t)slot;
		vf_store_relaxed_u32(free_count, place + 1u);
	}
}

/* Whether a request of `count` data segments finds descriptors, and how: 1 direct, 2 through its table, 0 no room now. */
static inline int vf_queue_room(const struct vf_board_view *view, const struct vf_board_queue *queue, uint32_t count)
{
	uint32_t left = queue->vq.free_count;

	/* Each free slot keeps a descriptor for a table. */
	if (vf_likely(view->geometry.indirect ? left >= count + 2u + queue->free_count : left >= count + 2u))
		return count <= 1u || !view->geometry.indirect ? 1 : 2;
	return view->geometry.indirect && left ? 2 : 0;
}

/* Put the request of a slot on the ring: its line and its data segments are complete. `how` is as above. */
static inline void vf_slot_enqueue(struct vf_board_view *view, uint32_t queue_index, uint32_t slot, int how)
{
	struct vf_board_parts *parts = &view->parts[queue_index];
	struct vf_board_slot *s = &parts->slots[slot];
	struct vf_drv_vq *vq = &parts->queue->vq;
	uint8_t *line = vf_board_line(parts, slot);
	uint64_t line_iova = (uintptr_t)line;
	uint32_t count = vf_load_relaxed_u32(&s->segment_count);

	vf_store_relaxed_u8(line + VF_BOARD_STATUS_AT, VF_BOARD_STATUS_UNSET);
	if (vf_likely(how == 1 && count == 1)) {
		struct vf_drv_three three = {
			.header_iova = line_iova,
			.data_iova = s->data[0].iova,
			.status_iova = line_iova + VF_BOARD_STATUS_AT,
			.header_bytes = sizeof(struct vf_blk_header),
			.data_bytes = s->data[0].len_bytes,
			.data_flags = s->data[0].writable ? VF_DESC_F_WRITE : 0,
		};
		vf_drv_vq_add_three(vq, &three, slot);
		return;
	}
	struct vf_drv_segment chain[VF_BOARD_SEGMENTS_MAX + 2u];
	if (count > view->geometry.segments_max)
		count = view->geometry.segments_max; /* a slot that was written over: never from here */
	chain[0] = (struct vf_drv_segment){ line_iova, sizeof(struct vf_blk_header), 0 };
	memcpy(&chain[1], s->data, count * sizeof(*chain));
	chain[count + 1u] = (struct vf_drv_segment){ line_iova + VF_BOARD_STATUS_AT, 1, 1 };
	if (how == 1) {
		vf_drv_vq_add(vq, chain, count + 2u, slot);
	} else {
		uint8_t *table = parts->tables + (uint64_t)slot * vf_board_table_stride(&view->geometry);
		vf_drv_vq_add_indirect(vq, table, (uintptr_t)table, chain, count + 2u, slot);
	}
}

/* Publish what was added; true when the device wants a kick, which the caller sends once it has unlocked. */
static inline bool vf_queue_publish(struct vf_board_queue *queue)
{
	uint16_t added = (uint16_t)(queue->vq.avail_idx - queue->vq.published_idx);

	if (!added)
		return false;
	queue->published += added;
	queue->batches++;
	if (!vf_drv_vq_publish(&queue->vq))
		return false;
	queue->kicks++;
	return true;
}

/* The caller has changed `poller` or `starved`: a user that does not sleep yet looks at them before it does. */
static inline void vf_queue_wake_waiting(struct vf_board_view *view, struct vf_board_queue *queue, uint32_t most)
{
	vf_fence_full(); /* pairs with the exchange of `sleep` in vf_user_wait() */
	for (uint32_t word = 0; word <= view->geometry.user_max / 64u && most; word++)
		for (uint64_t bits = queue->waiting[word]; bits && most; bits &= bits - 1u) {
			uint32_t number = word * 64u + (uint32_t)__builtin_ctzll(bits);
			if (number <= view->geometry.user_max) {
				vf_board_wake(view, number);
				most--;
			}
		}
}

/* Leave a finished request of another user for him. */
static inline void vf_slot_hand_over(struct vf_board_view *view, uint32_t queue_index, uint32_t slot, uint32_t status)
{
	struct vf_board_parts *parts = &view->parts[queue_index];
	struct vf_board_slot *s = &parts->slots[slot];
	uint32_t owner = vf_load_relaxed_u32(&s->owner);

	if (owner == 0 || owner > view->geometry.user_max ||
	    vf_load_relaxed_u32(&view->users[owner].state) != VF_USER_LIVE) {
		vf_slot_free(view, parts, slot);
		return;
	}
	vf_store_relaxed_u32(&s->status, status);
	vf_store_release_u32(&s->state, VF_SLOT_DONE);
	vf_fetch_or_u64(&vf_board_marks(view, owner, queue_index)[slot / 64u], 1ull << slot % 64u);
	vf_store_relaxed_u32(&view->users[owner].marked, 1);
	vf_fence_full();
	vf_board_wake(view, owner);
}

/* Reap up to `max` (VF_REAP_BATCH at most) finished requests: those of `me` are returned, as TAKEN slots, all others go to
 * their owners. Returns how many are in `out`; *reaped is how many were finished in all. A device that breaks the ring sets
 * `broken`. */
static inline uint32_t vf_queue_reap(struct vf_board_view *view, uint32_t queue_index, uint32_t me, struct vf_finished *out,
				     uint32_t max, uint32_t *reaped)
{
	struct vf_board_parts *parts = &view->parts[queue_index];
	struct vf_board_queue *queue = parts->queue;
	struct vf_drv_used used[VF_REAP_BATCH];
	uint32_t mine = 0;
	int count = vf_drv_vq_reap(&queue->vq, used, max < VF_REAP_BATCH ? max : VF_REAP_BATCH);

	*reaped = 0;
	if (vf_unlikely(count < 0)) {
		vf_store_relaxed_u32(&queue->broken, 1);
		return 0;
	}
	*reaped = (uint32_t)count;
	for (int i = 0; i < count; i++) {
		uint32_t slot = used[i].cookie;
		if (vf_unlikely(slot >= view->geometry.slot_count || parts->slots[slot].state != VF_SLOT_INFLIGHT))
			continue; /* written over by a client that went wrong */
		uint32_t status = vf_load_relaxed_u8(vf_board_line(parts, slot) + VF_BOARD_STATUS_AT);
		if (vf_likely(parts->slots[slot].owner == me)) {
			vf_store_relaxed_u32(&parts->slots[slot].state, VF_SLOT_TAKEN);
			out[mine++] = (struct vf_finished){ slot, status };
		} else {
			vf_slot_hand_over(view, queue_index, slot, status);
		}
	}
	if (vf_unlikely(queue->starved && count)) {
		queue->starved = 0;
		vf_queue_wake_waiting(view, queue, UINT32_MAX);
	}
	return mine;
}

/* Make sure that users asleep are woken by what is finished next; false when something is finished already, so that the
 * caller must reap again. */
static inline bool vf_queue_settle(struct vf_board_queue *queue)
{
	return queue->waiting_count == 0 || !vf_drv_vq_enable_irq(&queue->vq);
}

/* `me` begins to wait on the queue. */
static inline void vf_queue_join(struct vf_board_queue *queue, uint32_t me)
{
	queue->waiting[me / 64u] |= 1ull << me % 64u;
	queue->waiting_count++;
	if (queue->poller == 0)
		queue->poller = me;
}

/* `me` waits no more: if nobody polls the interrupt now, another that waits is woken, to do so. */
static inline void vf_queue_leave(struct vf_board_view *view, struct vf_board_queue *queue, uint32_t me)
{
	uint64_t bit = 1ull << me % 64u;

	if (queue->waiting[me / 64u] & bit) {
		queue->waiting[me / 64u] &= ~bit;
		queue->waiting_count--;
	}
	if (queue->poller == me)
		vf_store_relaxed_u32(&queue->poller, 0);
	if (queue->waiting_count == 0)
		vf_drv_vq_disable_irq(&queue->vq);
	else if (queue->poller == 0)
		vf_queue_wake_waiting(view, queue, 1);
}

#endif
