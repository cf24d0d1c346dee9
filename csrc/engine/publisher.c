/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "engine/publisher.h"

#include "base/reclaim.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define VF_PUBLISHER_STACK_BYTES (64u << 10)
#define VF_NS_PER_MS 1000000
#define VF_NS_PER_S 1000000000

static int vf_membarrier(int command)
{
	return syscall(SYS_membarrier, command, 0, 0) < 0 ? -errno : 0;
}

/* The last check found the same call. */
static void vf_publisher_serve(struct vf_publisher *publisher)
{
	pthread_mutex_lock(&publisher->lock);
	vf_store_relaxed_u32(&publisher->claimed, 1);
	vf_membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED); /* Barrier E; it cannot fail once it is registered */
	if (vf_peek_acquire_u32(&publisher->call) == VF_CALL_SEEN) {
		vf_store_relaxed_u32(&publisher->slow_ticks, VF_PUBLISHER_SLOW_TICKS);
		if (publisher->publish(publisher->context))
			vf_store_relaxed_u32(&publisher->call, VF_CALL_SERVED);
	}
	vf_store_release_u32(&publisher->claimed, 0); /* pairs with the acquire of vf_call_end() */
	pthread_mutex_unlock(&publisher->lock);
}

static void vf_publisher_look(struct vf_publisher *publisher)
{
	uint32_t slow_ticks = vf_peek_u32(&publisher->slow_ticks);

	vf_store_relaxed_u32(&publisher->tick, publisher->tick + 1u);
	if (slow_ticks)
		vf_store_relaxed_u32(&publisher->slow_ticks, slow_ticks - 1u);
	/* The end of a call, and the beginning of the next, overwrite the mark of the last check. */
	if (vf_peek_acquire_u32(&publisher->call) == VF_CALL_SEEN)
		vf_publisher_serve(publisher);
	else
		vf_exchange_if_u32(&publisher->call, VF_CALL_MADE, VF_CALL_SEEN);
}

/* Sleep until the loop works again. */
static void vf_publisher_rest(struct vf_publisher *publisher)
{
	vf_store_relaxed_u32(&publisher->asleep, 1);
	vf_membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED); /* Barrier E */
	if (!vf_peek_u32(&publisher->busy) && !vf_peek_u32(&publisher->stop))
		while (sem_wait(&publisher->wake) && errno == EINTR)
			;
	vf_store_relaxed_u32(&publisher->asleep, 0);
}

static void vf_publisher_sleep_tick(struct vf_publisher *publisher)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += VF_PUBLISHER_TICK_MS * VF_NS_PER_MS;
	if (until.tv_nsec >= VF_NS_PER_S) {
		until.tv_nsec -= VF_NS_PER_S;
		until.tv_sec++;
	}
	(void)sem_clockwait(&publisher->wake, CLOCK_MONOTONIC, &until); /* an early check does no harm */
}

static void *vf_publisher_run(void *argument)
{
	struct vf_publisher *publisher = argument;
	uint32_t idle_ticks = 0;

	while (!vf_peek_u32(&publisher->stop)) {
		uint32_t call = vf_peek_u32(&publisher->call);

		if (idle_ticks >= VF_PUBLISHER_IDLE_TICKS && (call == VF_CALL_NONE || call == VF_CALL_SERVED)) {
			vf_publisher_rest(publisher);
			idle_ticks = 0;
		}
		vf_publisher_sleep_tick(publisher);
		idle_ticks = vf_peek_u32(&publisher->busy) ? 0 : idle_ticks + 1u;
		vf_store_relaxed_u32(&publisher->busy, 0);
		vf_publisher_look(publisher);
	}
	return NULL;
}

/* Signals go to the loop, except those that this thread's own accesses raise. */
static int vf_publisher_spawn(struct vf_publisher *publisher)
{
	pthread_attr_t attr;
	sigset_t blocked, before;
	int err = pthread_attr_init(&attr);

	if (err)
		return -err;
	sigfillset(&blocked);
	sigdelset(&blocked, SIGBUS);
	sigdelset(&blocked, SIGSEGV);
	sigdelset(&blocked, SIGFPE);
	sigdelset(&blocked, SIGILL);
	sigdelset(&blocked, SIGABRT);
	err = pthread_attr_setstacksize(&attr, VF_PUBLISHER_STACK_BYTES);
	if (!err)
		err = pthread_sigmask(SIG_SETMASK, &blocked, &before);
	if (!err) {
		err = pthread_create(&publisher->thread, &attr, vf_publisher_run, publisher);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	pthread_attr_destroy(&attr);
	return -err;
}

int vf_publisher_start(struct vf_publisher *publisher, vf_publisher_publish *publish, void *context)
{
	int err;

	if (publisher->started)
		return 0;
	err = vf_membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
	if (err)
		return err;
	publisher->publish = publish;
	publisher->context = context;
	publisher->stop = 0;
	pthread_mutex_init(&publisher->lock, NULL);
	sem_init(&publisher->wake, 0, 0);
	err = vf_publisher_spawn(publisher);
	if (err) {
		sem_destroy(&publisher->wake);
		pthread_mutex_destroy(&publisher->lock);
		return err;
	}
	pthread_setname_np(publisher->thread, "publisher");
	vf_memory_lock_stack(publisher->thread);
	publisher->started = 1;
	return 0;
}

void vf_publisher_stop(struct vf_publisher *publisher)
{
	if (!publisher->started)
		return;
	vf_store_relaxed_u32(&publisher->stop, 1);
	sem_post(&publisher->wake);
	pthread_join(publisher->thread, NULL);
	sem_destroy(&publisher->wake);
	pthread_mutex_destroy(&publisher->lock);
	publisher->started = 0;
}

void vf_publisher_wake(struct vf_publisher *publisher)
{
	vf_store_relaxed_u32(&publisher->asleep, 0); /* one post is enough */
	sem_post(&publisher->wake);
}

void vf_publisher_wait(struct vf_publisher *publisher)
{
	pthread_mutex_lock(&publisher->lock);
	pthread_mutex_unlock(&publisher->lock);
}
