/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "engine/merge.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

int vf_merge_open(struct vf_engine *engine, uint32_t slot_count)
{
	struct vf_merge *merge;

	if (!engine->store.merge)
		return 0;
	merge = calloc(1, sizeof(*merge) + slot_count * sizeof(merge->done[0]));
	if (!merge)
		return -ENOMEM;
	merge->last_end_bytes = UINT64_MAX;
	engine->merge = merge;
	return 0;
}

void vf_merge_close(struct vf_engine *engine)
{
	free(engine->merge);
	engine->merge = NULL;
}

/* Whether req can be part of the call that is being collected. */
static int vf_merge_fits(const struct vf_merge *merge, const struct vf_req *req)
{
	return (merge->held_count == 0 || merge->op == req->op) && merge->held_count < VF_MERGE_MAX &&
	       merge->iov_count + req->iov_count <= VF_MERGE_IOV_MAX &&
	       merge->left_bytes + req->left_bytes <= VF_MERGE_BYTES;
}

int vf_merge_hold(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_merge *merge = engine->merge;

	if (!vf_merge_fits(merge, req) || !vf_store_takes(&engine->store, req))
		return 0;
	if (merge->patience) {
		merge->patience--;
		return 0;
	}
	memcpy(&merge->iov[merge->iov_count], req->iov, req->iov_count * sizeof(*req->iov));
	merge->iov_count += req->iov_count;
	merge->left_bytes += req->left_bytes;
	merge->op = req->op;
	merge->held[merge->held_count++] = req;
	engine->inflight_count++;
	return 1;
}

/* Carry out all collected requests by one call. 1: all done; 0: not; -EFAULT: nothing may be written. */
static int vf_merge_transfer(struct vf_store *store, const struct vf_merge *merge, int rw_flags)
{
	off_t at = (off_t)merge->held[0]->offset_bytes;
	int count = (int)merge->iov_count;
	ssize_t n;

	if (merge->op == VF_OP_WRITE && store->direct_align == 0 && vf_store_fault_in(store, merge->iov, merge->iov_count))
		return -EFAULT;
	vf_call_begin(store->publisher);
	if (merge->op == VF_OP_READ)
		n = preadv2(store->fd, merge->iov, count, at, rw_flags);
	else
		n = pwritev2(store->fd, merge->iov, count, at, store->write_flags);
	vf_call_end(store->publisher);
	if (n <= 0 || (uint64_t)n != merge->left_bytes)
		return 0;
	/* Durable ones are verified: what has failed is written again, one by one. */
	return merge->op == VF_OP_READ || !store->write_flags || vf_store_verify(store) == 0;
}

void vf_merge_flush(struct vf_engine *engine, vf_merge_one *one, int rw_flags)
{
	struct vf_merge *merge = engine->merge;
	uint32_t count = merge->held_count;
	int whole = count > 1 && vf_merge_transfer(&engine->store, merge, rw_flags);

	if (count == 1)
		merge->patience = VF_MERGE_PATIENCE; /* a driver with one request at a time */
	merge->held_count = merge->iov_count = 0;
	merge->left_bytes = 0;
	for (uint32_t i = 0; i < count; i++) {
		struct vf_req *req = merge->held[i];

		if (whole) {
			if (whole > 0)
				vf_req_advance(req, req->left_bytes);
			req->result = whole > 0 ? 0 : whole;
		} else {
			engine->inflight_count--; /* until one() has it */
			if (!one(engine, req))
				continue;
			engine->inflight_count++;
		}
		merge->done[merge->done_count++] = req;
	}
}

uint32_t vf_merge_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_merge *merge = engine->merge;
	uint32_t count = merge->done_count < max ? merge->done_count : max;

	memcpy(done, merge->done, count * sizeof(*done));
	merge->done_count -= count;
	memmove(merge->done, merge->done + count, merge->done_count * sizeof(*done));
	engine->inflight_count -= count;
	return count;
}
