/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine for files in the page cache. A read of cached data is one system call that does not wait (preadv2 with
 * RWF_NOWAIT). Other reads go to an io_uring, so that a slow read does not delay the others. Writes are plain system calls
 * into the cache, which end when this process does. Flushes and zeroes go to the ring.
 */
#define _GNU_SOURCE
#include "engine/engine_uring.h"

#include <errno.h>
#include <sys/uio.h>

#include "base/barrier.h"
#include "engine/merge.h"

/* -EOPNOTSUPP if the file system cannot promise not to wait, as tmpfs, or if the store bypasses the cache. */
static int vf_cached_open(struct vf_engine *engine, uint32_t slot_count)
{
	int err = engine->store.direct_align ? -EOPNOTSUPP : vf_store_nowait(&engine->store);

	if (!err)
		err = vf_merge_open(engine, slot_count);
	if (err)
		return err;
	err = vf_uring_open(engine, slot_count);
	if (err)
		vf_merge_close(engine);
	return err;
}

/* Read the cached part of the rest of a read. 1: that was all of it. */
static int vf_cached_read(const struct vf_store *store, struct vf_req *req)
{
	ssize_t n = preadv2(store->fd, req->iov, (int)req->iov_count, (off_t)req->offset_bytes, RWF_NOWAIT);

	if (n > 0)
		vf_req_advance(req, (uint64_t)n);
	return req->left_bytes == 0; /* the ring reports an error or the file's end again */
}

static int vf_cached_one(struct vf_engine *engine, struct vf_req *req)
{
	if (vf_likely(req->op == VF_OP_READ)) {
		if (!vf_cached_read(&engine->store, req))
			return vf_uring_submit(engine, req);
		req->result = 0;
		return 1;
	}
	if (req->op == VF_OP_WRITE) {
		req->result = vf_store_do(&engine->store, req);
		return 1;
	}
	return vf_uring_submit(engine, req);
}

static int vf_cached_submit(struct vf_engine *engine, struct vf_req *req)
{
	return vf_merge_submit(engine, req, vf_cached_one, RWF_NOWAIT);
}

static void vf_cached_flush(struct vf_engine *engine)
{
	if (engine->merge && engine->merge->held_count)
		vf_merge_flush(engine, vf_cached_one, RWF_NOWAIT);
	vf_uring_flush(engine);
}

static uint32_t vf_cached_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	uint32_t count = engine->merge ? vf_merge_reap(engine, done, max) : 0;

	return count + vf_uring_reap(engine, done + count, max - count);
}

static void vf_cached_wait(struct vf_engine *engine)
{
	vf_cached_flush(engine);
	if (!vf_merge_has_done(engine))
		vf_uring_wait(engine);
}

static int vf_cached_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	vf_cached_flush(engine);
	return vf_merge_has_done(engine) ? 0 : vf_uring_sleep(engine, fds, count, timeout_ms);
}

static void vf_cached_close(struct vf_engine *engine)
{
	vf_uring_close(engine);
	vf_merge_close(engine);
}

const struct vf_engine_ops vf_engine_cached = {
	.name = "cached",
	.stores = VF_SERVES_FILES,
	.open = vf_cached_open,
	.submit = vf_cached_submit,
	.flush = vf_cached_flush,
	.reap = vf_cached_reap,
	.wait = vf_cached_wait,
	.sleep = vf_cached_sleep,
	.close = vf_cached_close,
	.publish_batch = 4,
	.blocks = 1,
};
