/* SPDX-License-Identifier: Apache-2.0
 *
 * The fast way for the commonest requests, of a user that is alone on a queue with a split ring. What is not as usual is left to
 * disk.c and send.c. Nothing here blocks, and between vf_solo_enter() and vf_solo_leave() no memory of the program is touched.
 */
#include "preload/plain.h"

void vf_user_kick(struct vf_disk_user *user, uint32_t q)
{
	vf_client_refresh(user->client);
	vf_signal_fd(user->client->view.kick_fds[q]);
}

/* Put the first request on the ring. false: it is left as it is. */
static inline bool vf_put_one(struct vf_disk_user *user, struct vf_disk_io *io)
{
	const struct vf_fast *f = &user->fast;
	struct vf_board_queue *queue = f->queue;
	uint64_t in_area = (uintptr_t)io->memory - f->start, length = io->length_bytes;
	uint32_t left = queue->free_count - 1u;

	if (vf_unlikely(in_area >= f->length || length > f->length - in_area || length > f->most_bytes))
		return false;
	/* Each free slot keeps a descriptor for a table. */
	if (vf_unlikely(left >= f->slot_count || queue->vq.free_count < 3u + left))
		return false;
	uint32_t slot = f->free_slots[left];
	if (vf_unlikely(slot >= f->slot_count))
		return false; /* the board was written over */
	struct vf_piece *piece = &f->pieces[slot];
	uint64_t iova = (uintptr_t)io->memory + f->delta;
	vf_store_relaxed_u64(&piece->iova, iova);
	vf_fence_compiler(); /* as in vf_piece_is_stale() */
	if (vf_unlikely(vf_peek_u32(&vf_area_generation) != f->generation)) {
		vf_store_relaxed_u64(&piece->iova, 0);
		return false;
	}
	uint8_t *line = f->lines + (uint64_t)slot * VF_BOARD_LINE_BYTES;
	vf_plain_fill(user, &f->slots[slot], line, piece, io, iova);
	queue->free_count = left;
	struct vf_drv_three three = vf_plain_three(io, line, iova);
	vf_drv_split_add_tagged(&queue->vq, &three, slot);
	return true;
}

struct vf_disk_io *vf_disk_put(struct vf_disk_user *user, struct vf_disk_io *io)
{
	struct vf_board_queue *queue = user->fast.queue;
	uint32_t count = 0, home;

	if (vf_unlikely(user->waiting || !vf_solo_enter(queue, user->fast.solo_number)))
		return io;
	if (vf_likely(!queue->broken))
		while (io && vf_likely(vf_put_one(user, io))) {
			io = io->next;
			count++;
		}
	if (vf_unlikely(!count)) {
		vf_solo_leave(queue);
		return io;
	}
	queue->published += count;
	queue->batches++;
	bool kick = vf_drv_split_publish(&queue->vq);
	queue->kicks += kick;
	vf_solo_leave(queue);
	home = user->home;
	user->requests += count;
	user->inflight[home] += count;
	user->busy |= 1ull << home;
	if (vf_unlikely(kick))
		vf_user_kick(user, home);
	return io;
}

/* Look how far the device has come. Returns how many chains are finished; 0 for a broken ring, which disk.c reports. */
static inline uint16_t vf_see_used(struct vf_fast *f)
{
	const struct vf_drv_vq *vq = &f->queue->vq;
	int ready = vf_drv_split_used_count(vq);

	f->seen_resets = vf_peek_u32(f->resets);
	f->seen_used_idx = (uint16_t)(vq->last_used_idx + (ready > 0 ? ready : 0));
	return ready > 0 ? (uint16_t)ready : 0;
}

struct vf_disk_io *vf_disk_take(struct vf_disk_user *user, uint32_t max)
{
	const struct vf_fast *f = &user->fast;
	struct vf_board_queue *queue = f->queue;

	if (vf_unlikely(!vf_solo_enter(queue, f->solo_number)))
		return NULL;
	struct vf_drv_vq *vq = &queue->vq;
	struct vf_disk_io *first, **end = &first;
	uint32_t count = 0, most = f->slot_count - queue->free_count; /* in flight */
	uint16_t ready = (uint16_t)(f->seen_used_idx - vq->last_used_idx);
	if (ready == 0 || vf_unlikely(ready > vf_drv_vq_inflight(vq) || f->seen_resets != vf_peek_u32(f->resets)))
		ready = vf_see_used(&user->fast);
	if (vf_unlikely(ready == 0 || most > f->slot_count)) {
		vf_solo_leave(queue); /* nothing, or what disk.c reports */
		return NULL;
	}
	if (vf_likely(max < most))
		most = max;
	if (most > ready)
		most = ready;
	for (; count < most; count++) {
		uint32_t slot;
		int head = vf_drv_split_peek_tagged(vq, &slot);
		if (vf_unlikely(head < 0 || slot >= f->slot_count))
			break;
		struct vf_board_slot *s = &f->slots[slot];
		struct vf_piece *piece = &f->pieces[slot];
		struct vf_disk_io *io = piece->io;
		if (vf_unlikely(!io || s->state != VF_SLOT_INFLIGHT || s->owner != f->solo_number ||
				vf_load_relaxed_u8(f->lines + (uint64_t)slot * VF_BOARD_LINE_BYTES + VF_BOARD_STATUS_AT) !=
					VF_BLK_S_OK))
			break;
		vf_drv_split_take_tagged(vq, (uint16_t)head);
		*end = io;
		end = &io->next;
		piece->io = NULL;
		vf_store_relaxed_u64(&piece->iova, 0);
		vf_store_relaxed_u32(&s->state, VF_SLOT_FREE);
		vf_fence_compiler();
		f->free_slots[queue->free_count++] = (uint16_t)slot;
	}
	vf_solo_leave(queue);
	*end = NULL;
	user->requests -= count;
	if ((user->inflight[user->home] -= count) == 0)
		user->busy &= ~(1ull << user->home);
	return first;
}
