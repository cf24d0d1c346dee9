/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests are cut into pieces, and put on the queues. A piece whose data the device reaches is sent as it is; another is
 * copied through the buffer of its slot.
 */
#include <errno.h>

#include "preload/plain.h"

static uint32_t vf_io_way(struct vf_disk_user *user, struct vf_disk_io *io)
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

void vf_io_choose_way(struct vf_disk_user *user, struct vf_disk_io *io)
{
	/* Memory that changes while we look is looked at again before it is sent. */
	io->generation = vf_peek_acquire_u32(&vf_area_generation);
	io->way = io->op <= VF_DISK_WRITE ? vf_io_way(user, io) : VF_IO_COPIED;
	if (io->way == VF_IO_PLAIN) {
		user->fast.start = user->hit.start;
		user->fast.length = user->hit.length;
		user->fast.delta = user->hit.delta;
		user->fast.generation = user->hit.generation;
	}
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

/* Take a slot of a queue, whose lock is held, for the next piece of a request. UINT32_MAX when there is none now. */
static uint32_t vf_take_slot(struct vf_disk_user *user, uint32_t q)
{
	struct vf_client *client = user->client;
	struct vf_board_parts *parts = &client->view.parts[q];
	struct vf_board_queue *queue = parts->queue;
	uint32_t left = queue->free_count - 1u, slot_count = client->geometry.slot_count;

	if (vf_unlikely(user->inflight[q] >= vf_queue_quota(&client->view, queue)))
		return UINT32_MAX; /* one of its own ends first */
	uint32_t slot = left < slot_count ? parts->free_slots[left] : UINT32_MAX;
	if (vf_unlikely(slot >= slot_count || queue->vq.free_count == 0)) {
		queue->starved = 1;
		return UINT32_MAX;
	}
	parts->slots[slot].owner = user->number;
	vf_store_relaxed_u32(&parts->slots[slot].state, VF_SLOT_TAKEN);
	vf_fence_compiler();
	queue->free_count = left;
	return slot;
}

/* Put a piece on the ring, whose slot is taken and whose data is named in it. */
static void vf_enqueue_piece(struct vf_disk_user *user, uint32_t q, struct vf_disk_io *io, uint32_t slot, uint64_t length, int how)
{
	static const uint32_t types[] = { VF_BLK_T_IN, VF_BLK_T_OUT, VF_BLK_T_FLUSH, VF_BLK_T_DISCARD, VF_BLK_T_WRITE_ZEROES };
	struct vf_board_parts *parts = &user->client->view.parts[q];

	*(struct vf_blk_header *)(void *)vf_board_line(parts, slot) = (struct vf_blk_header){
		types[io->op], 0, io->op <= VF_DISK_WRITE ? (io->offset_bytes + io->sent_bytes) / VF_SECTOR_BYTES : 0
	};
	vf_store_relaxed_u32(&parts->slots[slot].state, VF_SLOT_INFLIGHT);
	vf_fence_compiler();
	vf_slot_enqueue(&user->client->view, q, slot, how);
	io->sent_bytes += length;
	io->pieces_left++;
	user->inflight[q]++;
	user->busy |= 1ull << q;
}

/* Put the next piece of a request on the queue, whose lock is held: as it is, in segments, or without data. */
static enum vf_put vf_send_direct(struct vf_disk_user *user, uint32_t q, struct vf_disk_io *io)
{
	struct vf_client *client = user->client;
	struct vf_board_parts *parts = &client->view.parts[q];
	uint32_t slot = vf_take_slot(user, q), count = 0;

	if (slot == UINT32_MAX)
		return VF_PUT_NO_ROOM;
	struct vf_board_slot *s = &parts->slots[slot];
	struct vf_piece *piece = &client->pieces[q * client->geometry.slot_count + slot];
	uint8_t *line = vf_board_line(parts, slot);
	uint64_t length = 0;
	struct vf_piece one = { io, user, 0, 0, false, io->iov_index, io->iov_used_bytes };

	if (io->op <= VF_DISK_WRITE) {
		count = vf_io_segments(user, io, s->data, &length);
		if (vf_unlikely(!count)) { /* the entries are too small for a whole block in one request */
			io->way = VF_IO_COPIED;
			vf_slot_free(&client->view, parts, slot);
			return VF_PUT_STALE;
		}
		one.iova = s->data[0].iova;
	} else if (io->op != VF_DISK_FLUSH) {
		length = vf_io_range(user, io, line);
		s->data[0] = (struct vf_drv_segment){ (uintptr_t)line + VF_BOARD_RANGE_AT, sizeof(struct vf_blk_range), 0 };
		count = 1;
	}
	one.length_bytes = (uint32_t)length;
	*piece = one;
	if (io->op <= VF_DISK_WRITE && vf_piece_is_stale(client, io->generation)) {
		*piece = (struct vf_piece){ 0 };
		vf_slot_free(&client->view, parts, slot);
		return VF_PUT_STALE;
	}
	s->segment_count = count;
	if (io->op <= VF_DISK_WRITE)
		vf_iov_walk(io, &io->iov_index, &io->iov_used_bytes, NULL, length, false);
	vf_enqueue_piece(user, q, io, slot, length, vf_queue_room(&client->view, parts->queue, count));
	return VF_PUT_DONE;
}

/* The same through the buffer of a slot. Data to write is copied with the lock released: its memory may be none, or slow. *locked
 * says whether the lock is held again. */
static enum vf_put vf_send_copied(struct vf_disk_user *user, uint32_t q, struct vf_disk_io *io, bool *locked)
{
	struct vf_client *client = user->client;
	const struct vf_board_geometry *g = &client->geometry;
	struct vf_board_parts *parts = &client->view.parts[q];
	uint32_t slot = vf_take_slot(user, q), iov_index = io->iov_index;
	size_t iov_used_bytes = io->iov_used_bytes;
	uint64_t length = vf_io_left(user, io);

	if (slot == UINT32_MAX)
		return VF_PUT_NO_ROOM;
	uint8_t *bounce = parts->bounce + (uint64_t)slot * vf_board_bounce_stride(g);
	if (length > g->bounce_bytes)
		length = g->bounce_bytes;
	if (io->op == VF_DISK_WRITE) {
		vf_user_unlock(user, parts->queue);
		vf_iov_walk(io, &iov_index, &iov_used_bytes, bounce, length, true);
		*locked = vf_user_lock(user, parts->queue);
		if (!*locked)
			return VF_PUT_NO_ROOM; /* the server is gone, and needs the slot no more */
	} else {
		vf_iov_walk(io, &iov_index, &iov_used_bytes, NULL, length, false);
	}
	/* Meanwhile others may have used the descriptor that was kept for the slot. */
	int how = vf_queue_room(&client->view, parts->queue, 1);
	if (vf_unlikely(!how || parts->queue->broken)) {
		vf_slot_free(&client->view, parts, slot);
		parts->queue->starved |= !how;
		return VF_PUT_NO_ROOM;
	}
	client->pieces[q * g->slot_count + slot] =
		(struct vf_piece){ io, user, 0, (uint32_t)length, false, io->iov_index, io->iov_used_bytes };
	parts->slots[slot].segment_count = 1;
	parts->slots[slot].data[0] = (struct vf_drv_segment){ (uintptr_t)bounce, (uint32_t)length, io->op == VF_DISK_READ };
	io->iov_index = iov_index;
	io->iov_used_bytes = iov_used_bytes;
	vf_enqueue_piece(user, q, io, slot, length, how);
	return VF_PUT_DONE;
}

/* The commonest request. */
static enum vf_put vf_send_plain(struct vf_disk_user *user, uint32_t q, struct vf_disk_io *io)
{
	struct vf_client *client = user->client;
	const struct vf_board_geometry *g = &client->geometry;
	const struct vf_board_parts *parts = &client->view.parts[q];
	struct vf_board_queue *queue = parts->queue;
	uint32_t left = queue->free_count - 1u;

	/* Each free slot keeps a descriptor for a table. */
	if (vf_unlikely(left >= g->slot_count || user->inflight[q] >= vf_queue_quota(&client->view, queue) ||
			queue->vq.free_count < 3u + left))
		return vf_send_direct(user, q, io);
	uint32_t slot = parts->free_slots[left];
	if (vf_unlikely(slot >= g->slot_count))
		return vf_send_direct(user, q, io);
	struct vf_piece *piece = &client->pieces[q * g->slot_count + slot];
	uint64_t iova = (uintptr_t)io->iov->iov_base + io->iova_delta;
	vf_store_relaxed_u64(&piece->iova, iova);
	if (vf_piece_is_stale(client, io->generation)) {
		vf_store_relaxed_u64(&piece->iova, 0);
		return VF_PUT_STALE;
	}
	uint8_t *line = vf_board_line(parts, slot);
	vf_plain_fill(user, &parts->slots[slot], line, piece, io, iova);
	queue->free_count = left;
	struct vf_drv_three three = vf_plain_three(io, line, iova);
	if (vf_likely(!g->packed && !g->in_order))
		vf_drv_split_add_tagged(&queue->vq, &three, slot);
	else
		vf_drv_vq_add_three(&queue->vq, &three, slot);
	io->sent_bytes = io->length_bytes;
	io->pieces_left = 1;
	user->inflight[q]++;
	user->busy |= 1ull << q;
	return VF_PUT_DONE;
}

static bool vf_io_is_sent(const struct vf_disk_io *io)
{
	return io->sent_bytes == io->length_bytes && (io->pieces_left || io->length_bytes || io->result < 0);
}

/* Send what waits for a queue, whose lock is held. Returns whether it is held still. */
static bool vf_user_send_to(struct vf_disk_user *user, uint32_t q, enum vf_put *put)
{
	struct vf_board_queue *queue = user->client->view.parts[q].queue;
	bool locked = true;

	*put = VF_PUT_DONE;
	while (*put == VF_PUT_DONE && user->waiting && vf_io_route(user, user->waiting) == q) {
		struct vf_disk_io *io = user->waiting;
		if (vf_unlikely(queue->broken))
			vf_io_give_up(io, -EIO);
		else if (vf_likely(io->way == VF_IO_PLAIN))
			*put = vf_send_plain(user, q, io);
		else if (io->way == VF_IO_DIRECT || io->op > VF_DISK_WRITE)
			*put = vf_send_direct(user, q, io);
		else
			*put = vf_send_copied(user, q, io, &locked);
		if (vf_io_is_sent(io)) {
			user->waiting = io->next;
			if (!io->next)
				user->waiting_last = NULL;
			if (io->pieces_left == 0)
				vf_user_finish_later(user, io);
		}
	}
	return locked;
}

void vf_user_send(struct vf_disk_user *user)
{
	enum vf_put put = VF_PUT_DONE;

	while (user->waiting && put != VF_PUT_NO_ROOM) {
		struct vf_disk_io *io = user->waiting;
		uint32_t q = vf_io_route(user, io);
		struct vf_board_queue *queue = user->client->view.parts[q].queue;
		/* What is sent already is in pieces of its own. */
		if (vf_unlikely(put == VF_PUT_STALE && io->way != VF_IO_COPIED))
			vf_io_choose_way(user, io);
		if (vf_unlikely(!vf_user_lock(user, queue) || !vf_user_send_to(user, q, &put)))
			return;
		bool kick = vf_queue_publish(queue);
		vf_user_unlock(user, queue);
		if (vf_unlikely(kick))
			vf_user_kick(user, q);
	}
}
