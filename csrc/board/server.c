/* SPDX-License-Identifier: Apache-2.0 */
#include <stddef.h>
#include <string.h>

#include "base/membarrier.h"
#include "board/server.h"

#define VF_SERVER_REAP_MAX 64u /* batches of one queue in a call: a busy device must not keep the server */
#define VF_SERVER_SOLO_TRIES 1000u
#define VF_PACKED_FRESH 0x80008000u /* `start` of a new packed ring: slot 0, both wrap counters 1 */

/* Have the only user of a queue need the lock from now on. It may be inside still. */
static void vf_server_end_solo(struct vf_board_queue *queue)
{
	if (vf_load_relaxed_u32(&queue->solo) == 0)
		return;
	vf_store_relaxed_u32(&queue->solo, 0);
	vf_membarrier(); /* pairs with vf_solo_enter(): it sees the change, or we see that it is inside */
}

/* Lock a queue, unless a user works on it. */
static bool vf_server_try(struct vf_board_queue *queue)
{
	if (!vf_lock_try(queue, VF_LOCK_SERVER))
		return false;
	vf_server_end_solo(queue);
	if (vf_load_acquire_u32(&queue->inside) == 0)
		return true;
	vf_unlock(queue);
	return false;
}

/*
 * Writes that go astray: a client may write anything anywhere in the board, at any moment. So each word is read once before it
 * is checked and used, and work on a queue is done in a copy of it that is our own. Its pointers and sizes are not read from
 * the board, and what is written there afterwards repairs them.
 */
struct vf_server_work {
	struct vf_board_view view; /* whose queue is the copy */
	struct vf_board_queue queue;
};

/* All that is changed under the lock. Not the lock, and the words by which users do without. */
static void vf_server_copy(struct vf_board_queue *to, const struct vf_board_queue *from)
{
	to->free_count = from->free_count;
	to->poller = from->poller;
	to->waiting_count = from->waiting_count;
	to->starved = from->starved;
	vf_store_relaxed_u32(&to->broken, from->broken);
	memcpy(&to->vq, &from->vq, sizeof(*to) - offsetof(struct vf_board_queue, vq));
}

/* Begin work on a queue whose lock is ours, with nobody inside. */
static void vf_server_begin(struct vf_server_work *work, const struct vf_board_view *view, uint32_t q)
{
	struct vf_drv_vq *vq = &work->queue.vq;
	const struct vf_drv_vq *made = &view->rings[q];

	work->view = *view;
	vf_server_copy(&work->queue, view->parts[q].queue);
	struct vf_drv_vq found = *vq;
	*vq = *made;
	vq->free_head = found.free_head;
	vq->free_count = found.free_count;
	vq->avail_idx = found.avail_idx;
	vq->published_idx = found.published_idx;
	vq->last_used_idx = found.last_used_idx;
	vq->batch_count = found.batch_count;
	vq->batch_bytes = found.batch_bytes;
	if (made->is_packed) {
		vq->packed.avail_pos = found.packed.avail_pos;
		vq->packed.published_pos = found.packed.published_pos;
		vq->packed.used_pos = found.packed.used_pos;
		vq->packed.first_flags = found.packed.first_flags;
	}
	uint8_t disabled; /* a bool of the board may be neither true nor false */
	memcpy(&disabled, (const uint8_t *)&found + offsetof(struct vf_drv_vq, packed.irq_disabled), 1);
	if (made->is_packed)
		vq->packed.irq_disabled = disabled & 1u;
	work->view.parts[q].queue = &work->queue;
}

static void vf_server_end(struct vf_server_work *work, const struct vf_board_view *view, uint32_t q)
{
	vf_server_copy(view->parts[q].queue, &work->queue);
}

uint64_t vf_server_bytes(const struct vf_board_geometry *geometry, void *address)
{
	struct vf_board_view view;

	if (!vf_board_geometry_good(geometry))
		return 0;
	vf_board_view_init(&view, address, geometry);
	return view.total_bytes;
}

int vf_server_create(struct vf_board_view *view, void *address, const struct vf_board_geometry *geometry)
{
	struct vf_board *board = address;

	if (!vf_board_geometry_good(geometry))
		return -EINVAL;
	vf_board_view_init(view, board, geometry);
	board->magic = VF_BOARD_MAGIC;
	board->address = (uint64_t)(uintptr_t)address;
	board->total_bytes = view->total_bytes;
	board->geometry = *geometry;
	for (uint32_t q = 0; q < geometry->queue_count; q++) {
		struct vf_board_parts *parts = &view->parts[q];
		parts->queue->free_count = geometry->slot_count;
		for (uint32_t i = 0; i < geometry->slot_count; i++)
			parts->free_slots[i] = (uint16_t)(geometry->slot_count - 1u - i);
	}
	return vf_server_start_rings(view);
}

int vf_server_start_rings(struct vf_board_view *view)
{
	const struct vf_board_geometry *g = &view->geometry;

	for (uint32_t q = 0; q < g->queue_count; q++) {
		struct vf_board_parts *parts = &view->parts[q];
		struct vf_drv_vq_params params = {
			.desc = parts->desc,
			.driver = parts->driver,
			.device = parts->device,
			.state = parts->state,
			.size = g->queue_size,
			.start = g->packed ? VF_PACKED_FRESH : 0,
			.packed = g->packed,
			.event_idx = g->event_idx,
			.in_order = g->in_order,
		};
		memset(parts->desc, 0, 16u * g->queue_size);
		memset(parts->driver, 0, 6u + 2u * g->queue_size);
		memset(parts->device, 0, 6u + 8u * g->queue_size);
		/* A user that spins reads the vq without the lock: its pointers must never be NULL. */
		struct vf_drv_vq fresh;
		int rc = vf_drv_vq_init(&fresh, &params);
		if (rc)
			return rc;
		vf_drv_vq_disable_irq(&fresh);
		view->rings[q] = fresh;
		parts->queue->vq = fresh;
	}
	return 0;
}

/* Have a user that is alone on a queue do without the lock. Not while somebody works on the queue, who may be dead. */
static void vf_server_begin_solo(struct vf_board_queue *queue, uint32_t number)
{
	for (uint32_t i = 0; i < VF_SERVER_SOLO_TRIES; i++) {
		if (vf_server_try(queue)) {
			vf_store_release_u32(&queue->solo, number);
			vf_unlock(queue);
			return;
		}
		vf_cpu_relax();
	}
}

/* Users of a queue: its own, or all of them where each uses every queue. One that is alone on its queue works solo. */
static void vf_server_count_users(struct vf_board_view *view)
{
	const struct vf_board_geometry *g = &view->geometry;
	uint32_t counts[VF_BOARD_QUEUES_MAX] = { 0 }, last[VF_BOARD_QUEUES_MAX] = { 0 }, all = 0;

	for (uint32_t u = 1; u <= g->user_max; u++) {
		uint32_t home = vf_load_relaxed_u32(&view->users[u].home_queue);
		if (vf_load_relaxed_u32(&view->users[u].state) == VF_USER_LIVE && home < g->queue_count) {
			counts[home]++;
			last[home] = u;
			all++;
		}
	}
	for (uint32_t q = 0; q < g->queue_count; q++) {
		struct vf_board_queue *queue = view->parts[q].queue;
		uint32_t count = g->route == VF_ROUTE_CROSS ? all : counts[q];
		bool alone = count == 1 && g->route == VF_ROUTE_OWN && view->users[last[q]].joined;
		if (!alone || vf_load_relaxed_u32(&queue->solo) != last[q])
			vf_server_end_solo(queue);
		vf_store_relaxed_u32(&queue->user_count, count);
		if (alone && vf_load_relaxed_u32(&queue->solo) == 0)
			vf_server_begin_solo(queue, last[q]);
	}
}

uint32_t vf_server_new_user(struct vf_board_view *view, bool joined)
{
	const struct vf_board_geometry *g = &view->geometry;
	uint32_t counts[VF_BOARD_QUEUES_MAX] = { 0 }, number = 0, home = 0;

	for (uint32_t u = g->user_max; u; u--) {
		struct vf_board_user *user = &view->users[u];
		uint32_t state = vf_load_relaxed_u32(&user->state), used = vf_load_relaxed_u32(&user->home_queue);
		if (state == VF_USER_FREE)
			number = u;
		else if (state == VF_USER_LIVE && used < g->queue_count)
			counts[used]++;
	}
	if (!number)
		return 0;
	for (uint32_t q = 1; q < g->queue_count; q++)
		if (counts[q] < counts[home])
			home = q;
	struct vf_board_user *user = &view->users[number];
	user->home_queue = home;
	user->joined = joined && vf_membarrier();
	vf_store_relaxed_u32(&user->sleep, VF_AWAKE);
	vf_store_relaxed_u32(&user->marked, 0);
	for (uint32_t q = 0; q < g->queue_count; q++)
		memset(vf_board_marks(view, number, q), 0, view->mark_words * 8u);
	vf_store_release_u32(&user->state, VF_USER_LIVE);
	vf_server_count_users(view);
	return number;
}

uint32_t vf_server_home(const struct vf_board_view *view, uint32_t number)
{
	return number <= view->geometry.user_max ? view->users[number].home_queue : 0;
}

/* Free the slots that no one will come back for. Returns how many are in flight still. */
static uint32_t vf_server_forget(struct vf_board_view *view, uint32_t queue, uint32_t number)
{
	struct vf_board_parts *parts = &view->parts[queue];
	uint32_t left = 0;

	for (uint32_t s = 0; s < view->geometry.slot_count; s++) {
		struct vf_board_slot *slot = &parts->slots[s];
		uint32_t state = vf_load_relaxed_u32(&slot->state);
		if (vf_load_relaxed_u32(&slot->owner) != number)
			continue;
		if (state == VF_SLOT_INFLIGHT)
			left++;
		else if (state != VF_SLOT_FREE)
			vf_slot_free(view, parts, s);
	}
	return left;
}

uint32_t vf_server_end_user(struct vf_board_view *view, uint32_t number)
{
	struct vf_board_user *user = &view->users[number];
	struct vf_server_work work;
	uint32_t left = 0;

	if (number == 0 || number > view->geometry.user_max || user->state == VF_USER_FREE)
		return 0;
	vf_store_relaxed_u32(&user->sleep, VF_AWAKE);
	vf_store_relaxed_u32(&user->state, VF_USER_DEAD);
	for (uint32_t q = 0; q < view->geometry.queue_count; q++) {
		struct vf_board_queue *queue = view->parts[q].queue;
		if (view->geometry.route == VF_ROUTE_OWN && q != user->home_queue)
			continue;
		/* Another dead user may have it: then we come again. */
		if (!vf_server_try(queue)) {
			left++;
			continue;
		}
		vf_server_begin(&work, view, q);
		left += vf_server_forget(&work.view, q, number);
		vf_queue_leave(&work.view, &work.queue, number);
		if (work.queue.starved) {
			work.queue.starved = 0;
			vf_queue_wake_waiting(&work.view, &work.queue, UINT32_MAX);
		}
		vf_server_end(&work, view, q);
		vf_unlock(queue);
	}
	if (left == 0)
		vf_store_release_u32(&user->state, VF_USER_FREE);
	vf_server_count_users(view);
	return left;
}

bool vf_server_holds_lock(const struct vf_board_view *view, uint32_t number)
{
	for (uint32_t q = 0; q < view->geometry.queue_count; q++)
		if ((vf_load_relaxed_u32(&view->parts[q].queue->lock) & ~VF_LOCK_WAITERS) == number ||
		    vf_load_relaxed_u32(&view->parts[q].queue->inside) == number)
			return true;
	return false;
}

void vf_server_reap(struct vf_board_view *view)
{
	for (uint32_t q = 0; q < view->geometry.queue_count; q++) {
		struct vf_board_queue *queue = view->parts[q].queue;
		if (!vf_server_try(queue))
			continue;
		uint32_t reaped = 1, batches = 0;
		struct vf_finished none[VF_REAP_BATCH];
		struct vf_server_work work;
		vf_server_begin(&work, view, q);
		while (!work.queue.broken && batches++ < VF_SERVER_REAP_MAX && (reaped || !vf_queue_settle(&work.queue)))
			vf_queue_reap(&work.view, q, VF_LOCK_SERVER, none, VF_REAP_BATCH, &reaped);
		vf_server_end(&work, view, q);
		vf_unlock(queue);
	}
	vf_server_count_users(view); /* those alone work solo again */
}

uint32_t vf_server_lock(struct vf_board_view *view, uint32_t queue)
{
	struct vf_board_queue *q = view->parts[queue].queue;

	/* The owner may unlock between the two: a free lock is not ours yet. */
	while (!vf_lock_try(q, VF_LOCK_SERVER)) {
		uint32_t held = vf_load_relaxed_u32(&q->lock);
		if ((held & ~VF_LOCK_WAITERS) == VF_LOCK_SERVER)
			break; /* since an earlier call, which found a user inside */
		if (held != VF_LOCK_FREE)
			return held & ~VF_LOCK_WAITERS ? held & ~VF_LOCK_WAITERS : VF_LOCK_WAITERS; /* written over: nobody's */
	}
	vf_server_end_solo(q);
	return vf_load_acquire_u32(&q->inside);
}

bool vf_server_seize(struct vf_board_view *view, uint32_t queue, uint32_t number)
{
	struct vf_board_queue *q = view->parts[queue].queue;
	uint32_t held = vf_load_relaxed_u32(&q->lock);

	/* Clients only add the waiters' bit to it. */
	while ((held & ~VF_LOCK_WAITERS) == number) {
		if (vf_exchange_if_u32(&q->lock, held, VF_LOCK_SERVER | VF_LOCK_WAITERS)) {
			held = VF_LOCK_SERVER;
			break;
		}
		held = vf_load_relaxed_u32(&q->lock);
	}
	if ((held & ~VF_LOCK_WAITERS) != VF_LOCK_SERVER)
		return false;
	vf_server_end_solo(q);
	if (vf_load_relaxed_u32(&q->inside) == number)
		vf_store_relaxed_u32(&q->inside, 0);
	return vf_load_acquire_u32(&q->inside) == 0;
}

void vf_server_hold(struct vf_board_view *view, uint32_t queue, uint32_t number, bool solo)
{
	struct vf_board_queue *q = view->parts[queue].queue;

	if (solo) {
		vf_store_release_u32(&q->inside, number);
		vf_unlock(q);
	} else {
		vf_exchange_u32(&q->lock, number | VF_LOCK_WAITERS);
	}
}

/* Make the list of free slots from the states, mark what is DONE, and put on the ring what is in flight. */
static void vf_server_replay_queue(struct vf_board_view *view, uint32_t queue)
{
	struct vf_board_parts *parts = &view->parts[queue];
	struct vf_board_queue *q = parts->queue;
	const struct vf_board_geometry *g = &view->geometry;

	q->free_count = 0;
	for (uint32_t s = 0; s < g->slot_count; s++) {
		struct vf_board_slot *slot = &parts->slots[s];
		uint32_t owner = vf_load_relaxed_u32(&slot->owner), state = vf_load_relaxed_u32(&slot->state);
		bool lives = owner && owner <= g->user_max && view->users[owner].state == VF_USER_LIVE;
		if (state == VF_SLOT_FREE || state > VF_SLOT_TAKEN || !lives) {
			vf_slot_free(view, parts, s);
		} else if (state == VF_SLOT_DONE) {
			vf_fetch_or_u64(&vf_board_marks(view, owner, queue)[s / 64u], 1ull << s % 64u);
			vf_store_relaxed_u32(&view->users[owner].marked, 1);
		}
	}
	for (uint32_t s = 0; s < g->slot_count; s++) {
		if (vf_load_relaxed_u32(&parts->slots[s].state) != VF_SLOT_INFLIGHT)
			continue;
		uint32_t count = vf_load_relaxed_u32(&parts->slots[s].segment_count);
		if (count > g->segments_max)
			count = g->segments_max;
		vf_slot_enqueue(view, queue, s, vf_queue_room(view, q, count));
		view->board->replayed++;
	}
	vf_drv_vq_publish(&q->vq);
}

int vf_server_replay(struct vf_board_view *view)
{
	int rc = vf_server_start_rings(view);

	if (rc)
		return rc;
	for (uint32_t q = 0; q < view->geometry.queue_count; q++) {
		struct vf_server_work work;
		struct vf_board_queue *queue = &work.queue;
		vf_server_begin(&work, view, q);
		queue->broken = 0;
		queue->starved = 0;
		queue->poller = 0;
		queue->waiting_count = 0;
		for (uint32_t u = 0; u < VF_BOARD_USERS_MAX + 64u; u++) {
			uint64_t bit = 1ull << u % 64u;
			if (!(queue->waiting[u / 64u] & bit))
				continue;
			if (u == 0 || u > view->geometry.user_max || view->users[u].state != VF_USER_LIVE)
				queue->waiting[u / 64u] &= ~bit;
			else
				queue->waiting_count++;
		}
		vf_server_replay_queue(&work.view, q);
		if (queue->waiting_count)
			vf_drv_vq_enable_irq(&queue->vq);
		vf_server_end(&work, view, q);
	}
	view->board->resets++;
	return 0;
}

void vf_server_resume(struct vf_board_view *view)
{
	vf_store_release_u32(&view->board->generation, view->board->generation + 1u);
	for (uint32_t q = 0; q < view->geometry.queue_count; q++) {
		vf_signal_fd(view->kick_fds[q]);
		vf_unlock(view->parts[q].queue);
	}
	for (uint32_t u = 1; u <= view->geometry.user_max; u++)
		if (view->users[u].state == VF_USER_LIVE)
			vf_board_wake(view, u);
	vf_server_count_users(view); /* those alone work solo again */
}

void vf_server_close(struct vf_board_view *view)
{
	vf_store_release_u32(&view->board->closed, 1);
	for (uint32_t u = 1; u <= view->geometry.user_max; u++)
		if (view->users[u].state == VF_USER_LIVE)
			vf_board_wake(view, u);
}
