/* SPDX-License-Identifier: Apache-2.0
 *
 * The io_uring engine: a batch is one system call, completions come in any order.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "barrier.h"

#define VF_URING_RETRY_MAX 8u
#define VF_REAP_MAX 64u
/* What is prepared goes to the kernel once it is this part of all that is in flight: an idle device starts on the first
 * request at once, a busy one gets many by one system call. */
#define VF_URING_SHARE 4u

struct vf_uring {
	struct io_uring ring;
	int event_fd; /* owned: a ring whose work is deferred to its issuer does not make its own descriptor readable */
	uint8_t fixed_file;
};

/* The best set of flags that this kernel knows: one issuer, completions when we look (6.1); else the plain ring. */
static int vf_uring_init_ring(struct io_uring *ring, uint32_t entries)
{
	static const unsigned int flags[] = {
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		0,
	};
	int err = -EINVAL;

	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]) && err == -EINVAL; i++) {
		struct io_uring_params params = { .flags = flags[i] };

		err = io_uring_queue_init_params(entries, ring, &params);
	}
	return err;
}

static int vf_uring_open(struct vf_engine *engine, uint32_t slot_count)
{
	struct vf_uring *uring = calloc(1, sizeof(*uring));
	int err;

	if (!uring)
		return -ENOMEM;
	err = vf_uring_init_ring(&uring->ring, slot_count);
	if (err) {
		free(uring);
		return err;
	}
	uring->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	err = uring->event_fd < 0 ? -errno : io_uring_register_eventfd(&uring->ring, uring->event_fd);
	if (!err)
		err = io_uring_cq_eventfd_toggle(&uring->ring, false);
	if (err) {
		if (uring->event_fd >= 0)
			close(uring->event_fd);
		io_uring_queue_exit(&uring->ring);
		free(uring);
		return err;
	}
	/* A registered file saves a reference count per request; without it everything works the same. */
	uring->fixed_file = io_uring_register_files(&uring->ring, &engine->store.fd, 1) == 0;
	engine->state = uring;
	engine->poll_fd = uring->event_fd;
	return 0;
}

static int vf_uring_zero_mode(const struct vf_req *req)
{
	int how = req->unmap || req->op == VF_OP_DISCARD ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;

	return how | FALLOC_FL_KEEP_SIZE;
}

/* Whether the ring can do it; the rest is done by vf_store_do. */
static int vf_uring_can(const struct vf_store *store, const struct vf_req *req)
{
	switch ((enum vf_op)req->op) {
	case VF_OP_READ:
	case VF_OP_WRITE:
		return vf_store_takes(store, req);
	case VF_OP_FLUSH:
		return store->cache != VF_CACHE_UNSAFE;
	case VF_OP_DISCARD:
		return store->kind == VF_STORE_FILE && !store->no_punch_hole;
	case VF_OP_WRITE_ZEROES:
		/* A writethrough store needs a sync behind it. */
		return !store->write_flags && !(req->unmap ? store->no_punch_hole : store->no_zero_range);
	default:
		return 0;
	}
}

static void vf_uring_prepare(const struct vf_uring *uring, const struct vf_store *store, struct io_uring_sqe *sqe,
			     struct vf_req *req)
{
	int fd = uring->fixed_file ? 0 : store->fd;
	unsigned int count = req->iov_count; /* at most VF_IOV_MAX */

	switch ((enum vf_op)req->op) {
	case VF_OP_READ:
		if (count == 1)
			io_uring_prep_read(sqe, fd, req->iov->iov_base, (unsigned int)req->iov->iov_len,
					   req->offset_bytes);
		else
			io_uring_prep_readv(sqe, fd, req->iov, count, req->offset_bytes);
		break;
	case VF_OP_WRITE:
		if (count == 1)
			io_uring_prep_write(sqe, fd, req->iov->iov_base, (unsigned int)req->iov->iov_len,
					    req->offset_bytes);
		else
			io_uring_prep_writev(sqe, fd, req->iov, count, req->offset_bytes);
		sqe->rw_flags = store->write_flags;
		break;
	case VF_OP_FLUSH:
		io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
		break;
	default:
		io_uring_prep_fallocate(sqe, fd, vf_uring_zero_mode(req), (off_t)req->offset_bytes,
					(off_t)req->left_bytes);
		break;
	}
	if (uring->fixed_file)
		sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, req);
}

/* A ring that does not take requests for good is a bug of ours: nothing that is in it could ever be finished. */
static void vf_uring_check(int rc)
{
	if (rc < 0 && rc != -EINTR && rc != -EAGAIN && rc != -EBUSY && rc != -ENOMEM)
		abort();
}

static void vf_uring_flush(struct vf_engine *engine)
{
	struct vf_uring *uring = engine->state;

	/* What the kernel does not take now stays in the ring for the next call. */
	if (io_uring_sq_ready(&uring->ring))
		vf_uring_check(io_uring_submit(&uring->ring));
}

static int vf_uring_submit(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_uring *uring = engine->state;
	struct io_uring_sqe *sqe;

	if (!vf_uring_can(&engine->store, req)) {
		req->result = vf_store_do(&engine->store, req);
		return 1;
	}
	sqe = io_uring_get_sqe(&uring->ring); /* never NULL: one for each slot, and a request has one at a time */
	vf_uring_prepare(uring, &engine->store, sqe, req);
	engine->inflight_count++;
	if (io_uring_sq_ready(&uring->ring) * VF_URING_SHARE >= engine->inflight_count)
		vf_uring_flush(engine);
	return 0;
}

/* Digest one completion: 1 when the request is finished, 0 when its rest has been submitted again. */
static int vf_uring_digest(struct vf_engine *engine, struct vf_req *req, int res)
{
	int is_transfer = req->op == VF_OP_READ || req->op == VF_OP_WRITE;

	engine->inflight_count--;
	if (is_transfer && res > 0) {
		vf_req_advance(req, (uint64_t)res);
		if (req->left_bytes == 0) {
			req->result = 0;
			return 1;
		}
		return vf_uring_submit(engine, req); /* a short transfer goes on */
	}
	if (res == -EINTR || (res == -EAGAIN && req->retry_count++ < VF_URING_RETRY_MAX))
		return vf_uring_submit(engine, req);
	if (vf_store_is_unsupported(res) && (req->op == VF_OP_DISCARD || req->op == VF_OP_WRITE_ZEROES)) {
		if (req->op == VF_OP_DISCARD || req->unmap)
			engine->store.no_punch_hole = 1;
		else
			engine->store.no_zero_range = 1;
		return vf_uring_submit(engine, req); /* now by the next best way */
	}
	req->result = is_transfer && res == 0 && req->left_bytes ? -EIO : res;
	return 1;
}

static uint32_t vf_uring_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_uring *uring = engine->state;
	struct io_uring_cqe *cqes[VF_REAP_MAX];
	uint32_t count = 0;
	unsigned int n;

	if (max > VF_REAP_MAX)
		max = VF_REAP_MAX;
	n = io_uring_peek_batch_cqe(&uring->ring, cqes, max);
	for (unsigned int i = 0; i < n; i++) {
		struct vf_req *req = io_uring_cqe_get_data(cqes[i]);
		int res = cqes[i]->res;

		if (vf_uring_digest(engine, req, res))
			done[count++] = req;
	}
	if (n)
		io_uring_cq_advance(&uring->ring, n);
	return count;
}

static void vf_uring_wait(struct vf_engine *engine)
{
	struct vf_uring *uring = engine->state;

	if (engine->inflight_count)
		vf_uring_check(io_uring_submit_and_wait(&uring->ring, 1));
}

/* The kernel adds work or a completion and then looks at the flag that we clear here; we look again behind a fence. */
static int vf_uring_arm(struct vf_engine *engine)
{
	struct vf_uring *uring = engine->state;

	io_uring_cq_eventfd_toggle(&uring->ring, true);
	vf_fence_full(); /* Barrier E */
	return io_uring_cq_ready(&uring->ring) || (IO_URING_READ_ONCE(*uring->ring.sq.kflags) & IORING_SQ_TASKRUN);
}

static void vf_uring_disarm(struct vf_engine *engine)
{
	struct vf_uring *uring = engine->state;
	uint64_t count;

	io_uring_cq_eventfd_toggle(&uring->ring, false);
	/* EAGAIN: nothing has finished. */
	if (read(uring->event_fd, &count, sizeof(count)) < 0)
		return;
}

static void vf_uring_close(struct vf_engine *engine)
{
	struct vf_uring *uring = engine->state;
	struct vf_req *done[VF_REAP_MAX];

	/* The kernel may still write into memory that goes next. */
	while (engine->inflight_count) {
		vf_uring_wait(engine);
		vf_uring_reap(engine, done, VF_REAP_MAX);
	}
	io_uring_queue_exit(&uring->ring);
	close(uring->event_fd);
	free(uring);
	engine->state = NULL;
}

const struct vf_engine_ops vf_engine_uring = {
	.name = "uring",
	.open = vf_uring_open,
	.submit = vf_uring_submit,
	.flush = vf_uring_flush,
	.reap = vf_uring_reap,
	.wait = vf_uring_wait,
	.arm = vf_uring_arm,
	.disarm = vf_uring_disarm,
	.close = vf_uring_close,
	.publish_batch = 16,
};
