/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests of a program's users: queued, reaped, and finished. send.c puts them on the rings, wait.c waits when there is
 * nothing to reap. board.h has the rules of what is shared.
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
	message.b = client->joined;
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
	const struct vf_board_geometry *g = &client->geometry;
	const struct vf_board_parts *parts = &client->view.parts[user->home];
	bool is_fast = client->joined && g->route == VF_ROUTE_OWN && !g->packed && !g->in_order;
	user->fast = (struct vf_fast){
		.queue = parts->queue,
		.slots = parts->slots,
		.pieces = &client->pieces[user->home * g->slot_count],
		.lines = parts->lines,
		.free_slots = parts->free_slots,
		.solo_number = is_fast ? user->number : UINT32_MAX,
		.slot_count = g->slot_count,
		.most_bytes = g->size_max_bytes,
		.resets = &client->view.board->generation,
	};
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

void vf_user_finish_later(struct vf_disk_user *user, struct vf_disk_io *io)
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
	vf_io_choose_way(user, io);
	if (user->waiting_last)
		user->waiting_last->next = io;
	else
		user->waiting = io;
	user->waiting_last = io;
	return 0;
}

void vf_disk_publish(struct vf_disk_user *user)
{
	if (user->waiting && user->client == vf_client_now())
		vf_user_send(user);
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
	if (!piece->whole && (--io->pieces_left || io->sent_bytes != io->length_bytes))
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

/* The server is gone: end everything with EIO. A broken ring alone is no reason: the device may still be using the memory
 * of requests, until the server has reset it. */
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
	if (vf_unlikely(queue->waiting_count && !queue->broken && !vf_queue_settle(queue)))
		vf_queue_wake_waiting(&client->view, queue, 1);
	uint32_t copied = vf_take_pieces(user, q, finished, count, taken);
	if (count)
		vf_wake_starved(user, queue);
	vf_user_unlock(user, queue);
	int ended = vf_finish_taken(user, q, taken, count);
	if (copied && vf_user_lock(user, queue)) {
		for (uint32_t i = 0; i < count; i++)
			if (taken[i].copied)
				vf_slot_free(&client->view, &client->view.parts[q], taken[i].slot);
		vf_wake_starved(user, queue);
		vf_user_unlock(user, queue);
	}
	return ended;
}

/* Finish requests that were sent by vf_disk_put(). */
static int vf_user_collect_fast(struct vf_disk_user *user, uint32_t max)
{
	int ended = 0;

	for (struct vf_disk_io *io = vf_disk_take(user, max), *next; io; io = next, ended++) {
		next = io->next;
		io->done(io);
	}
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
	if (vf_likely(!marked && !ended))
		ended = vf_user_collect_fast(user, max);
	if (vf_likely(ended))
		return ended;
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
			vf_user_send(user);
		if (vf_unlikely(vf_load_relaxed_u32(&client->gone)))
			count += (uint32_t)vf_user_fail_all(user, max - count);
		else
			count += (uint32_t)vf_user_collect(user, max - count);
		if (count >= max || user->requests == 0)
			break;
		if (count >= min || timeout_ns == 0) {
			if (user->waiting)
				vf_user_send(user); /* what was finished made room */
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
