/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests are cut into pieces, and put on the queues. A piece whose data the device reaches is sent as it is; another is
 * copied through the buffer of its slot.
 */
#include <errno.h>

#include "preload/user.h"

uint32_t vf_io_choose_way(struct vf_disk_user *user, struct vf_disk_io *io)
{
	const struct iovec *part = io->iov;
	uint64_t delta = 0;

	if (vf_likely(io->iov_count == 1 && !(((uintptr_t)part->iov_base | part->iov_len) % VF_SECTOR_BYTES))) {
		if (!vf_memory_find(user->client, &user->hit, part->iov_base, part->iov_len, &io->iova_delta))
			return VF_IO_COPIED;
		return io->length_bytes <= user->client->geometry.size_max_bytes && !user->cross ? VF_IO_PLAIN : VF_IO_DIRECT;
	}
	for (uint32_t i = 0; i < io->iov_count; i++, part++) {
		if (part->iov_len == 0)
			continue;
		if (((uintptr_t)part->iov_base | part->iov_len) % VF_SECTOR_BYTES ||
		    !vf_memory_find(user->client, &user->hit, part->iov_base, part->iov_len, &delta) ||
		    (i && delta != io->iova_delta))
			return VF_IO_COPIED;
		io->iova_delta = delta;
	}
	return io->iov_count ? VF_IO_DIRECT : VF_IO_COPIED;
}

/* Where the next piece of a request goes. With VF_ROUTE_CROSS every block is read through another queue than wrote it. */
static uint32_t vf_io_route(const struct vf_disk_user *user, const struct vf_disk_io *io)
{
	if (vf_likely(!user->cross) || io->op == VF_DISK_FLUSH)
		return user->home;
	uint64_t at = (io->offset_bytes + io->sent_bytes) >> VF_ROUTE_CROSS_SHIFT;
	return (uint32_t)((at + (io->op == VF_DISK_READ)) % user->client->geometry.queue_count);
}

/* Bytes of the request that may follow on this queue. */
static uint64_t vf_io_left(const struct vf_disk_user *user, const struct vf_disk_io *io)
{
	uint64_t left = io->length_bytes - io->sent_bytes;

	if (vf_likely(!user->cross))
		return left;
	uint64_t border = (1ull << VF_ROUTE_CROSS_SHIFT) -
			  ((io->offset_bytes + io->sent_bytes) & ((1ull << VF_ROUTE_CROSS_SHIFT) - 1u));
	return left < border ? left : border;
}

/* Name direct data of the next piece in `data`: returns the segments, and the bytes in *length. */
static uint32_t vf_io_segments(const struct vf_disk_user *user, const struct vf_disk_io *io, struct vf_drv_segment *data,
			       uint64_t *length)
{
	const struct vf_board_geometry *g = &user->client->geometry;
	uint32_t index = io->iov_index, count = 0, writable = io->op == VF_DISK_READ;
	size_t used = io->iov_used_bytes;
	uint64_t left = vf_io_left(user, io), total = 0;

	while (left && count < g->segments_max && index < io->iov_count) {
		const struct iovec *part = &io->iov[index];
		size_t run = part->iov_len - used;
		if (run > left)
			run = (size_t)left;
		if (run > g->size_max_bytes)
			run = g->size_max_bytes;
		if (run)
			data[count++] = (struct vf_drv_segment){ (uintptr_t)part->iov_base + used + io->iova_delta,
								 (uint32_t)run, writable };
		total += run;
		left -= run;
		used += run;
		if (used == part->iov_len) {
			index++;
			used = 0;
		}
	}
	/* A request is whole blocks: a vector may have smaller parts. */
	uint64_t rest = total % g->block_bytes;
	*length = total - rest;
	while (count && rest) {
		struct vf_drv_segment *last = &data[count - 1u];
		uint32_t cut = last->len_bytes < rest ? last->len_bytes : (uint32_t)rest;
		last->len_bytes -= cut;
		rest -= cut;
		count -= last->len_bytes == 0;
	}
	return count;
}

/* Fill a range for discard and write zeroes; returns the bytes that it covers. */
static uint64_t vf_io_range(const struct vf_disk_user *user, const struct vf_disk_io *io, uint8_t *line)
{
	const struct vf_board_geometry *g = &user->client->geometry;
	uint64_t most = io->op == VF_DISK_DISCARD ? g->discard_max_bytes : g->write_zeroes_max_bytes;
	uint64_t length = vf_io_left(user, io);

	if (length > most)
		length = most;
	*(struct vf_blk_range *)(void *)(line + VF_BOARD_RANGE_AT) = (struct vf_blk_range){
		.sector = (io->offset_bytes + io->sent_bytes) / VF_SECTOR_BYTES,
		.num_sectors = (uint32_t)(length / VF_SECTOR_BYTES),
		.flags = io->op == VF_DISK_WRITE_ZEROES ? VF_BLK_WRITE_ZEROES_F_UNMAP : 0u,
	};
	return length;
}

/* Put the next piece of a request on the queue, whose lock is held. false when there is no room now. */
__attribute__((noinline)) static bool vf_send_piece(struct vf_disk_user *user, uint32_t q, struct vf_disk_io *io)
{
	static const uint32_t types[] = { VF_BLK_T_IN, VF_BLK_T_OUT, VF_BLK_T_FLUSH, VF_BLK_T_DISCARD, VF_BLK_T_WRITE_ZEROES };
	struct vf_client *client = user->client;
	const struct vf_board_geometry *g = &client->geometry;
	struct vf_board_parts *parts = &client->view.parts[q];
	struct vf_board_queue *queue = parts->queue;

	if (vf_unlikely(user->inflight[q] >= vf_queue_quota(&client->view, queue)))
		return false; /* one of its own ends first */
	uint32_t slot = queue->free_count - 1u < g->slot_count ? parts->free_slots[queue->free_count - 1u] : UINT32_MAX;
	if (vf_unlikely(slot >= g->slot_count || queue->vq.free_count == 0)) {
		queue->starved = 1;
		return false;
	}
	struct vf_board_slot *s = &parts->slots[slot];
	struct vf_piece *piece = &client->pieces[q * g->slot_count + slot];
	uint8_t *line = vf_board_line(parts, slot);
	uint32_t count = 0, iov_index = io->iov_index;
	size_t iov_used_bytes = io->iov_used_bytes;
	uint64_t length = 0, iova = 0;

	if (io->way != VF_IO_COPIED) {
		count = vf_io_segments(user, io, s->data, &length);
		iova = count ? s->data[0].iova : 0;
	}
	if (io->op <= VF_DISK_WRITE && !count) {
		uint8_t *bounce = parts->bounce + (uint64_t)slot * vf_board_bounce_stride(g);
		length = vf_io_left(user, io);
		if (length > g->bounce_bytes)
			length = g->bounce_bytes;
		s->data[0] = (struct vf_drv_segment){ (uintptr_t)bounce, (uint32_t)length, io->op == VF_DISK_READ };
		count = 1;
		vf_iov_walk(io, &io->iov_index, &io->iov_used_bytes, io->op == VF_DISK_WRITE ? bounce : NULL, length, true);
	} else if (count) {
		vf_iov_walk(io, &io->iov_index, &io->iov_used_bytes, NULL, length, false);
	} else if (io->op != VF_DISK_FLUSH) {
		length = vf_io_range(user, io, line);
		s->data[0] = (struct vf_drv_segment){ (uintptr_t)line + VF_BOARD_RANGE_AT, sizeof(struct vf_blk_range), 0 };
		count = 1;
	}
	int how = vf_queue_room(&client->view, queue, count);
	*(struct vf_blk_header *)(void *)line = (struct vf_blk_header){
		types[io->op], 0, io->op <= VF_DISK_WRITE ? (io->offset_bytes + io->sent_bytes) / VF_SECTOR_BYTES : 0
	};
	*piece = (struct vf_piece){ io, user, iova, (uint32_t)length, iov_index, iov_used_bytes };
	s->owner = user->number;
	s->segment_count = count;
	vf_store_relaxed_u32(&s->state, VF_SLOT_INFLIGHT);
	vf_fence_compiler();
	queue->free_count--;
	vf_slot_enqueue(&client->view, q, slot, how);
	io->sent_bytes += length;
	io->pieces_left++;
	user->inflight[q]++;
	user->busy |= 1ull << q;
	return true;
}

/* The same for the commonest request. What is not as usual is left to vf_send_piece(). */
static inline bool vf_send_plain(struct vf_disk_user *user, uint32_t q, struct vf_disk_io *io)
{
	struct vf_client *client = user->client;
	const struct vf_board_parts *parts = &client->view.parts[q];
	struct vf_board_queue *queue = parts->queue;
	uint32_t slot_count = client->geometry.slot_count, left = queue->free_count - 1u;

	if (vf_unlikely(left >= slot_count || user->inflight[q] >= vf_queue_quota(&client->view, queue) ||
			queue->vq.free_count < 3u + left))
		return vf_send_piece(user, q, io);
	uint32_t slot = parts->free_slots[left];
	if (vf_unlikely(slot >= slot_count))
		return vf_send_piece(user, q, io);
	struct vf_board_slot *s = &parts->slots[slot];
	struct vf_piece *piece = &client->pieces[q * slot_count + slot];
	uint8_t *line = vf_board_line(parts, slot);
	uint32_t reads = io->op == VF_DISK_READ, length = (uint32_t)io->length_bytes;
	uint64_t iova = (uintptr_t)io->iov->iov_base + io->iova_delta;

	*(struct vf_blk_header *)(void *)line = (struct vf_blk_header){
		reads ? VF_BLK_T_IN : VF_BLK_T_OUT, 0, io->offset_bytes / VF_SECTOR_BYTES
	};
	vf_store_relaxed_u8(line + VF_BOARD_STATUS_AT, VF_BOARD_STATUS_UNSET);
	piece->io = io;
	piece->user = user;
	vf_store_relaxed_u64(&piece->iova, iova);
	s->owner = user->number;
	s->segment_count = 1;
	s->data[0] = (struct vf_drv_segment){ iova, length, reads };
	vf_store_relaxed_u32(&s->state, VF_SLOT_INFLIGHT);
	vf_fence_compiler();
	queue->free_count = left;
	struct vf_drv_three three = {
		.header_iova = (uintptr_t)line,
		.data_iova = iova,
		.status_iova = (uintptr_t)line + VF_BOARD_STATUS_AT,
		.header_bytes = sizeof(struct vf_blk_header),
		.data_bytes = length,
		.data_flags = reads ? VF_DESC_F_WRITE : 0,
	};
	vf_drv_vq_add_three(&queue->vq, &three, slot);
	io->sent_bytes = length;
	io->pieces_left = 1;
	user->inflight[q]++;
	user->busy |= 1ull << q;
	return true;
}

static bool vf_io_is_sent(const struct vf_disk_io *io)
{
	return io->sent_bytes == io->length_bytes && (io->pieces_left || io->length_bytes || io->result < 0);
}

void vf_user_send(struct vf_disk_user *user)
{
	struct vf_client *client = user->client;
	bool room = true;

	while (user->waiting && room) {
		uint32_t q = vf_io_route(user, user->waiting);
		struct vf_board_queue *queue = client->view.parts[q].queue;
		if (vf_unlikely(!vf_user_lock(user, queue)))
			return;
		while (room && user->waiting && vf_io_route(user, user->waiting) == q) {
			struct vf_disk_io *io = user->waiting;
			if (vf_unlikely(queue->broken))
				vf_io_give_up(io, -EIO);
			else
				room = io->way == VF_IO_PLAIN ? vf_send_plain(user, q, io) : vf_send_piece(user, q, io);
			if (vf_io_is_sent(io)) {
				user->waiting = io->next;
				if (!io->next)
					user->waiting_last = NULL;
				if (io->pieces_left == 0)
					vf_user_finish_later(user, io);
			}
		}
		bool kick = vf_queue_publish(queue);
		vf_unlock(queue);
		if (vf_unlikely(kick)) {
			vf_client_refresh(client);
			vf_signal_fd(client->view.kick_fds[q]);
		}
	}
}
