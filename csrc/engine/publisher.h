/* SPDX-License-Identifier: Apache-2.0
 *
 * A second thread of a worker, for the time in which the loop waits in a call for storage that does not answer. What was
 * finished before that call, and what the driver is owed an interrupt for, cannot wait for it. The loop cannot know
 * beforehand which call will hang, and to publish before each of them would cost the storage that answers.
 *
 * So the loop marks each call that may wait, by two plain stores. The thread looks every VF_PUBLISHER_TICK_MS while the loop
 * is at work, and sleeps otherwise. When it finds the same call at two looks, it claims the queue, publishes and interrupts,
 * as the loop would. A loop that comes back meanwhile waits until the thread has done so.
 *
 * Barrier E: the loop stores `call` and loads `claimed`, the thread stores `claimed` and loads `call`, and one of the two has
 * to see the other's store. The thread alone pays for that: by membarrier(2), which is a full fence in the loop's thread.
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
	VF_CALL_SEEN, /* at one look of the thread */
	VF_CALL_SERVED, /* nothing is held back in it any more */
};

/* Publish what is finished and interrupt the driver. 1: nothing is owed any more. */
typedef int vf_publisher_publish(void *context);

/* All zeroes to begin with: then there is no thread, and the loop works as with one. */
struct vf_publisher {
	uint32_t call; /* enum vf_call */
	uint32_t claimed; /* the queue is the thread's */
	uint32_t tick; /* looks so far */
	uint32_t slow_ticks; /* so many more ticks the storage counts as slow */
	uint32_t busy; /* the loop has begun a round since the last look */
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

/* Have a thread that sleeps look again. */
void vf_publisher_wake(struct vf_publisher *publisher);

/* Wait until the thread gives the queue back. */
void vf_publisher_wait(struct vf_publisher *publisher);

/* Around a call that may wait for storage. A publisher of NULL: nobody holds anything back. */
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
