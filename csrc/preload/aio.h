/* SPDX-License-Identifier: Apache-2.0
 *
 * An AIO context of a program (io_context_t of libaio.so.1). It is a user of the disk. Requests to other files in the same
 * context go to a context of the kernel's, made at the first of them.
 */
#ifndef VF_AIO_H
#define VF_AIO_H

#include <linux/aio_abi.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
#include <time.h>

#include "base/barrier.h"
#include "preload/disk.h"
#include "preload/files.h"
#include "preload/forked.h"

/* What a context of the kernel's points to, as the program sees it: QEMU takes its events there, without a call. */
struct vf_aio_ring {
	uint32_t id;
	uint32_t event_count;
	uint32_t head; /* the program's */
	uint32_t tail; /* ours */
	uint32_t magic; /* not the kernel's: fio and libaio then call io_getevents() */
	uint32_t features[2];
	uint32_t header_bytes;
	struct io_event events[];
};

typedef struct vf_aio_ring *io_context_t;

struct vf_aio_request {
	struct vf_disk_io io;
	struct vf_aio *aio;
	uint64_t data;
	uint64_t iocb;
	struct iovec iov;
	struct iovec *vector; /* allocated, of PREADV and PWRITEV; else NULL */
	int64_t written_bytes; /* before the flush of an O_DSYNC write */
	bool flush_after; /* false in a free one, whose io.done is vf_aio_transferred() */
	struct vf_aio_request *next; /* free, or finished */
};

struct vf_aio {
	uint64_t kernel_context; /* 0: none */
	struct vf_disk_user *user; /* NULL before the first request to the disk */
	/* The thread that uses it without the lock; NULL before the first use. Another thread that comes puts VF_AIO_SHARED there,
	 * fences it (base/membarrier.h), and waits until it is not inside. */
	const void *thread;
	uint32_t inside; /* that thread is */
	uint32_t fork_count;
	uint32_t lock; /* of a context that threads share */
	uint32_t block_mask; /* of the disk */
	const uint64_t *capacity_at; /* where the disk's size is; NULL: no request takes the fast way */
	uint32_t submit_count; /* a futex */
	uint32_t request_count;
	uint32_t in_flight;
	uint32_t kernel_in_flight;
	bool is_odd; /* there may be events besides those of the disk's queue */
	bool waits; /* a thread, for submit_count */
	bool must_publish; /* requests that were not sent by vf_disk_put() */
	struct io_event *event, *event_end; /* where a running io_getevents() has room */
	struct vf_aio_request *free;
	struct vf_aio_request *finished, **finished_end;
	struct vf_aio_request *requests;
	size_t map_bytes;
	struct vf_aio_ring ring;
};

/* A request has ended that moved data: what a free one has as io.done. */
void vf_aio_transferred(struct vf_disk_io *io);

/* What io_getevents() does with the requests that the disk has done, and with those that were done at once. */
void vf_aio_finish(struct vf_aio_request *request, int64_t result);

/* The same for a request of which an eventfd tells: its event is in the ring before the eventfd is written. */
void vf_aio_finish_in_ring(struct vf_aio_request *request, int64_t result);
bool vf_aio_ring_is_full(const struct vf_aio *aio);

#define VF_AIO_MAGIC 0x6f696676u
#define VF_AIO_SHARED ((const void *)1)

/* A byte of each thread: its address names the thread. */
extern __thread uint8_t vf_aio_thread __attribute__((tls_model("initial-exec"), visibility("hidden")));

/* The same for a context that is not this thread's, or not yet. NULL when a signal handler uses it, whose thread does. */
struct vf_aio *vf_aio_lock(struct vf_aio *aio);
void vf_aio_unlock(struct vf_aio *aio);

/* The context, to use; NULL when it is none, or another process's from before fork(). */
static inline struct vf_aio *vf_aio_enter(io_context_t ring)
{
	vf_fork_check();
	if (vf_unlikely(!ring || ring->magic != VF_AIO_MAGIC))
		return NULL;
	struct vf_aio *aio = (void *)((uint8_t *)ring - offsetof(struct vf_aio, ring));
	if (vf_unlikely(aio->fork_count != vf_peek_u32(&vf_fork_count)))
		return NULL;
	const void *me = &vf_aio_thread;
	if (vf_likely(vf_peek_pointer(&aio->thread) == me && !vf_peek_u32(&aio->inside))) {
		vf_store_relaxed_u32(&aio->inside, 1);
		vf_fence_compiler(); /* pairs with vf_membarrier() in vf_aio_lock() */
		if (vf_likely(vf_peek_pointer(&aio->thread) == me))
			return aio;
		vf_store_relaxed_u32(&aio->inside, 0);
	}
	return vf_aio_lock(aio);
}

static inline void vf_aio_leave(struct vf_aio *aio)
{
	if (vf_likely(vf_peek_u32(&aio->inside)))
		vf_store_release_u32(&aio->inside, 0);
	else
		vf_aio_unlock(aio);
}

/* Those of libaio.h. They return a negative errno. */
int io_setup(int count, io_context_t *context);
int io_destroy(io_context_t context);
int io_submit(io_context_t context, long count, struct iocb **iocbs);
int io_cancel(io_context_t context, struct iocb *iocb, struct io_event *event);
int io_getevents(io_context_t context, long min, long count, struct io_event *events, struct timespec *timeout);
int io_pgetevents(io_context_t context, long min, long count, struct io_event *events, struct timespec *timeout,
		  void *mask);
int io_queue_init(int count, io_context_t *context);
int io_queue_release(io_context_t context);
int io_queue_run(io_context_t context);
int io_queue_wait(io_context_t context, struct timespec *timeout);

#endif
