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

#include "preload/disk.h"

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
	bool flush_after;
	struct vf_aio_request *next; /* free, or finished */
};

struct vf_aio {
	uint64_t kernel_context; /* 0: none */
	struct vf_disk_user *user; /* NULL before the first request to the disk */
	const void *thread; /* the first that used it */
	uint32_t fork_count;
	uint32_t lock;
	uint32_t submit_count; /* a futex */
	uint32_t request_count;
	uint32_t in_flight;
	uint32_t kernel_in_flight;
	uint32_t is_shared; /* by several threads */
	bool waits; /* a thread, for submit_count */
	struct io_event *event, *event_end; /* where a running io_getevents() has room */
	struct vf_aio_request *free;
	struct vf_aio_request *finished, **finished_end;
	struct vf_aio_request *requests;
	size_t map_bytes;
	struct vf_aio_ring ring;
};

/* What io_getevents() does with the requests that the disk has done, and with those that were done at once. */
void vf_aio_finish(struct vf_aio_request *request, int64_t result);

/* The same for a request of which an eventfd tells: its event is in the ring before the eventfd is written. */
void vf_aio_finish_in_ring(struct vf_aio_request *request, int64_t result);
bool vf_aio_ring_is_full(const struct vf_aio *aio);

/* The context, locked; NULL when it is none, or another process's from before fork(). */
struct vf_aio *vf_aio_lock(io_context_t context);

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
