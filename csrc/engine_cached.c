/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine for files behind the page cache: a read that the cache can answer is one system call that does not wait
 * (preadv2 with RWF_NOWAIT); what it lacks goes to an io_uring, so that one slow read does not hold up the others.
 * Writes are plain ones, which end in the cache and with this process; flushes and zeroes take the ring.
 */
#define _GNU_SOURCE
#include "engine_uring.h"

#include <errno.h>
#include <sys/uio.h>

#include "barrier.h"

/* -EOPNOTSUPP where the file system cannot promise not to wait, as tmpfs, or where the cache is passed by. */
static int vf_cached_open(struct vf_engine *engine, uint32_t slot_count)
{
	int err = engine->store.direct_align ? -EOPNOTSUPP : vf_store_nowait(&engine->store);

	return err ? err : vf_uring_open(engine, slot_count);
}

/* What the cache has of the rest of a read. 1: that was all of it. */
static int vf_cached_read(const struct vf_store *store, struct vf_req *req)
{
	ssize_t n = preadv2(store->fd, req->iov, (int)req->iov_count, (off_t)req->offset_bytes, RWF_NOWAIT);

	if (n > 0)
		vf_req_advance(req, (uint64_t)n);
	return req->left_bytes == 0; /* an error or the file's end shows again in the ring */
}

static int vf_cached_submit(struct vf_engine *engine, struct vf_req *req)
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

const struct vf_engine_ops vf_engine_cached = {
	.name = "cached",
	.open = vf_cached_open,
	.submit = vf_cached_submit,
	.flush = vf_uring_flush,
	.reap = vf_uring_reap,
	.wait = vf_uring_wait,
	.sleep = vf_uring_sleep,
	.close = vf_uring_close,
	.publish_batch = 4,
	.blocks = 1,
};
