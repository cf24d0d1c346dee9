/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests of a program's users: cut into pieces, put on the queues, reaped, and finished. A piece whose data the device
 * reaches is sent as it is; another is copied through the buffer of its slot. wait.c has what happens when there is nothing to
 * reap. board.h has the rules of what is shared.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "preload/user.h"

#define VF_EMPTY_REAPS 4096u /* of a program that never waits: then check whether the server lives */

struct vf_disk_user *vf_disk_user_new(void)
{
	struct vf_client *client = vf_client_get();
	struct vf_attach_message message = { .op = VF_ATTACH_NEW_USER };
	int fds[2];

	if (!client)
		return NULL;
	struct vf_disk_user *user = aligned_alloc(64, (sizeof(*user) + 63u) / 64u * 64u);
	if (!user) {
		errno = ENOMEM;
		return NULL;
	}
	int rc = vf_client_ask(client, &message, -1, fds);
	if (rc == 0 && (message.arg == 0 || message.arg > client->geometry.user_max ||
			message.a >= client->geometry.queue_count))
		rc = -EPROTO;
	if (rc) {
		free(user);
		errno = rc == -EAGAIN ? EAGAIN : ENXIO;
		return NULL;
	}
	memset(user, 0, sizeof(*user));
	user->client = client;
	user->number = message.arg;
	user->home = (uint32_t)message.a;
	user->cross = client->geometry.route == VF_ROUTE_CROSS && client->geometry.queue_count > 1;
	user->shared = &client->view.users[user->number];
	return user;
}

void vf_disk_user_free(struct vf_disk_user *user)
{
	if (!user)
		return;
	if (user->client == vf_client_now()) {
		while (user->requests)
			if (vf_disk_reap(user, 1, UINT32_MAX, -1) == -ESHUTDOWN)
				break;
		struct vf_attach_message message = { .op = VF_ATTACH_END_USER, .arg = user->number };
		vf_client_tell(user->client, &message);
	}
	free(user);
}

/* -- sending */

/* Whether the device reaches all data of the request, and is content with its shape. */
static bool vf_io_is_direct(struct vf_disk_user *user, struct vf_disk_io *io)
{
	uint64_t delta = 0;

	for (uint32_t i = 0; i < io->iov_count; i++) {
		const struct iovec *part = &io->iov[i];
		if (part->iov_len == 0)
			continue;
		if (((uintptr_t)part->iov_base | part->iov_len) % VF_SECTOR_BYTES ||
		    !vf_memory_find(user->client, &user->hit, part->iov_base, part->iov_len, &delta) ||
		    (i && delta != io->iova_delta))
			return false;
		io->iova_delta = delta;
	}
	return io->iov_count != 0;
}

/* Have a request finished by the next reap. */
static void vf_user_finish_later(struct vf_disk_user *user, struct vf_disk_io *io)
{
	io->next = user->ended;
	user->ended = io;
}

int vf_disk_submit(struct vf_disk_user *user, struct vf_disk_io *io)
{
	if (vf_unlikely(user->client != vf_client_now()))
		return -ESHUTDOWN;
	if (vf_unlikely(vf_load_relaxed_u32(&user->client->gone)))
		return -EIO;
	io->sent_bytes = 0;
	io->iov_used_bytes = 0;
	io->iov_index = 0;
	io->pieces_left = 0;
	io->result = (int64_t)io->length_bytes;
	io->next = NULL;
	user->requests++;
	if (vf_unlikely(io->op == VF_DISK_FLUSH ? !user->client->geometry.has_flush : io->length_bytes == 0)) {
		vf_user_finish_later(user, io); /* without FLUSH, writes are durable as they end */
		return 0;
	}
	io->direct = io->op <= VF_DISK_WRITE && vf_io_is_direct(user, io);
	if (user->waiting_last)
		user->waiting_last->next = io;
	else
		user->waiting = io;
	user->waiting_last = io;
	return 0;
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

/* Move the request's place in its vector on by `bytes`. With `copy`, data goes to (write) or from the vector there. */
static void vf_iov_walk(const struct vf_disk_io *io, uint32_t *index, size_t *used, uint8_t *copy, uint64_t bytes, bool to_copy)
{
	while (bytes && *index < io->iov_count) {
		const struct iovec *part = &io->iov[*index];
		size_t run = part->iov_len - *used;
		if (run > bytes)
			run = (size_t)bytes;
		if (copy && to_copy)
			memcpy(copy, (const uint8_t *)part->iov_base + *used, run);
		else if (copy)
			memcpy((uint8_t *)part->iov_base + *used, copy, run);
		copy = copy ? copy + run : NULL;
		bytes -= run;
		*used += run;
		if (*used == part->iov_len) {
			++*index;
			*used = 0;
		}
	}
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

/* Fail what is not sent of a request, so that it ends once its pieces have. */
static void vf_io_give_up(struct vf_disk_io *io, int error)
{
	if (io->result >= 0)
		io->result = error;
	io->sent_bytes = io->length_bytes;
}

/* Put the next piece of a request on the queue, whose lock is held. false when there is no room now. */
static bool vf_send_piece(struct vf_disk_user *user, uint32_t q, struct vf_disk_io *io)
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

	if (vf_likely(io->direct)) {
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

static bool vf_io_is_sent(const struct vf_disk_io *io)
{
	return io->sent_bytes == io->length_bytes && (io->pieces_left || io->length_bytes || io->result < 0);
}

/* Put what waits on the queues, as far as there is room. */
static void vf_send_waiting(struct vf_disk_user *user)
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
				room = vf_send_piece(user, q, io);
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

void vf_disk_publish(struct vf_disk_user *user)
{
	if (user->waiting && user->client == vf_client_now())
		vf_send_waiting(user);
}

/* -- reaping */

/* A piece that has ended, out of the table. */
struct vf_taken {
	struct vf_piece piece;
	uint32_t slot;
	uint32_t status;
	bool copied; /* what was read is in the slot's buffer */
};

/* Account for a piece that has ended. Returns 1 when its request has ended, and was finished. */
static int vf_piece_end(struct vf_disk_user *user, uint32_t q, const struct vf_piece *piece, int error)
{
	struct vf_disk_io *io = piece->io;

	if (--user->inflight[q] == 0)
		user->busy &= ~(1ull << q);
	if (vf_unlikely(error && io->result >= 0))
		io->result = error;
	if (--io->pieces_left || io->sent_bytes != io->length_bytes)
		return 0;
	user->requests--;
	io->done(io);
	return 1;
}

static int vf_status_error(uint32_t status)
{
	if (vf_likely(status == VF_BLK_S_OK))
		return 0;
	return status == VF_BLK_S_UNSUPP ? -EOPNOTSUPP : -EIO;
}

/* Finish pieces that were taken: copy what was read through buffers. */
static int vf_finish_taken(struct vf_disk_user *user, uint32_t q, const struct vf_taken *taken, uint32_t count)
{
	const struct vf_board_geometry *g = &user->client->geometry;
	const struct vf_board_parts *parts = &user->client->view.parts[q];
	int ended = 0;

	for (uint32_t i = 0; i < count; i++) {
		const struct vf_piece *piece = &taken[i].piece;
		int error = vf_status_error(taken[i].status);
		if (vf_unlikely(!piece->io || piece->user != user))
			continue; /* the board was written over */
		if (taken[i].copied && !error) {
			uint32_t index = piece->iov_index;
			size_t used = piece->iov_used_bytes;
			vf_iov_walk(piece->io, &index, &used, parts->bounce + (uint64_t)taken[i].slot * vf_board_bounce_stride(g),
				    piece->length_bytes, false);
		}
		ended += vf_piece_end(user, q, piece, error);
	}
	return ended;
}

/* End pieces of a queue that nobody will finish. */
static int vf_user_fail(struct vf_disk_user *user, uint32_t q, uint32_t max)
{
	struct vf_client *client = user->client;
	int ended = 0;

	for (uint32_t s = 0; s < client->geometry.slot_count && (uint32_t)ended < max; s++) {
		struct vf_piece *piece = &client->pieces[q * client->geometry.slot_count + s];
		if (!piece->io || piece->user != user)
			continue;
		struct vf_piece one = *piece;
		piece->io = NULL;
		vf_store_relaxed_u64(&piece->iova, 0);
		vf_io_give_up(one.io, -EIO);
		ended += vf_piece_end(user, q, &one, -EIO);
	}
	return ended;
}

/* The server is gone, or the device broke a ring: end everything with EIO. */
static int vf_user_fail_all(struct vf_disk_user *user, uint32_t max)
{
	struct vf_disk_io *io = user->waiting;
	int ended = 0;

	/* A request in the list may have pieces in flight, which end it. */
	user->waiting = user->waiting_last = NULL;
	while (io) {
		struct vf_disk_io *next = io->next;
		vf_io_give_up(io, -EIO);
		if (io->pieces_left == 0)
			vf_user_finish_later(user, io);
		io = next;
	}
	while (user->ended && (uint32_t)ended < max) {
		io = user->ended;
		user->ended = io->next;
		user->requests--;
		ended++;
		io->done(io);
	}
	for (uint32_t q = 0; q < user->client->geometry.queue_count && (uint32_t)ended < max; q++)
		if (user->inflight[q])
			ended += vf_user_fail(user, q, max - (uint32_t)ended);
	return ended;
}

/* Take requests of ours that others have reaped. */
static uint32_t vf_take_marked(struct vf_disk_user *user, uint32_t q, struct vf_finished *taken, uint32_t max)
{
	struct vf_client *client = user->client;
	struct vf_board_parts *parts = &client->view.parts[q];
	uint64_t *marks = vf_board_marks(&client->view, user->number, q);
	uint32_t count = 0;

	for (uint32_t word = 0; word < client->view.mark_words; word++) {
		if (!vf_load_relaxed_u64(&marks[word]))
			continue;
		uint64_t bits = vf_exchange_u64(&marks[word], 0), later = 0;
		for (; bits; bits &= bits - 1u) {
			uint32_t slot = word * 64u + (uint32_t)__builtin_ctzll(bits);
			if (slot >= client->geometry.slot_count)
				continue;
			struct vf_board_slot *s = &parts->slots[slot];
			if (vf_load_acquire_u32(&s->state) != VF_SLOT_DONE || s->owner != user->number)
				continue;
			if (count == max) {
				later |= bits & -bits;
				continue;
			}
			vf_store_relaxed_u32(&s->state, VF_SLOT_TAKEN);
			taken[count++] = (struct vf_finished){ slot, s->status };
		}
		if (later) {
			vf_fetch_or_u64(&marks[word], later);
			vf_store_relaxed_u32(&user->shared->marked, 1);
		}
	}
	return count;
}

/* Take the pieces out of the table, which other threads use once the slots are free. Frees the slots that need no copy;
 * returns how many do. */
static uint32_t vf_take_pieces(struct vf_disk_user *user, uint32_t q, const struct vf_finished *finished, uint32_t count,
			       struct vf_taken *taken)
{
	struct vf_client *client = user->client;
	uint32_t copied = 0;

	for (uint32_t i = 0; i < count; i++) {
		struct vf_piece *piece = &client->pieces[q * client->geometry.slot_count + finished[i].slot];
		taken[i] = (struct vf_taken){ *piece, finished[i].slot, finished[i].status, false };
		taken[i].copied = piece->iova == 0 && piece->io && piece->io->op == VF_DISK_READ;
		piece->io = NULL;
		vf_store_relaxed_u64(&piece->iova, 0);
		if (taken[i].copied)
			copied++;
		else
			vf_slot_free(&client->view, &client->view.parts[q], finished[i].slot);
	}
	return copied;
}

static void vf_wake_starved(struct vf_disk_user *user, struct vf_board_queue *queue)
{
	if (vf_unlikely(queue->starved)) {
		queue->starved = 0;
		vf_queue_wake_waiting(&user->client->view, queue, UINT32_MAX);
	}
}

/* Reap one queue; finishes up to max requests. */
static int vf_collect_queue(struct vf_disk_user *user, uint32_t q, uint32_t max, bool marked)
{
	struct vf_client *client = user->client;
	struct vf_board_queue *queue = client->view.parts[q].queue;
	struct vf_finished finished[VF_REAP_BATCH];
	struct vf_taken taken[VF_REAP_BATCH];
	uint32_t count = 0, reaped = 0, most = max < VF_REAP_BATCH ? max : VF_REAP_BATCH;

	if (vf_unlikely(!vf_user_lock(user, queue)))
		return 0;
	if (vf_unlikely(marked))
		count = vf_take_marked(user, q, finished, most);
	if (count < most)
		count += vf_queue_reap(&client->view, q, user->number, finished + count, most - count, &reaped);
	/* Users that sleep must be woken by what comes next: by the interrupt, or else by us. */
	if (vf_unlikely(queue->waiting_count && !vf_queue_settle(queue)))
		vf_queue_wake_waiting(&client->view, queue, 1);
	uint32_t copied = vf_take_pieces(user, q, finished, count, taken);
	if (count)
		vf_wake_starved(user, queue);
	bool broken = queue->broken;
	vf_unlock(queue);
	int ended = vf_finish_taken(user, q, taken, count);
	if (copied && vf_user_lock(user, queue)) {
		for (uint32_t i = 0; i < count; i++)
			if (taken[i].copied)
				vf_slot_free(&client->view, &client->view.parts[q], taken[i].slot);
		vf_wake_starved(user, queue);
		vf_unlock(queue);
	}
	if (vf_unlikely(broken))
		ended += vf_user_fail_all(user, max - (uint32_t)ended);
	return ended;
}

static int vf_user_collect(struct vf_disk_user *user, uint32_t max)
{
	int ended = 0;

	while (vf_unlikely(user->ended) && (uint32_t)ended < max) {
		struct vf_disk_io *io = user->ended;
		user->ended = io->next;
		user->requests--;
		ended++;
		io->done(io);
	}
	bool marked = vf_load_relaxed_u32(&user->shared->marked);
	if (vf_unlikely(marked))
		vf_exchange_u32(&user->shared->marked, 0); /* before the marks are read */
	for (uint64_t busy = user->busy; busy && (uint32_t)ended < max; busy &= busy - 1u)
		ended += vf_collect_queue(user, (uint32_t)__builtin_ctzll(busy), max - (uint32_t)ended, marked);
	if (vf_unlikely(marked && (uint32_t)ended == max))
		vf_store_relaxed_u32(&user->shared->marked, 1); /* some queue may not have been looked at */
	return ended;
}

int vf_disk_reap(struct vf_disk_user *user, uint32_t min, uint32_t max, int64_t timeout_ns)
{
	struct vf_client *client = user->client;
	uint64_t deadline_ns = 0;
	uint32_t count = 0;

	if (vf_unlikely(client != vf_client_now()))
		return -ESHUTDOWN;
	for (;;) {
		if (user->waiting)
			vf_send_waiting(user);
		if (vf_unlikely(vf_load_relaxed_u32(&client->gone)))
			count += (uint32_t)vf_user_fail_all(user, max - count);
		else
			count += (uint32_t)vf_user_collect(user, max - count);
		if (count >= max || user->requests == 0)
			break;
		if (count >= min || timeout_ns == 0) {
			if (user->waiting)
				vf_send_waiting(user); /* what was finished made room */
			if (vf_unlikely(count == 0 && ++client->empty_reaps % VF_EMPTY_REAPS == 0))
				vf_client_is_gone(client);
			break;
		}
		if (timeout_ns > 0) {
			uint64_t now_ns = vf_now_ns();
			if (!deadline_ns)
				deadline_ns = now_ns + (uint64_t)timeout_ns;
			else if (now_ns >= deadline_ns)
				break;
		}
		int rc = vf_user_wait(user, deadline_ns);
		if (vf_unlikely(rc == -EINTR)) {
			if (count)
				break;
			return -EINTR;
		}
	}
	return (int)count;
}
