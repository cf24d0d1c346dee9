/* SPDX-License-Identifier: Apache-2.0
 *
 * AIO contexts: made, waited on, destroyed.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/membarrier.h"
#include "preload/aio.h"
#include "preload/files.h"
#include "preload/lock.h"
#include "preload/real.h"

#define REQUEST_COUNT_MAX 65536
#define SLICE_NS 200000 /* of a wait with the lock held, where other threads may want the context */

__thread uint8_t vf_aio_thread;

/* Have the thread that has the context to itself take the lock from now on, and wait until it does. The lock is held. */
static void share(struct vf_aio *aio)
{
	vf_store_relaxed_pointer(&aio->thread, VF_AIO_SHARED);
	vf_membarrier(); /* pairs with vf_aio_enter(): it sees the change, or we see that it is inside */
	while (vf_peek_acquire_u32(&aio->inside)) {
		struct timespec moment = { 0, SLICE_NS };

		syscall(SYS_nanosleep, &moment, NULL);
	}
}

struct vf_aio *vf_aio_lock(struct vf_aio *aio)
{
	const void *thread = vf_peek_pointer(&aio->thread);

	if (thread == &vf_aio_thread && vf_peek_u32(&aio->inside)) {
		vf_say("a signal handler uses an AIO context that its thread is using: refused (EINVAL)");
		return NULL;
	}
	vf_lock_take(&aio->lock);
	thread = vf_peek_pointer(&aio->thread);
	if (vf_likely(thread == VF_AIO_SHARED))
		return aio;
	if (!thread && vf_membarrier_join()) {
		vf_store_relaxed_u32(&aio->inside, 1);
		vf_store_release_pointer(&aio->thread, &vf_aio_thread);
		vf_lock_leave(&aio->lock);
		return aio;
	}
	share(aio);
	return aio;
}

void vf_aio_unlock(struct vf_aio *aio)
{
	vf_lock_leave(&aio->lock);
}

static void make_event(struct vf_aio *aio, struct io_event *event, struct vf_aio_request *request, int64_t result)
{
	event->data = request->data;
	event->obj = request->iocb;
	event->res = result;
	event->res2 = 0;
	request->next = aio->free;
	aio->free = request;
}

static uint32_t after(const struct vf_aio *aio, uint32_t index)
{
	return index + 1 == aio->request_count + 1 ? 0 : index + 1;
}

bool vf_aio_ring_is_full(const struct vf_aio *aio)
{
	return after(aio, aio->ring.tail) == vf_load_acquire_u32(&aio->ring.head);
}

void vf_aio_finish_in_ring(struct vf_aio_request *request, int64_t result)
{
	struct vf_aio *aio = request->aio;

	make_event(aio, &aio->ring.events[aio->ring.tail], request, result);
	aio->is_odd = true;
	vf_store_release_u32(&aio->ring.tail, after(aio, aio->ring.tail));
}

void vf_aio_finish(struct vf_aio_request *request, int64_t result)
{
	struct vf_aio *aio = request->aio;

	if (vf_unlikely(request->vector != NULL)) {
		free(request->vector);
		request->vector = NULL;
	}
	if (vf_likely(aio->event != aio->event_end)) {
		make_event(aio, aio->event++, request, result);
		return;
	}
	request->io.result = result;
	request->next = NULL;
	aio->is_odd = true;
	*aio->finished_end = request;
	aio->finished_end = &request->next;
}

VF_EXPORT int io_setup(int count, io_context_t *context)
{
	struct vf_aio *aio;
	size_t map_bytes;
	void *at;

	if (!vf_peek_u32(&vf_wanted))
		return VF_REAL(io_setup)(count, context);
	if (count <= 0 || *context)
		return -EINVAL;
	if (count > REQUEST_COUNT_MAX)
		return -EAGAIN;
	map_bytes = sizeof(*aio) + (size_t)(count + 1) * sizeof(aio->ring.events[0]) + (size_t)count * sizeof(aio->requests[0]);
	at = (void *)syscall(SYS_mmap, NULL, map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		return -ENOMEM;
	aio = at;
	aio->ring.event_count = (uint32_t)count + 1;
	aio->ring.magic = VF_AIO_MAGIC;
	aio->ring.header_bytes = sizeof(aio->ring);
	aio->fork_count = vf_peek_u32(&vf_fork_count);
	aio->request_count = (uint32_t)count;
	aio->finished_end = &aio->finished;
	aio->requests = (void *)&aio->ring.events[count + 1];
	aio->map_bytes = map_bytes;
	for (int i = count; i--;) {
		aio->requests[i].aio = aio;
		aio->requests[i].io.done = vf_aio_transferred;
		aio->requests[i].next = aio->free;
		aio->free = &aio->requests[i];
	}
	*context = &aio->ring;
	return 0;
}

VF_EXPORT int io_destroy(io_context_t context)
{
	struct vf_aio *aio;

	if (!vf_peek_u32(&vf_wanted))
		return VF_REAL(io_destroy)(context);
	aio = vf_aio_enter(context);
	if (!aio)
		return -EINVAL;
	while (aio->in_flight) {
		int result = vf_disk_reap(aio->user, aio->in_flight, aio->in_flight, -1);

		if (result < 0 && result != -EINTR)
			break;
	}
	if (aio->user)
		vf_disk_user_free(aio->user);
	if (aio->kernel_context)
		syscall(SYS_io_destroy, aio->kernel_context);
	aio->ring.magic = 0;
	syscall(SYS_munmap, aio, aio->map_bytes);
	return 0;
}

/* Linux cannot cancel requests to disks, either. */
VF_EXPORT int io_cancel(io_context_t context, struct iocb *iocb, struct io_event *event)
{
	if (!vf_peek_u32(&vf_wanted))
		return VF_REAL(io_cancel)(context, iocb, event);
	return -EINVAL;
}

/* How long to wait once more: -1 for ever. */
static int64_t wait_left_ns(const struct timespec *timeout, uint64_t *deadline_ns)
{
	uint64_t now_ns;

	if (!timeout)
		return -1;
	if (!timeout->tv_sec && !timeout->tv_nsec)
		return 0;
	now_ns = vf_now_ns();
	if (!*deadline_ns) {
		if (timeout->tv_sec > 1000000000)
			return -1;
		*deadline_ns = now_ns + (uint64_t)timeout->tv_sec * 1000000000u + (uint64_t)timeout->tv_nsec;
	}
	return *deadline_ns > now_ns ? (int64_t)(*deadline_ns - now_ns) : 0;
}

static int64_t at_most(int64_t wait_ns, int64_t limit_ns)
{
	return wait_ns < 0 || wait_ns > limit_ns ? limit_ns : wait_ns;
}

static void add_finished(struct vf_aio *aio)
{
	while (aio->finished && aio->event != aio->event_end) {
		struct vf_aio_request *request = aio->finished;

		aio->finished = request->next;
		make_event(aio, aio->event++, request, request->io.result);
	}
	if (!aio->finished)
		aio->finished_end = &aio->finished;
	while (aio->ring.head != aio->ring.tail && aio->event != aio->event_end) {
		*aio->event++ = aio->ring.events[aio->ring.head];
		aio->ring.head = after(aio, aio->ring.head);
	}
}

/* The kernel's events of other files. Returns 0 or a negative errno. */
static int add_kernel_events(struct vf_aio *aio, int64_t wait_ns)
{
	struct timespec timeout = { 0, wait_ns };
	long result = syscall(SYS_io_getevents, aio->kernel_context, wait_ns ? 1L : 0L, aio->event_end - aio->event,
			      aio->event, &timeout);

	if (result < 0)
		return -errno;
	aio->event += result;
	aio->kernel_in_flight -= (uint32_t)result;
	return 0;
}

/* Nothing is in flight: until another thread submits, without the lock. Returns 0 or -EINTR. */
static int wait_for_submit(struct vf_aio *aio, int64_t wait_ns)
{
	struct timespec timeout = { wait_ns / 1000000000, wait_ns % 1000000000 };
	uint32_t seen = aio->submit_count;
	struct io_event *event = aio->event, *event_end = aio->event_end;
	long result;
	int error;

	aio->waits = true;
	aio->event = aio->event_end = NULL;
	vf_aio_leave(aio);
	result = syscall(SYS_futex, &aio->submit_count, FUTEX_WAIT_PRIVATE, seen, wait_ns < 0 ? NULL : &timeout);
	error = errno;
	vf_aio_enter(&aio->ring); /* it is one still */
	aio->event = event;
	aio->event_end = event_end;
	return result < 0 && error == EINTR ? -EINTR : 0;
}

/* One wait, of which any length of time is enough. Returns 0 or a negative errno. */
static int wait_once(struct vf_aio *aio, uint32_t min, int64_t wait_ns)
{
	uint32_t room = (uint32_t)(aio->event_end - aio->event);
	int result;

	if (vf_unlikely(aio->kernel_in_flight)) {
		result = add_kernel_events(aio, aio->in_flight ? 0 : at_most(wait_ns, SLICE_NS));
		if (result < 0 || aio->event == aio->event_end || !aio->in_flight)
			return result;
		room = (uint32_t)(aio->event_end - aio->event);
		wait_ns = at_most(wait_ns, SLICE_NS);
	} else if (vf_unlikely(!aio->in_flight)) {
		return wait_ns ? wait_for_submit(aio, wait_ns) : 0;
	}
	if (vf_unlikely(vf_peek_pointer(&aio->thread) == VF_AIO_SHARED))
		wait_ns = at_most(wait_ns, SLICE_NS);
	result = vf_disk_reap(aio->user, min, room, wait_ns);
	return result < 0 ? result : 0;
}

/* What is finished of the disk's queue. Returns how many events there are. */
static inline long take_events(struct vf_aio *aio, long count, struct io_event *events)
{
	struct io_event *event = events;
	bool flushes = false;

	for (struct vf_disk_io *io = vf_disk_take(aio->user, (uint32_t)count), *next; io; io = next) {
		struct vf_aio_request *request = (struct vf_aio_request *)io;

		next = io->next;
		if (vf_unlikely(request->flush_after)) {
			vf_aio_transferred(io);
			flushes = true;
			continue;
		}
		make_event(aio, event++, request, io->result);
	}
	aio->in_flight -= (uint32_t)(event - events);
	if (vf_unlikely(flushes))
		vf_disk_publish(aio->user);
	return event - events;
}

/* `got` events are there already. */
__attribute__((noinline)) static long get_events(struct vf_aio *aio, long min, long count, struct io_event *events, const struct timespec *timeout, long got)
{
	uint64_t deadline_ns = 0;
	int result;

	aio->event = events + got;
	aio->event_end = events + count;
	if (vf_unlikely(aio->finished || aio->ring.head != aio->ring.tail))
		add_finished(aio);
	do {
		int64_t wait_ns;

		got = aio->event - events;
		wait_ns = got >= min ? 0 : wait_left_ns(timeout, &deadline_ns);
		if (got == count)
			break;
		result = wait_once(aio, got >= min ? 0 : (uint32_t)(min - got), wait_ns);
		got = aio->event - events;
		if (result < 0) {
			if (!got)
				got = result == -EINTR ? -EINTR : -EINVAL;
			break;
		}
		if (!wait_ns)
			break;
		if (vf_unlikely(aio->finished != NULL)) {
			add_finished(aio);
			got = aio->event - events;
		}
	} while (got < min);
	aio->event = aio->event_end = NULL;
	aio->is_odd = aio->finished || aio->ring.head != aio->ring.tail || aio->kernel_in_flight;
	return got;
}

VF_EXPORT int io_getevents(io_context_t context, long min, long count, struct io_event *events, struct timespec *timeout)
{
	struct vf_aio *aio;
	long result = 0;

	if (vf_unlikely(!vf_peek_u32(&vf_wanted)))
		return VF_REAL(io_getevents)(context, min, count, events, timeout);
	aio = vf_aio_enter(context);
	if (vf_unlikely(!aio))
		return -EINVAL;
	if (vf_unlikely((unsigned long)min > (unsigned long)count || (unsigned long)count > INT_MAX)) {
		vf_aio_leave(aio);
		return -EINVAL;
	}
	if (vf_likely(count && !aio->is_odd && aio->in_flight))
		result = take_events(aio, count, events);
	if (vf_unlikely(!result || result < min))
		result = get_events(aio, min, count, events, timeout, result);
	vf_aio_leave(aio);
	return (int)result;
}

VF_EXPORT int io_pgetevents(io_context_t context, long min, long count, struct io_event *events, struct timespec *timeout,
			    void *mask)
{
	sigset_t old;
	int result;

	if (!vf_peek_u32(&vf_wanted))
		return VF_REAL(io_pgetevents)(context, min, count, events, timeout, mask);
	if (mask)
		pthread_sigmask(SIG_SETMASK, mask, &old);
	result = io_getevents(context, min, count, events, timeout);
	if (mask)
		pthread_sigmask(SIG_SETMASK, &old, NULL);
	return result;
}

VF_EXPORT int io_queue_init(int count, io_context_t *context)
{
	if (count <= 0)
		return -EINVAL;
	*context = NULL;
	return io_setup(count, context);
}

VF_EXPORT int io_queue_release(io_context_t context)
{
	return io_destroy(context);
}

typedef void event_handler(io_context_t context, struct iocb *iocb, long result, long result2);

VF_EXPORT int io_queue_run(io_context_t context)
{
	struct timespec at_once = { 0, 0 };
	struct io_event event;
	int result;

	while ((result = io_getevents(context, 0, 1, &event, &at_once)) == 1)
		((event_handler *)(uintptr_t)event.data)(context, (struct iocb *)(uintptr_t)event.obj, event.res, event.res2);
	return result;
}

VF_EXPORT int io_queue_wait(io_context_t context, struct timespec *timeout)
{
	return io_getevents(context, 0, 0, NULL, timeout);
}
