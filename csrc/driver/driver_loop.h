/* SPDX-License-Identifier: Apache-2.0
 *
 * The driver thread: it owns some vqs and some jobs, keeps every job's requests in flight, and waits for the device by
 * spinning for a while, then by asking for interrupts, checking again and sleeping. Every wait has a limit.
 */
#ifndef VF_DRIVER_LOOP_H
#define VF_DRIVER_LOOP_H

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#include "driver/driver_job.h"
#include "driver/driver_vq.h"

#define VF_DRV_QUEUES_MAX 64u
#define VF_DRV_SLEEP_MS 20 /* then check whether to stop */
#define VF_DRV_SPIN_BURST 64u /* checks between two readings of the clock */
#define VF_DRV_SPIN_FAILS 4u /* in a row, then spinning is given up for a while */
#define VF_DRV_SPIN_PAUSE 64u /* sleeps until it is tried again */
#define VF_DRV_REAP_BATCH 16u /* reaped, refilled, published: the device works on these while we do the next */

enum vf_drv_stop {
	VF_DRV_GO,
	VF_DRV_DRAIN, /* issue nothing more, wait for requests in flight */
	VF_DRV_ABANDON, /* the device is gone: return at once */
};

struct vf_drv_queue {
	struct vf_drv_vq vq;
	uint32_t index;
	int kick_fd; /* borrowed, as irq_fd */
	int irq_fd;
	uint64_t kicks;
	uint64_t irqs;
	uint64_t published; /* chains */
	uint64_t batches; /* publications */
	uint64_t reaped_ns; /* when something was finished last, or first waited for */
	uint64_t gap_max_ns; /* longest wait for something to be finished; another thread may set it back to 0 */
};

struct vf_drv_thread {
	struct vf_drv_queue *queues[VF_DRV_QUEUES_MAX];
	struct vf_drv_job **jobs;
	uint32_t queue_count;
	uint32_t job_count;
	uint32_t stop; /* enum vf_drv_stop; another thread sets it */
	uint32_t spin_fails;
	uint32_t spin_pause;
	uint64_t spin_ns; /* 0: sleep at once, as when the device's worker needs this CPU */
	uint64_t stall_ns; /* no completion for so long with requests in flight: give up */
	/* results */
	uint32_t failed_queue;
	uint64_t sleeps;
	uint64_t spins;
};

static inline uint64_t vf_drv_now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static inline void vf_drv_queue_kick(struct vf_drv_queue *queue)
{
	uint64_t one = 1;
	ssize_t written;
	/* EAGAIN means that the counter is full, so the device has a kick waiting. */
	do
		written = write(queue->kick_fd, &one, sizeof(one));
	while (written < 0 && errno == EINTR);
	queue->kicks++;
}

static inline void vf_drv_queue_publish(struct vf_drv_queue *queue)
{
	uint16_t added = (uint16_t)(queue->vq.avail_idx - queue->vq.published_idx);
	if (!added)
		return;
	queue->published += added;
	queue->batches++;
	if (vf_drv_vq_publish(&queue->vq))
		vf_drv_queue_kick(queue);
}

static inline void vf_drv_queue_note_gap(struct vf_drv_queue *queue, uint64_t now_ns)
{
	if (vf_unlikely(now_ns - queue->reaped_ns > vf_load_relaxed_u64(&queue->gap_max_ns)))
		vf_store_relaxed_u64(&queue->gap_max_ns, now_ns - queue->reaped_ns);
	queue->reaped_ns = now_ns;
}

/* Wait up to `timeout_ms` for an interrupt on any of the queues, unless something is finished already. */
static inline void vf_drv_queues_sleep(struct vf_drv_queue **queues, uint32_t count, int timeout_ms)
{
	struct pollfd fds[VF_DRV_QUEUES_MAX];
	bool ready = false;
	for (uint32_t i = 0; i < count; i++) {
		fds[i] = (struct pollfd){ queues[i]->irq_fd, POLLIN, 0 };
		ready |= vf_drv_vq_enable_irq(&queues[i]->vq);
	}
	if (!ready && poll(fds, count, timeout_ms) > 0)
		for (uint32_t i = 0; i < count; i++) {
			uint64_t value;
			if ((fds[i].revents & POLLIN) && read(fds[i].fd, &value, sizeof(value)) == sizeof(value))
				queues[i]->irqs += 1;
		}
	for (uint32_t i = 0; i < count; i++)
		vf_drv_vq_disable_irq(&queues[i]->vq);
}

static inline bool vf_drv_thread_has_used(const struct vf_drv_thread *t)
{
	for (uint32_t i = 0; i < t->queue_count; i++)
		if (vf_drv_vq_has_used(&t->queues[i]->vq))
			return true;
	return false;
}

/* Returns true when something finished within the time worth spinning. */
static inline bool vf_drv_thread_spin(struct vf_drv_thread *t)
{
	if (t->spin_ns == 0)
		return false;
	if (t->spin_pause) {
		t->spin_pause--;
		return false;
	}
	uint64_t start_ns = vf_drv_now_ns();
	do {
		for (uint32_t i = 0; i < VF_DRV_SPIN_BURST; i++) {
			if (vf_drv_thread_has_used(t)) {
				t->spin_fails = 0;
				t->spins++;
				return true;
			}
			vf_cpu_relax();
		}
	} while (vf_drv_now_ns() - start_ns < t->spin_ns);
	if (++t->spin_fails >= VF_DRV_SPIN_FAILS) {
		t->spin_fails = 0;
		t->spin_pause = VF_DRV_SPIN_PAUSE;
	}
	return false;
}

/* Returns 0 when something finished or the stop flag asks to leave, -ETIMEDOUT when the device is stuck. */
static inline int vf_drv_thread_wait(struct vf_drv_thread *t)
{
	if (vf_drv_thread_spin(t))
		return 0;
	uint64_t start_ns = vf_drv_now_ns();
	while (!vf_drv_thread_has_used(t)) {
		if (vf_load_relaxed_u32(&t->stop) == VF_DRV_ABANDON)
			return 0;
		if (vf_drv_now_ns() - start_ns > t->stall_ns) {
			for (uint32_t i = 0; i < t->queue_count; i++)
				if (vf_drv_vq_inflight(&t->queues[i]->vq))
					t->failed_queue = t->queues[i]->index;
			return -ETIMEDOUT;
		}
		t->sleeps++;
		vf_drv_queues_sleep(t->queues, t->queue_count, VF_DRV_SLEEP_MS);
	}
	return 0;
}

/* Account for a batch of finished requests. First their lines are loaded, which the device has just written: their status
 * will be read, and a new header written. */
static inline void vf_drv_thread_complete(const struct vf_drv_thread *t, const struct vf_drv_used *used, int count,
					  uint64_t now_ns)
{
	for (int k = 0; k < count; k++)
		vf_drv_job_prefetch(t->jobs[used[k].cookie >> 16], used[k].cookie & 0xffffu);
	for (int k = 0; k < count; k++)
		vf_drv_job_complete(t->jobs[used[k].cookie >> 16], used[k].cookie & 0xffffu, used[k].written_bytes, now_ns);
}

/* Reap every queue. `*now_ns` is set at the first finished request: one look at the clock a batch. Returns how many, or
 * -EPROTO when the device broke a ring. */
static inline int vf_drv_thread_reap(struct vf_drv_thread *t, uint64_t *now_ns)
{
	int total = 0;
	for (uint32_t i = 0; i < t->queue_count; i++) {
		struct vf_drv_queue *queue = t->queues[i];
		struct vf_drv_used used[VF_DRV_REAP_BATCH];
		int count = vf_drv_vq_reap(&queue->vq, used, VF_DRV_REAP_BATCH);
		if (count == 0)
			continue;
		if (vf_unlikely(count < 0)) {
			t->failed_queue = queue->index;
			return count;
		}
		if (total == 0)
			*now_ns = vf_drv_now_ns();
		vf_drv_queue_note_gap(queue, *now_ns);
		vf_drv_thread_complete(t, used, count, *now_ns);
		total += count;
	}
	return total;
}

/* Issue requests of a job, spread over the queues in turn, until its depth is reached or no queue has room. */
static inline void vf_drv_thread_fill(struct vf_drv_thread *t, struct vf_drv_job *job, uint64_t now_ns)
{
	uint32_t need = job->indirect ? 1u : job->segment_count;
	uint32_t full = 0;
	while (job->free_count && !job->issue_done && full < t->queue_count) {
		struct vf_drv_vq *vq = &t->queues[job->next_queue]->vq;
		if (vq->free_count < need)
			full++;
		else if (vf_drv_job_submit(job, vq, now_ns))
			full = 0;
		else
			return;
		if (++job->next_queue == t->queue_count)
			job->next_queue = 0;
	}
}

/* Run the jobs to their end. Returns 0; -ECANCELED when abandoned; -EBUSY, -ETIMEDOUT or -EPROTO with
 * failed_queue set. */
static inline int vf_drv_thread_run(struct vf_drv_thread *t)
{
	uint64_t now_ns = vf_drv_now_ns();
	for (uint32_t i = 0; i < t->queue_count; i++) {
		if (vf_drv_vq_inflight(&t->queues[i]->vq)) { /* of a run that failed: their slots are not free */
			t->failed_queue = t->queues[i]->index;
			return -EBUSY;
		}
	}
	for (uint32_t j = 0; j < t->job_count; j++)
		vf_drv_job_start(t->jobs[j], now_ns);
	for (uint32_t i = 0; i < t->queue_count; i++)
		vf_drv_vq_disable_irq(&t->queues[i]->vq);
	for (;;) {
		uint32_t stop = vf_load_relaxed_u32(&t->stop);
		if (vf_unlikely(stop == VF_DRV_ABANDON))
			return -ECANCELED;
		uint32_t running = 0;
		for (uint32_t j = 0; j < t->job_count; j++) {
			struct vf_drv_job *job = t->jobs[j];
			/* Twice at most: the run ends, then its verification starts. */
			vf_drv_job_advance(job, now_ns, stop == VF_DRV_DRAIN);
			vf_drv_thread_fill(t, job, now_ns);
			vf_drv_job_advance(job, now_ns, stop == VF_DRV_DRAIN);
			running += job->phase != VF_PHASE_DONE;
		}
		for (uint32_t i = 0; i < t->queue_count; i++) {
			if (vf_drv_vq_inflight(&t->queues[i]->vq) == 0)
				t->queues[i]->reaped_ns = now_ns;
			vf_drv_queue_publish(t->queues[i]);
		}
		if (!running)
			return 0;
		int reaped = vf_drv_thread_reap(t, &now_ns);
		if (reaped == 0) {
			bool idle = true;
			for (uint32_t j = 0; j < t->job_count; j++)
				idle &= vf_drv_job_inflight(t->jobs[j]) == 0;
			if (idle) {
				now_ns = vf_drv_now_ns();
				continue;
			}
			int rc = vf_drv_thread_wait(t);
			if (rc)
				return rc;
			reaped = vf_drv_thread_reap(t, &now_ns);
		}
		if (vf_unlikely(reaped < 0))
			return reaped;
	}
}

#endif
