/* SPDX-License-Identifier: Apache-2.0
 *
 * The io_uring engine: a batch is one system call, completions come in any order.
 */
#define _GNU_SOURCE
#include "engine/engine_uring.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "base/barrier.h"
#include "engine/fixed_buffers.h"

#define VF_URING_RETRY_MAX 8u
#define VF_REAP_MAX 64u
#define VF_BLOCK_URING_CMD_DISCARD _IO(0x12, 0) /* linux/blkdev.h of 6.12 */
/* Prepared requests for a block device are submitted once they are this part of all in flight: an idle device gets the
 * first request at once, a busy one many by one system call. Buffered requests would not start earlier by that, because
 * the submission itself copies cached data. So their whole round is submitted at once. */
#define VF_URING_SHARE 4u
#define VF_URING_SQ_IDLE_MS 10u /* without work for so long, the kernel's submitting thread sleeps */

struct vf_uring {
	struct io_uring ring;
	struct vf_fixed_buffers fixed;
	uint32_t watched; /* bits: descriptors of sleep() that have a poll in the ring */
};

/* The best set of flags that this kernel knows: one issuer, completions when we ask for them (6.1); else the plain ring.
 * by_thread: the kernel carries out every request in a thread of its own, which can post completions by itself, without a
 * system call of ours, unless they are deferred until we ask. */
static int vf_uring_init_ring(struct io_uring *ring, uint32_t entries, int sqpoll, int by_thread)
{
	/* A kernel thread polls for submissions: it posts completions without a system call of ours. */
	static const unsigned int sqpoll_flags[] = {
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_SQPOLL,
		IORING_SETUP_SQPOLL,
		IORING_SETUP_SQPOLL,
	};
	static const unsigned int flags[] = {
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		0,
	};
	int err = -EINVAL;

	for (size_t i = by_thread; i < sizeof(flags) / sizeof(flags[0]) && err == -EINVAL; i++) {
		struct io_uring_params params = {
			.flags = sqpoll ? sqpoll_flags[i] : flags[i],
			.sq_thread_idle = VF_URING_SQ_IDLE_MS,
		};

		err = io_uring_queue_init_params(entries, ring, &params);
	}
	return err;
}

/* The store's file comes first: registered, it saves a reference count per request. The others are only kept open: requests
 * continue after this process is killed, and the ring keeps these files open until they end. */
static int vf_uring_register(struct io_uring *ring, const struct vf_store *store)
{
	int fds[1u + VF_HOLD_MAX] = { store->fd };

	for (uint32_t i = 0; i < store->hold_count; i++)
		fds[1u + i] = store->hold_fds[i];
	return io_uring_register_files(ring, fds, 1u + store->hold_count);
}

int vf_uring_open(struct vf_engine *engine, uint32_t slot_count)
{
	struct vf_uring *uring = calloc(1, sizeof(*uring));
	int by_thread = engine->store.direct_align == 0 && vf_store_nowait(&engine->store) == -EOPNOTSUPP;
	int err;

	if (!uring)
		return -ENOMEM;
	/* An entry for each request and for each watched descriptor. */
	err = vf_uring_init_ring(&uring->ring, slot_count + VF_WATCH_MAX, engine->store.sqpoll, by_thread);
	if (err) {
		free(uring);
		return err;
	}
	/* From 5.11 on, as VDUSE's 5.15 has it: before, a wait with a limit needs a request of its own. */
	if (!(uring->ring.features & IORING_FEAT_EXT_ARG)) {
		io_uring_queue_exit(&uring->ring);
		free(uring);
		return -ENOSYS;
	}
	err = vf_uring_register(&uring->ring, &engine->store);
	if (err) {
		io_uring_queue_exit(&uring->ring);
		free(uring);
		return err;
	}
	err = vf_begun_open(engine, slot_count);
	if (err) {
		io_uring_queue_exit(&uring->ring);
		free(uring);
		return err;
	}
	if (engine->store.direct_align)
		vf_fixed_open(&uring->fixed, &uring->ring);
	engine->state = uring;
	return 0;
}

static int vf_uring_zero_mode(const struct vf_req *req)
{
	int how = req->unmap || req->op == VF_OP_DISCARD ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;

	return how | FALLOC_FL_KEEP_SIZE;
}

/* Whether the ring can do it; vf_store_do() does the rest. */
static int vf_uring_can(const struct vf_store *store, const struct vf_req *req)
{
	switch ((enum vf_op)req->op) {
	case VF_OP_WRITE:
		/* Durable writes through the page cache go one at a time: their errors are reported once, to any one of them. */
		if (store->write_flags && !store->direct_align)
			return 0;
		return vf_store_takes(store, req);
	case VF_OP_READ:
		return vf_store_takes(store, req);
	case VF_OP_FLUSH:
		return store->cache != VF_CACHE_UNSAFE;
	case VF_OP_DISCARD:
		if (store->emulates || req->refused)
			return 0;
		return store->kind == VF_STORE_FILE ? !store->no_punch_hole : !store->no_discard_command;
	case VF_OP_WRITE_ZEROES:
		if (store->emulates || req->refused)
			return 0;
		/* A writethrough store needs a sync after it. */
		return !store->write_flags && !(req->unmap ? store->no_punch_hole : store->no_zero_range);
	default:
		return 0;
	}
}

/* A transfer of one segment, through a registered buffer where it lies in one. */
static void vf_uring_prepare_one(struct vf_uring *uring, struct io_uring_sqe *sqe, const struct vf_req *req)
{
	unsigned int len = (unsigned int)req->iov->iov_len;
	void *va = req->iov->iov_base;
	int index = vf_fixed_find(&uring->fixed, va, len);

	if (req->op == VF_OP_READ)
		io_uring_prep_read(sqe, 0, va, len, req->offset_bytes);
	else
		io_uring_prep_write(sqe, 0, va, len, req->offset_bytes);
	if (index >= 0) {
		sqe->opcode = req->op == VF_OP_READ ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
		sqe->buf_index = (uint16_t)index;
	}
}

static void vf_uring_prepare_range(const struct vf_store *store, struct io_uring_sqe *sqe, struct vf_req *req)
{
	req->piece_bytes = vf_piece_bytes(&store->pieces, req, VF_PIECE_RING_BYTES);
	if (req->op == VF_OP_DISCARD && store->kind == VF_STORE_BLOCKDEV) {
		/* It locks nothing, and no thread waits. liburing has no function for it yet. */
		io_uring_prep_rw(IORING_OP_URING_CMD, sqe, 0, NULL, 0, 0);
		sqe->cmd_op = VF_BLOCK_URING_CMD_DISCARD;
		sqe->addr = req->offset_bytes;
		sqe->addr3 = req->piece_bytes;
		return;
	}
	io_uring_prep_fallocate(sqe, 0, vf_uring_zero_mode(req), (off_t)req->offset_bytes, (off_t)req->piece_bytes);
}

static void vf_uring_prepare(const struct vf_engine *engine, struct io_uring_sqe *sqe, struct vf_req *req)
{
	struct vf_uring *uring = engine->state;
	int fd = 0; /* the first registered file */
	unsigned int count = req->iov_count; /* at most VF_IOV_MAX */

	switch ((enum vf_op)req->op) {
	case VF_OP_READ:
		if (count == 1)
			vf_uring_prepare_one(uring, sqe, req);
		else
			io_uring_prep_readv(sqe, fd, req->iov, count, req->offset_bytes);
		break;
	case VF_OP_WRITE:
		if (count == 1)
			vf_uring_prepare_one(uring, sqe, req);
		else
			io_uring_prep_writev(sqe, fd, req->iov, count, req->offset_bytes);
		sqe->rw_flags = engine->store.write_flags;
		break;
	case VF_OP_FLUSH:
		io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
		break;
	default:
		vf_uring_prepare_range(&engine->store, sqe, req);
		break;
	}
	sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, req);
}

/* If the kernel never accepts the ring's requests, that is a bug of ours: no request in it could ever finish. */
static void vf_uring_check(int rc)
{
	if (rc < 0 && rc != -EINTR && rc != -EAGAIN && rc != -EBUSY && rc != -ENOMEM)
		abort();
}

void vf_uring_flush(struct vf_engine *engine)
{
	struct vf_uring *uring = engine->state;

	/* Requests that the kernel does not accept now stay in the ring for the next call. */
	if (!io_uring_sq_ready(&uring->ring))
		return;
	vf_call_begin(engine->store.publisher);
	vf_uring_check(io_uring_submit(&uring->ring));
	vf_call_end(engine->store.publisher);
}

int vf_uring_submit(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_uring *uring = engine->state;
	struct io_uring_sqe *sqe;

	if (!vf_uring_can(&engine->store, req)) {
		if (req->op == VF_OP_DISCARD || req->op == VF_OP_WRITE_ZEROES)
			return vf_begun_submit(engine, req);
		req->result = vf_store_do(&engine->store, req);
		return 1;
	}
	if (vf_store_wants_fault_in(&engine->store, req) && vf_store_fault_in(&engine->store, req->iov, req->iov_count)) {
		req->result = -EFAULT;
		return 1;
	}
	sqe = io_uring_get_sqe(&uring->ring); /* never NULL: one for each slot, a request has one at a time */
	vf_uring_prepare(engine, sqe, req);
	engine->inflight_count++;
	if (engine->store.direct_align &&
	    io_uring_sq_ready(&uring->ring) * VF_URING_SHARE >= engine->inflight_count)
		vf_uring_flush(engine);
	return 0;
}

/* A piece of a discard or of zeroes has ended: as vf_uring_digest(). */
static int vf_uring_digest_range(struct vf_engine *engine, struct vf_req *req, int res)
{
	struct vf_store *store = &engine->store;

	if (res == 0) {
		req->offset_bytes += req->piece_bytes;
		req->left_bytes -= req->piece_bytes;
		if (req->left_bytes)
			return vf_uring_submit(engine, req);
	} else if (vf_store_is_refused(res)) {
		if (req->op == VF_OP_DISCARD && store->kind == VF_STORE_BLOCKDEV)
			store->no_discard_command |= vf_store_is_unsupported(res) || res == -EINVAL;
		else if (vf_store_is_unsupported(res) && (req->op == VF_OP_DISCARD || req->unmap))
			store->no_punch_hole = 1;
		else if (vf_store_is_unsupported(res))
			store->no_zero_range = 1;
		req->refused = 1;
		return vf_uring_submit(engine, req); /* now by the next best way */
	}
	/* A full file system may need space to note freed blocks: as vf_store_discard(). */
	req->result = req->op == VF_OP_DISCARD && (res == -ENOSPC || res == -EDQUOT) ? 0 : res;
	return 1;
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
		return vf_uring_submit(engine, req); /* a short transfer continues */
	}
	if (res == -EINTR || (res == -EAGAIN && req->retry_count++ < VF_URING_RETRY_MAX))
		return vf_uring_submit(engine, req);
	if (req->op == VF_OP_DISCARD || req->op == VF_OP_WRITE_ZEROES)
		return vf_uring_digest_range(engine, req, res);
	req->result = is_transfer && res == 0 && req->left_bytes ? -EIO : res;
	return 1;
}

uint32_t vf_uring_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_uring *uring = engine->state;
	struct io_uring_cqe *cqes[VF_REAP_MAX];
	uint32_t count = 0;
	unsigned int n;

	if (max > VF_REAP_MAX)
		max = VF_REAP_MAX;
	n = io_uring_peek_batch_cqe(&uring->ring, cqes, max);
	for (unsigned int i = 0; i < n; i++) {
		uint64_t data = io_uring_cqe_get_data64(cqes[i]);
		int res = cqes[i]->res;

		if (vf_unlikely(data < VF_WATCH_MAX)) { /* a descriptor, and not the address of a request */
			uring->watched &= ~(1u << data);
			engine->readable |= 1u << data;
		} else if (vf_uring_digest(engine, (struct vf_req *)(uintptr_t)data, res)) {
			done[count++] = (struct vf_req *)(uintptr_t)data;
		}
	}
	if (n)
		io_uring_cq_advance(&uring->ring, n);
	return count + vf_begun_reap(engine, done + count, max - count);
}

void vf_uring_wait(struct vf_engine *engine)
{
	struct vf_uring *uring = engine->state;

	/* Work by hand continues at each reap(). */
	if (!vf_begun_is_idle(engine) && engine->inflight_count)
		vf_uring_check(io_uring_submit_and_wait(&uring->ring, 1));
}

/* Have the ring watch fds, unless it still does from an earlier time. */
static void vf_uring_watch(struct vf_engine *engine, const int *fds, uint32_t count)
{
	struct vf_uring *uring = engine->state;

	for (uint32_t i = 0; i < count; i++) {
		struct io_uring_sqe *sqe;

		if (uring->watched & (1u << i))
			continue;
		sqe = io_uring_get_sqe(&uring->ring); /* never NULL: see vf_uring_open() */
		io_uring_prep_poll_add(sqe, fds[i], POLLIN);
		io_uring_sqe_set_data64(sqe, i);
		uring->watched |= 1u << i;
	}
}

int vf_uring_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	struct vf_uring *uring = engine->state;
	struct __kernel_timespec timeout = { .tv_sec = timeout_ms / 1000, .tv_nsec = timeout_ms % 1000 * 1000000ll };
	struct io_uring_cqe *cqe;
	int rc;

	vf_uring_watch(engine, fds, count);
	if (vf_unlikely(vf_begun_is_idle(engine))) {
		vf_uring_check(io_uring_submit(&uring->ring));
		return 0;
	}
	rc = io_uring_submit_and_wait_timeout(&uring->ring, &cqe, 1, &timeout, NULL);
	if (rc == -ETIME)
		return 1;
	vf_uring_check(rc);
	return 0;
}

void vf_uring_close(struct vf_engine *engine)
{
	struct vf_uring *uring = engine->state;
	struct vf_req *done[VF_REAP_MAX];

	/* The kernel may still write into memory that is unmapped next. */
	while (engine->inflight_count) {
		vf_uring_wait(engine);
		vf_uring_reap(engine, done, VF_REAP_MAX);
	}
	io_uring_unregister_files(&uring->ring); /* now; the ring itself goes some time after its last descriptor */
	io_uring_queue_exit(&uring->ring);
	free(uring);
	vf_begun_close(engine);
	engine->state = NULL;
}

static void vf_uring_region(struct vf_engine *engine, void *va, size_t len_bytes, const struct vf_mapping *mapping)
{
	struct vf_uring *uring = engine->state;

	if (mapping)
		vf_fixed_add(&uring->fixed, va, len_bytes);
	else
		vf_fixed_drop(&uring->fixed, va, len_bytes);
}

void vf_uring_fixed(const struct vf_engine *engine, uint64_t *registered_bytes, int *refused)
{
	const struct vf_uring *uring = engine->state;

	*registered_bytes = 0;
	for (uint32_t i = 0; i < uring->fixed.count; i++)
		*registered_bytes += uring->fixed.buffer[i].iov_len;
	*refused = uring->fixed.refused;
}

const struct vf_engine_ops vf_engine_uring = {
	.name = "uring",
	.stores = VF_SERVES_FILES,
	.open = vf_uring_open,
	.submit = vf_uring_submit,
	.flush = vf_uring_flush,
	.reap = vf_uring_reap,
	.wait = vf_uring_wait,
	.sleep = vf_uring_sleep,
	.close = vf_uring_close,
	.region = vf_uring_region,
	.publish_batch = 16,
};
