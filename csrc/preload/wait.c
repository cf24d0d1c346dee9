/* SPDX-License-Identifier: Apache-2.0
 *
 * How a user waits for its requests: it spins for a while, where a CPU is to spare, then sleeps. See "Sleep" in board.h.
 */
#include <errno.h>
#include <poll.h>

#include "preload/user.h"

#define VF_SPIN_BURST 64u /* checks between two readings of the clock */
#define VF_SPIN_FAILS 4u /* in a row, then spinning is given up for a while */
#define VF_SPIN_PAUSE 64u /* waits until it is tried again */

/* Whether a queue has something finished. One that others use is looked at under its lock. */
static bool vf_queue_ready(struct vf_disk_user *user, struct vf_board_queue *queue)
{
	if (vf_unlikely(vf_load_relaxed_u32(&queue->broken)))
		return false; /* until the server has reset the device */
	if (vf_load_relaxed_u32(&queue->user_count) == 1)
		return vf_drv_vq_has_used(&queue->vq);
	if (vf_load_relaxed_u32(&queue->lock) != VF_LOCK_FREE || !vf_queue_try(queue, user->number))
		return false;
	bool ready = vf_drv_vq_has_used(&queue->vq);
	vf_user_unlock(user, queue);
	return ready;
}

static bool vf_user_ready(struct vf_disk_user *user)
{
	if (vf_load_relaxed_u32(&user->shared->marked))
		return true;
	for (uint64_t busy = user->busy; busy; busy &= busy - 1u)
		if (vf_queue_ready(user, user->client->view.parts[__builtin_ctzll(busy)].queue))
			return true;
	return false;
}

static bool vf_user_spin(struct vf_disk_user *user, uint64_t deadline_ns)
{
	uint64_t spin_ns = user->client->spin_ns;

	if (spin_ns == 0 || !user->busy)
		return false;
	if (user->spin_pause) {
		user->spin_pause--;
		return false;
	}
	uint64_t end_ns = vf_now_ns() + spin_ns;
	if (deadline_ns && end_ns > deadline_ns)
		end_ns = deadline_ns;
	do {
		for (uint32_t i = 0; i < VF_SPIN_BURST; i++) {
			if (vf_user_ready(user)) {
				user->spin_fails = 0;
				return true;
			}
			vf_cpu_relax();
		}
	} while (vf_now_ns() < end_ns);
	if (++user->spin_fails >= VF_SPIN_FAILS) {
		user->spin_fails = 0;
		user->spin_pause = VF_SPIN_PAUSE;
	}
	return false;
}

/* Sleep on the eventfds of `polled` queues, and on the socket, whose end is that of the server. Sets a bit for each queue
 * that interrupted. */
static int vf_user_poll(struct vf_disk_user *user, uint64_t polled, int64_t timeout_ns, uint64_t *interrupted)
{
	struct vf_client *client = user->client;
	struct pollfd fds[VF_BOARD_QUEUES_MAX + 1u];
	struct timespec timeout = { timeout_ns / 1000000000, timeout_ns % 1000000000 };
	uint32_t count = 0;

	fds[count++] = (struct pollfd){ client->socket, 0, 0 };
	for (uint64_t bits = polled; bits; bits &= bits - 1u)
		fds[count++] = (struct pollfd){ client->view.irq_fds[__builtin_ctzll(bits)], POLLIN, 0 };
	long ready = syscall(SYS_ppoll, fds, (unsigned long)count, &timeout, NULL, 0);
	if (ready < 0)
		return -errno;
	for (uint32_t i = 1; i < count && ready; i++, polled &= polled - 1u) {
		uint64_t value;
		if ((fds[i].revents & POLLIN) && syscall(SYS_read, fds[i].fd, &value, sizeof(value)) == sizeof(value))
			*interrupted |= polled & -polled;
	}
	if (ready && fds[0].revents)
		vf_client_is_gone(client);
	return 0;
}

/* Whether a wake-up came before we could be seen to sleep: nobody polls a queue any more, or there is room now. */
static bool vf_user_is_missed(const struct vf_disk_user *user, uint64_t joined)
{
	for (; joined; joined &= joined - 1u) {
		const struct vf_board_queue *queue = user->client->view.parts[__builtin_ctzll(joined)].queue;
		if (vf_load_relaxed_u32(&queue->poller) == 0)
			return true;
		if (user->waiting && !user->busy && !vf_load_relaxed_u32(&queue->starved))
			return true;
	}
	return false;
}

int vf_user_wait(struct vf_disk_user *user, uint64_t deadline_ns)
{
	struct vf_client *client = user->client;
	uint64_t joined = user->busy, polled = 0, interrupted = 0;
	int64_t timeout_ns = VF_BOARD_SLEEP_NS;
	bool ready = vf_user_spin(user, deadline_ns);
	int rc = 0;

	if (ready)
		return 0;
	if (!joined) /* a request waits for room, and others have it all */
		joined = user->cross ? UINT64_MAX >> (64u - client->geometry.queue_count) : 1ull << user->home;
	for (uint64_t bits = joined; bits; bits &= bits - 1u) {
		uint32_t q = (uint32_t)__builtin_ctzll(bits);
		struct vf_board_queue *queue = client->view.parts[q].queue;
		if (!vf_user_lock(user, queue)) {
			joined &= ~bits;
			break;
		}
		vf_queue_join(queue, user->number);
		ready |= !queue->broken && vf_drv_vq_enable_irq(&queue->vq);
		if (user->waiting && !user->busy && queue->free_count)
			ready = true;
		else if (user->waiting && !user->busy)
			queue->starved = 1;
		if (queue->poller == user->number)
			polled |= 1ull << q;
		vf_user_unlock(user, queue);
	}
	if (deadline_ns) {
		uint64_t now_ns = vf_now_ns();
		int64_t left_ns = now_ns < deadline_ns ? (int64_t)(deadline_ns - now_ns) : 0;
		timeout_ns = left_ns < timeout_ns ? left_ns : timeout_ns;
	}
	uint32_t how = polled ? VF_SLEEP_POLL + (uint32_t)__builtin_ctzll(polled) : VF_SLEEP_FUTEX;
	/* A full fence: a user that marks, stops polling, or makes room sees it, or we see its change. */
	vf_exchange_u32(&user->shared->sleep, how);
	ready |= vf_user_is_missed(user, joined);
	if (!ready && joined && !vf_load_relaxed_u32(&user->shared->marked)) {
		if (polled)
			rc = vf_user_poll(user, polled, timeout_ns, &interrupted);
		else
			rc = vf_futex_wait(&user->shared->sleep, VF_SLEEP_FUTEX, timeout_ns);
		if (rc == -ETIMEDOUT)
			vf_client_is_gone(client);
	}
	vf_exchange_u32(&user->shared->sleep, VF_AWAKE);
	for (uint64_t bits = joined; bits; bits &= bits - 1u) {
		struct vf_board_queue *queue = client->view.parts[__builtin_ctzll(bits)].queue;
		if (!vf_user_lock(user, queue))
			break;
		queue->irqs += (interrupted & bits & -bits) != 0;
		vf_queue_leave(&client->view, queue, user->number);
		vf_user_unlock(user, queue);
	}
	return rc == -EINTR ? -EINTR : 0;
}
