/* SPDX-License-Identifier: Apache-2.0
 *
 * The lock of a queue, which names its owner, how a user does without it, and how users of the board are woken. See board.h.
 */
#ifndef VF_BOARD_LOCK_H
#define VF_BOARD_LOCK_H

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/barrier.h"
#include "board/board.h"

#define VF_LOCK_SPINS 100u
#define VF_BOARD_SLEEP_NS 100000000 /* then check whether the server lives, and whether something was missed */

/* Sleep while *word is `value`, for `timeout_ns` at most. 0 or -errno. No cancellation point, as every wait here. */
static inline int vf_futex_wait(uint32_t *word, uint32_t value, int64_t timeout_ns)
{
	struct timespec timeout = { timeout_ns / 1000000000, timeout_ns % 1000000000 };

	return syscall(SYS_futex, word, FUTEX_WAIT, value, &timeout, NULL, 0) < 0 ? -errno : 0;
}

static inline void vf_futex_wake(uint32_t *word, int count)
{
	syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

static inline bool vf_lock_try(struct vf_board_queue *queue, uint32_t me)
{
	return vf_exchange_if_u32(&queue->lock, VF_LOCK_FREE, me);
}

/* Take the lock when somebody has it. false when `gone` says that the server is. */
static inline bool vf_lock_wait(struct vf_board_queue *queue, uint32_t me, bool (*gone)(void *context), void *context)
{
	for (uint32_t i = 0; i < VF_LOCK_SPINS; i++) {
		if (vf_load_relaxed_u32(&queue->lock) == VF_LOCK_FREE && vf_lock_try(queue, me))
			return true;
		vf_cpu_relax();
	}
	for (;;) {
		uint32_t held = vf_load_relaxed_u32(&queue->lock);
		if (held == VF_LOCK_FREE) {
			/* Others may sleep: have the unlock wake one. */
			if (vf_exchange_if_u32(&queue->lock, VF_LOCK_FREE, me | VF_LOCK_WAITERS)) {
				queue->locks_contended++;
				return true;
			}
			continue;
		}
		if (!(held & VF_LOCK_WAITERS) && !vf_exchange_if_u32(&queue->lock, held, held | VF_LOCK_WAITERS))
			continue;
		vf_futex_wait(&queue->lock, held | VF_LOCK_WAITERS, VF_BOARD_SLEEP_NS);
		if (gone(context))
			return false;
	}
}

static inline void vf_unlock(struct vf_board_queue *queue)
{
	if (vf_unlikely(vf_exchange_u32(&queue->lock, VF_LOCK_FREE) & VF_LOCK_WAITERS))
		vf_futex_wake(&queue->lock, 1);
}

/* Begin to work on a queue without its lock, which its only user may. false: it needs the lock. */
static inline bool vf_solo_enter(struct vf_board_queue *queue, uint32_t me)
{
	if (vf_unlikely(vf_load_relaxed_u32(&queue->solo) != me))
		return false;
	vf_store_relaxed_u32(&queue->inside, me);
	vf_fence_compiler(); /* pairs with the vf_membarrier() of the server after it changed `solo` */
	if (vf_likely(vf_load_acquire_u32(&queue->solo) == me)) /* and sees what the server did before it gave us the queue */
		return true;
	vf_store_relaxed_u32(&queue->inside, 0);
	return false;
}

static inline void vf_solo_leave(struct vf_board_queue *queue)
{
	vf_store_release_u32(&queue->inside, 0);
}

/* Begin to work on a queue, if nobody else does. */
static inline bool vf_queue_try(struct vf_board_queue *queue, uint32_t me)
{
	if (vf_likely(vf_solo_enter(queue, me)))
		return true;
	if (!vf_lock_try(queue, me))
		return false;
	if (vf_likely(vf_load_acquire_u32(&queue->inside) == 0))
		return true;
	vf_unlock(queue);
	return false;
}

/* Begin to work on a queue. false when `gone` says that the server is. */
static inline bool vf_queue_lock(struct vf_board_queue *queue, uint32_t me, bool (*gone)(void *context), void *context)
{
	if (vf_likely(vf_queue_try(queue, me)))
		return true;
	for (;;) {
		if (!vf_lock_wait(queue, me, gone, context))
			return false;
		if (vf_likely(vf_load_acquire_u32(&queue->inside) == 0))
			return true;
		/* The user that was alone leaves at once, or has been killed: the server needs the lock then. */
		vf_unlock(queue);
		syscall(SYS_sched_yield);
		if (gone(context))
			return false;
	}
}

static inline void vf_queue_unlock(struct vf_board_queue *queue, uint32_t me)
{
	if (vf_likely(vf_load_relaxed_u32(&queue->inside) == me))
		vf_solo_leave(queue);
	else
		vf_unlock(queue);
}

/* Signal an eventfd; EAGAIN means that its counter is full, so its reader is woken anyway. */
static inline void vf_signal_fd(int fd)
{
	uint64_t one = 1;

	while (syscall(SYS_write, fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

/* Wake a user, if it sleeps. */
static inline void vf_board_wake(const struct vf_board_view *view, uint32_t number)
{
	struct vf_board_user *user = &view->users[number];

	if (vf_load_relaxed_u32(&user->sleep) == VF_AWAKE)
		return;
	uint32_t how = vf_exchange_u32(&user->sleep, VF_AWAKE);
	if (how == VF_SLEEP_FUTEX)
		vf_futex_wake(&user->sleep, 1);
	else if (how >= VF_SLEEP_POLL && how - VF_SLEEP_POLL < view->geometry.queue_count)
		vf_signal_fd(view->irq_fds[how - VF_SLEEP_POLL]);
}

#endif
