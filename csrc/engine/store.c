/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "engine/store_blocks.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/barrier.h"
#include "base/core_dump.h"

#define VF_RETRY_MAX 8u
#define VF_WITNESS_OFFSET (1ll << 62)

int vf_store_open(struct vf_store *store)
{
	store->write_flags = 0;
	store->no_punch_hole = 0;
	store->no_zero_range = 0;
	store->no_discard_command = 0;
	store->map = NULL;
	store->bounce = NULL;
	store->memory_gone = 0;
	store->read_map = (struct vf_store_map){ .base = NULL };
	if (store->kind == VF_STORE_NULL || store->kind == VF_STORE_PLUGIN)
		return 0;
	if (store->kind == VF_STORE_MEMORY) {
		void *map = mmap(NULL, store->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, store->fd, 0);
		if (map == MAP_FAILED)
			return -errno;
		/* Where shared memory may have huge pages (shmem_enabled = advise): 48 MiB written for the first time took
		 * 529 faults in place of 12,845 (a guest with Linux 6.12). */
		madvise(map, store->size_bytes, MADV_HUGEPAGE);
		vf_core_exclude(map, store->size_bytes);
		store->map = map;
		return 0;
	}
	/* Pages of it exist only once they are used. */
	void *bounce = mmap(NULL, VF_BOUNCE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (bounce == MAP_FAILED)
		return -errno;
	vf_core_exclude(bounce, VF_BOUNCE_BYTES);
	store->bounce = bounce;
	return 0;
}

void vf_store_close(struct vf_store *store)
{
	vf_map_close(&store->read_map);
	if (store->map)
		munmap(store->map, store->size_bytes);
	if (store->bounce)
		munmap(store->bounce, VF_BOUNCE_BYTES);
	store->map = NULL;
	store->bounce = NULL;
}

void vf_store_unlock_memory(const struct vf_store *store)
{
	if (store->map)
		munlock(store->map, store->size_bytes);
	if (store->read_map.base)
		munlock(store->read_map.base, store->read_map.size_bytes);
}

void vf_store_map(struct vf_store *store)
{
	/* A failure only costs speed: reads continue by pread(), which reports a real error. */
	if (store->map_reads && store->kind == VF_STORE_FILE && store->direct_align == 0)
		(void)vf_map_open(&store->read_map, store->fd, store->size_bytes);
}

int vf_store_nowait(const struct vf_store *store)
{
	uint8_t byte;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };

	return preadv2(store->fd, &iov, 1, 0, RWF_NOWAIT) < 0 && errno != EAGAIN ? -errno : 0;
}

void vf_store_resize(struct vf_store *store, uint64_t size_bytes)
{
	if (store->kind == VF_STORE_MEMORY)
		return; /* mapped once */
	store->size_bytes = size_bytes;
	if (store->read_map.base) {
		vf_map_close(&store->read_map); /* and with it what is known of pages that are cut off */
		vf_store_map(store);
	}
}

int vf_store_is_aligned(const struct vf_store *store, const struct vf_req *req)
{
	uint32_t mask = store->direct_align - 1u;

	if (req->offset_bytes & mask)
		return 0;
	for (uint32_t i = 0; i < req->iov_count; i++) {
		if (((uintptr_t)req->iov[i].iov_base | req->iov[i].iov_len) & mask)
			return 0;
	}
	return 1;
}

int vf_store_takes(const struct vf_store *store, const struct vf_req *req)
{
	if (store->direct_align == 0)
		return 1;
	if (store->emulates && req->op == VF_OP_WRITE)
		return 0; /* locks are taken first */
	return vf_store_is_aligned(store, req);
}

/* One pread or pwrite of the rest. A single segment takes the shorter way into the kernel. */
static ssize_t vf_store_transfer(const struct vf_store *store, const struct vf_req *req)
{
	off_t at = (off_t)req->offset_bytes;
	int count = (int)req->iov_count; /* at most VF_IOV_MAX */

	if (req->op == VF_OP_READ) {
		if (count == 1)
			return pread(store->fd, req->iov->iov_base, req->iov->iov_len, at);
		return preadv(store->fd, req->iov, count, at);
	}
	if (store->write_flags)
		return pwritev2(store->fd, req->iov, count, at, store->write_flags);
	if (count == 1)
		return pwrite(store->fd, req->iov->iov_base, req->iov->iov_len, at);
	return pwritev(store->fd, req->iov, count, at);
}

int vf_store_fault_in(struct vf_store *store, const struct iovec *iov, uint32_t iov_count)
{
	store->memory_gone = 0;
	for (uint32_t i = 0; i < iov_count; i++) {
		const uint8_t *base = iov[i].iov_base;

		if (iov[i].iov_len == 0)
			continue;
		for (size_t at = 0; at < iov[i].iov_len; at += VF_TOUCH_BYTES)
			vf_touch_shared(base + at);
		vf_touch_shared(base + iov[i].iov_len - 1u);
	}
	return store->memory_gone ? -EFAULT : 0; /* zero pages have replaced it: they must not be written */
}

int vf_store_rw(struct vf_store *store, struct vf_req *req)
{
	if (vf_store_wants_fault_in(store, req) && vf_store_fault_in(store, req->iov, req->iov_count))
		return -EFAULT;
	while (req->left_bytes) {
		ssize_t n = vf_store_transfer(store, req);

		if (vf_likely(n > 0)) {
			vf_req_advance(req, (uint64_t)n);
			continue;
		}
		if (n == 0)
			return -EIO; /* the store has become shorter than the device */
		if (errno == EINTR || (errno == EAGAIN && req->retry_count++ < VF_RETRY_MAX))
			continue;
		return -errno;
	}
	return 0;
}

int vf_bounce_write(struct vf_store *store, uint64_t offset_bytes, size_t len)
{
	struct iovec iov = { .iov_base = store->bounce, .iov_len = len };
	struct vf_req part = {
		.op = VF_OP_WRITE,
		.iov = &iov,
		.iov_count = 1,
		.offset_bytes = offset_bytes,
		.left_bytes = len,
	};
	return vf_store_rw(store, &part);
}

/* 1: the request is finished. 0: it is unchanged; use pread(). */
static int vf_store_read_mapped(struct vf_store *store, struct vf_req *req)
{
	struct vf_store_map *map = &store->read_map;
	const uint8_t *at = map->base + req->offset_bytes;

	if (vf_unlikely(!vf_map_holds(map, req->offset_bytes, req->left_bytes)) &&
	    !vf_map_look(map, req->offset_bytes, req->left_bytes))
		return 0;
	for (uint32_t i = 0; i < req->iov_count; i++) {
		vf_copy_to_shared(req->iov[i].iov_base, at, req->iov[i].iov_len);
		at += req->iov[i].iov_len;
	}
	if (vf_unlikely(map->lost)) {
		vf_map_close(map);
		return 0;
	}
	req->offset_bytes += req->left_bytes;
	req->left_bytes = 0;
	return 1;
}

static int vf_store_rw_memory(struct vf_store *store, struct vf_req *req)
{
	while (req->left_bytes) {
		uint8_t *at = store->map + req->offset_bytes;
		size_t n = req->iov->iov_len;

		if (req->op == VF_OP_READ)
			vf_copy_to_shared(req->iov->iov_base, at, n);
		else
			vf_copy_from_shared(at, req->iov->iov_base, n);
		vf_req_advance(req, n);
	}
	return 0;
}

/* The loop for calls that can be interrupted. 0 or -errno. */
static int vf_store_fallocate(const struct vf_store *store, int mode, uint64_t offset_bytes, uint64_t len_bytes)
{
	int rc;

	do
		rc = fallocate(store->fd, mode, (off_t)offset_bytes, (off_t)len_bytes);
	while (rc < 0 && errno == EINTR);
	return rc < 0 ? -errno : 0;
}

static int vf_store_punch_hole(struct vf_store *store, uint64_t offset_bytes, uint64_t len_bytes)
{
	int err;

	if (store->no_punch_hole)
		return -EOPNOTSUPP;
	vf_map_forget(&store->read_map, offset_bytes, len_bytes);
	err = vf_store_fallocate(store, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset_bytes, len_bytes);
	if (vf_store_is_unsupported(err))
		store->no_punch_hole = 1;
	return err;
}

/* A discard is advice: if a store cannot carry it out, nothing is lost, so it is no error. A full file system may need
 * space to note freed blocks. */
static int vf_store_discard(struct vf_store *store, struct vf_req *req)
{
	int err;

	if (store->kind == VF_STORE_BLOCKDEV) {
		uint64_t range[2] = { req->offset_bytes, req->left_bytes };

		err = ioctl(store->fd, BLKDISCARD, range) < 0 ? -errno : 0;
	} else {
		err = vf_store_punch_hole(store, req->offset_bytes, req->left_bytes);
	}
	return vf_store_is_refused(err) || err == -ENOSPC || err == -EDQUOT ? 0 : err;
}

int vf_store_write_zero_pages(struct vf_store *store, struct vf_req *req)
{
	int err = 0;

	memset(store->bounce, 0, VF_BOUNCE_BYTES);
	while (req->left_bytes && !err) {
		size_t len = req->left_bytes < VF_BOUNCE_BYTES ? (size_t)req->left_bytes : VF_BOUNCE_BYTES;

		err = vf_bounce_write(store, req->offset_bytes, len);
		if (!err) {
			req->offset_bytes += len;
			req->left_bytes -= len;
		}
	}
	return err;
}

/*
 * Zeroes by the cheapest way that the store supports. Deallocated ranges of files read as zeroes, and so do those for
 * which a block device's PUNCH_HOLE succeeds (fallocate(2)). Both are only for a driver that allows unmapping.
 */
static int vf_store_write_zeroes(struct vf_store *store, struct vf_req *req)
{
	int err = -EOPNOTSUPP;

	if (store->kind == VF_STORE_MEMORY) {
		if (!req->unmap || vf_store_punch_hole(store, req->offset_bytes, req->left_bytes))
			memset(store->map + req->offset_bytes, 0, req->left_bytes);
		return 0;
	}
	if (req->unmap)
		err = vf_store_punch_hole(store, req->offset_bytes, req->left_bytes);
	if (vf_store_is_refused(err) && !store->no_zero_range) {
		err = vf_store_fallocate(store, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, req->offset_bytes,
					 req->left_bytes);
		if (vf_store_is_unsupported(err))
			store->no_zero_range = 1;
	}
	if (vf_store_is_refused(err))
		return vf_store_write_zero_pages(store, req);
	return err;
}

static int vf_store_sync(const struct vf_store *store)
{
	int rc;

	if (store->cache == VF_CACHE_UNSAFE || store->kind == VF_STORE_MEMORY)
		return 0;
	/* Waits for all writes to the file by any process: a flush covers every queue. */
	do
		rc = fdatasync(store->fd);
	while (rc < 0 && errno == EINTR);
	return rc < 0 ? -errno : 0;
}

static int vf_store_range(struct vf_store *store, struct vf_req *req, int (*whole)(struct vf_store *, struct vf_req *))
{
	return vf_unlikely(store->emulates) ? vf_blocks_range(store, req, whole) : whole(store, req);
}

int vf_store_verify(const struct vf_store *store)
{
	if (store->witness_fd < 0 || (store->kind != VF_STORE_FILE && store->kind != VF_STORE_BLOCKDEV))
		return 0;
	/* For a range without any pages, so it does not wait; the report is about the whole file. */
	if (sync_file_range(store->witness_fd, VF_WITNESS_OFFSET, 1, SYNC_FILE_RANGE_WAIT_BEFORE) == 0)
		return 0;
	return errno == EINVAL || errno == ENOSYS || errno == EPERM ? 0 : -errno;
}

/* End a write or zeroes. On a writethrough store they are durable after this: zeroes are synced, as no flag of fallocate makes
 * them durable. Buffered ones are verified: all queues share the description that reports errors, so another queue may have got
 * the report about this one. */
static int vf_store_settle(struct vf_store *store, const struct vf_req *req, int err)
{
	if (err || !store->write_flags || req->op == VF_OP_READ)
		return err;
	if (req->op == VF_OP_WRITE_ZEROES)
		err = vf_store_sync(store);
	return err || store->direct_align ? err : vf_store_verify(store);
}

/* The part that may wait for storage. */
static int vf_store_call(struct vf_store *store, struct vf_req *req)
{
	switch ((enum vf_op)req->op) {
	case VF_OP_READ:
	case VF_OP_WRITE:
		if (vf_unlikely(!vf_store_takes(store, req)))
			return vf_store_settle(store, req, vf_blocks_rw(store, req));
		return vf_store_settle(store, req, vf_store_rw(store, req));
	case VF_OP_FLUSH:
		return vf_store_sync(store);
	case VF_OP_DISCARD:
		return vf_store_range(store, req, vf_store_discard);
	case VF_OP_WRITE_ZEROES:
		return vf_store_settle(store, req, vf_store_range(store, req, vf_store_write_zeroes));
	case VF_OP_GET_ID:
	case VF_OP_OTHER:
	case VF_OP_COUNT:
		break;
	}
	return -EINVAL; /* completed without a store */
}

int vf_store_do(struct vf_store *store, struct vf_req *req)
{
	int is_transfer = req->op == VF_OP_READ || req->op == VF_OP_WRITE;
	int err;

	if (store->kind == VF_STORE_MEMORY && is_transfer)
		return vf_store_rw_memory(store, req);
	if (store->read_map.base && req->op == VF_OP_READ && vf_store_read_mapped(store, req))
		return 0;
	vf_call_begin(store->publisher);
	err = vf_store_call(store, req);
	vf_call_end(store->publisher);
	return err;
}
