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

struct vf_disk_io *vf_disk_put(struct vf_disk_user *user, struct vf_disk_io *io)
{
	if (vf_unlikely(!user->can_put || user->waiting))
		return io;
	const struct vf_plain_queue at = { user->parts, user->pieces, user->client->geometry.slot_count, true };
	const struct vf_memory_hit *hit = &user->hit;
	struct vf_board_queue *queue = at.parts->queue;
	uint64_t most = user->client->geometry.size_max_bytes;
	uint32_t count = 0;

	if (vf_unlikely(!hit->reached || !vf_solo_enter(queue, user->number)))
		return io;
	while (io && vf_likely(!queue->broken)) {
		struct vf_disk_io *next = io->next;
		uint64_t length = io->length_bytes, in_area = (uintptr_t)io->memory - hit->start;
		if (vf_unlikely(in_area >= hit->length || length > hit->length - in_area || length > most))
			break;
		if (vf_unlikely(vf_plain_put(user, &at, io, (uintptr_t)io->memory + hit->delta, hit->generation) != VF_PUT_DONE))
			break;
		io = next;
		count++;
	}
	bool kick = vf_queue_publish(queue);
	vf_solo_leave(queue);
	if (vf_likely(count)) {
		user->requests += count;
		user->inflight[user->home] += count;
		user->busy |= 1ull << user->home;
	}
	if (vf_unlikely(kick))
		vf_user_kick(user, user->home);
	return io;
}

struct vf_disk_io *vf_disk_take(struct vf_disk_user *user, uint32_t max)
{
	struct vf_board_parts *parts = user->parts;
	struct vf_board_queue *queue = parts->queue;

	if (vf_unlikely(!user->can_put || !vf_solo_enter(queue, user->number)))
		return NULL;
	struct vf_drv_vq *vq = &queue->vq;
	struct vf_disk_io *first, **end = &first;
	uint32_t count = 0, slot_count = user->client->geometry.slot_count, free_count = queue->free_count;
	int ready = vf_drv_split_used_count(vq); /* negative: a broken ring, which disk.c reports */
	if ((int64_t)ready < (int64_t)max)
		max = ready < 0 ? 0 : (uint32_t)ready;
	for (; count < max; count++) {
		uint32_t slot;
		int head = vf_drv_split_peek_tagged(vq, &slot);
		if (vf_unlikely(head < 0 || slot >= slot_count || free_count >= slot_count))
			break;
		struct vf_board_slot *s = &parts->slots[slot];
		struct vf_piece *piece = &user->pieces[slot];
		struct vf_disk_io *io = piece->io;
		if (vf_unlikely(!io || s->state != VF_SLOT_INFLIGHT || s->owner != user->number ||
				vf_load_relaxed_u8(vf_board_line(parts, slot) + VF_BOARD_STATUS_AT) != VF_BLK_S_OK))
			break;
		vf_drv_split_take_tagged(vq, (uint16_t)head);
		*end = io;
		end = &io->next;
		piece->io = NULL;
		vf_store_relaxed_u64(&piece->iova, 0);
		vf_store_relaxed_u32(&s->state, VF_SLOT_FREE);
		vf_fence_compiler();
		parts->free_slots[free_count++] = (uint16_t)slot;
		queue->free_count = free_count;
	}
	vf_solo_leave(queue);
	*end = NULL;
	user->requests -= count;
	if ((user->inflight[user->home] -= count) == 0)
		user->busy &= ~(1ull << user->home);
	return first;
}
