/* SPDX-License-Identifier: Apache-2.0
 *
 * A second thread of a worker, which publishes while the loop waits in a call for storage that does not answer. Requests
 * that finished before the call, and interrupts that are due, must not wait for it. The loop cannot know beforehand which
 * call will hang, and publishing before each call would slow down storage that answers.
 *
 * So the loop marks each call that may wait, by two plain stores. The thread checks every VF_PUBLISHER_TICK_MS while the
 * loop works, and sleeps otherwise. If two checks find the same call, it claims the queue, publishes and interrupts in the
 * loop's place. If the loop returns meanwhile, it waits until the thread has finished.
 *
 * Barrier E: the loop stores `call` and loads `claimed`, the thread stores `claimed` and loads `call`, and one of the two
 * must see the other's store. Only the thread pays for that, by membarrier(2), which is a full fence in the loop's thread.
 */
#ifndef VF_PUBLISHER_H
#define VF_PUBLISHER_H

#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>

#include "base/barrier.h"

#define VF_PUBLISHER_TICK_MS 4u
#define VF_PUBLISHER_IDLE_TICKS 64u /* without a round of the loop, until the thread sleeps */
#define VF_PUBLISHER_SLOW_TICKS 64u /* after a call that it had to publish in, each request is published by itself */

enum vf_call {
	VF_CALL_NONE,
	VF_CALL_MADE,
	VF_CALL_SEEN, /* at one check of the thread */
	VF_CALL_SERVED, /* its batching is off now */
};

/* Publish finished requests and interrupt the driver. 1: no interrupt is due any more. */
typedef int vf_publisher_publish(void *context);

/* All zeroes to begin with: then there is no thread, and the loop works as with one. */
struct vf_publisher {
	uint32_t call; /* enum vf_call */
	uint32_t claimed; /* the thread owns the queue */
	uint32_t tick; /* checks so far */
	uint32_t slow_ticks; /* so many more ticks the storage counts as slow */
	uint32_t busy; /* the loop has begun a round since the last check */
	uint32_t asleep; /* the thread waits for `wake` without a limit */
	uint32_t stop;
	uint8_t started;
	pthread_t thread;
	pthread_mutex_t lock; /* held while claimed */
	sem_t wake;
	vf_publisher_publish *publish;
	void *context;
};

/* Start the thread. 0 or -errno. A second call does nothing. */
int vf_publisher_start(struct vf_publisher *publisher, vf_publisher_publish *publish, void *context);

/* End it. */
void vf_publisher_stop(struct vf_publisher *publisher);

/* Wake a sleeping thread to check again. */
void vf_publisher_wake(struct vf_publisher *publisher);

/* Wait until the thread releases the queue. */
void vf_publisher_wait(struct vf_publisher *publisher);

/* Around a call that may wait for storage. A publisher of NULL: nothing waits to be published. */
static inline void vf_call_begin(struct vf_publisher *publisher)
{
	if (vf_likely(publisher != NULL))
		vf_store_release_u32(&publisher->call, VF_CALL_MADE);
}

static inline void vf_call_end(struct vf_publisher *publisher)
{
	if (vf_unlikely(publisher == NULL))
		return;
	vf_store_relaxed_u32(&publisher->call, VF_CALL_NONE);
	vf_fence_compiler(); /* Barrier E */
	if (vf_unlikely(vf_peek_acquire_u32(&publisher->claimed)))
		vf_publisher_wait(publisher);
}

/* At the start of a round in which there are requests. */
static inline void vf_publisher_note_round(struct vf_publisher *publisher)
{
	vf_store_relaxed_u32(&publisher->busy, 1);
	vf_fence_compiler(); /* Barrier E, with `asleep` and `busy` in place of `claimed` and `call` */
	if (vf_unlikely(vf_peek_acquire_u32(&publisher->asleep)))
		vf_publisher_wake(publisher);
}

#endif
