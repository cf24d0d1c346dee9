/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "engine/store_blocks.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/barrier.h"

#define VF_BLOCKS_RETRY_MAX 8u

/* The smallest unit: a power of two. */
static uint64_t vf_blocks_unit(const struct vf_store *store)
{
	return store->emulates ? store->granule : store->direct_align;
}

/* Lock the blocks that a range touches, or unlock them (F_UNLCK). 0 or -errno. */
static int vf_blocks_lock(const struct vf_store *store, short type, uint64_t offset_bytes, uint64_t len_bytes)
{
	uint64_t first, last;
	struct flock lock = { .l_type = type, .l_whence = SEEK_SET };
	int rc;

	if (!store->emulates || store->lock_fd < 0)
		return 0;
	first = offset_bytes / store->granule;
	last = (offset_bytes + len_bytes - 1u) / store->granule;
	lock.l_start = (off_t)first;
	lock.l_len = (off_t)(last - first + 1u);
	do
		rc = fcntl(store->lock_fd, F_SETLKW, &lock);
	while (rc < 0 && errno == EINTR);
	return rc < 0 ? -errno : 0;
}

/* Gather from or scatter into the request's memory, len bytes from its cursor, which stays. */
static void vf_req_copy(const struct vf_req *req, uint8_t *buffer, size_t len, int to_driver)
{
	for (uint32_t i = 0; len; i++) {
		size_t n = req->iov[i].iov_len < len ? req->iov[i].iov_len : len;

		if (to_driver)
			vf_copy_to_shared(req->iov[i].iov_base, buffer, n);
		else
			vf_copy_from_shared(buffer, req->iov[i].iov_base, n);
		buffer += n;
		len -= n;
	}
}

/* Read whole blocks into the bounce buffer. The last one may lie partly beyond the end of a file: at least `need` bytes must be
 * there. How many are, or -errno. */
static ssize_t vf_bounce_read(const struct vf_store *store, uint64_t offset_bytes, size_t len, size_t need)
{
	uint32_t retry_count = 0;
	size_t got = 0; /* whole blocks: the rest of one cannot be read alone */

	for (;;) {
		ssize_t n = pread(store->fd, store->bounce + got, len - got, (off_t)(offset_bytes + got));
		int err = n < 0 ? errno : 0;

		if (n >= 0 && got + (size_t)n >= need)
			return (ssize_t)(got + (size_t)n);
		if (n > 0)
			got += (size_t)n & ~(size_t)(vf_blocks_unit(store) - 1u);
		if (err && err != EINTR && err != EAGAIN)
			return -err;
		if (err != EINTR && retry_count++ >= VF_BLOCKS_RETRY_MAX && (size_t)(n < 0 ? 0 : n) < vf_blocks_unit(store))
			return err ? -err : -EIO; /* the store has become shorter than the device */
	}
}

static int vf_blocks_read(struct vf_store *store, struct vf_req *req)
{
	uint64_t unit = vf_blocks_unit(store);

	while (req->left_bytes) {
		size_t skip = (size_t)(req->offset_bytes & (unit - 1u));
		size_t len = req->left_bytes < VF_BOUNCE_BYTES - skip ? (size_t)req->left_bytes : VF_BOUNCE_BYTES - skip;
		size_t span = (skip + len + unit - 1u) & ~(size_t)(unit - 1u);
		ssize_t n = vf_bounce_read(store, req->offset_bytes - skip, span, skip + len);

		if (n < 0)
			return (int)n;
		vf_req_copy(req, store->bounce + skip, len, 1);
		vf_req_advance(req, len);
	}
	return 0;
}

/* Change len bytes of one block, from its byte `skip` on: to what the request has at its cursor, which stays, or to zeroes where
 * it has no memory. */
static int vf_block_change(struct vf_store *store, const struct vf_req *req, size_t skip, size_t len)
{
	uint64_t start = req->offset_bytes - skip;
	size_t need = store->granule;
	struct stat status;
	ssize_t n;

	/* A file may end within the block, and becomes longer then. */
	if (store->kind == VF_STORE_FILE) {
		if (fstat(store->fd, &status) < 0)
			return -errno;
		if ((uint64_t)status.st_size < start + need)
			need = (uint64_t)status.st_size > start ? (size_t)((uint64_t)status.st_size - start) : 0;
	}
	n = vf_bounce_read(store, start, store->granule, need);
	if (n < 0)
		return (int)n;
	memset(store->bounce + n, 0, store->granule - (size_t)n);
	if (req->iov_count)
		vf_req_copy(req, store->bounce + skip, len, 0);
	else
		memset(store->bounce + skip, 0, len);
	return vf_bounce_write(store, start, store->granule);
}

static int vf_block_change_locked(struct vf_store *store, const struct vf_req *req, size_t skip, size_t len)
{
	int err = vf_blocks_lock(store, F_WRLCK, req->offset_bytes, len);

	if (err)
		return err;
	err = vf_block_change(store, req, skip, len);
	vf_blocks_lock(store, F_UNLCK, req->offset_bytes, len);
	return err;
}

/* Write whole blocks, as many as there are at the cursor and the bounce buffer holds. */
static int vf_blocks_write_whole(struct vf_store *store, struct vf_req *req, size_t len)
{
	uint64_t offset_bytes = req->offset_bytes;
	int err = vf_blocks_lock(store, F_RDLCK, offset_bytes, len);

	if (err)
		return err;
	vf_req_copy(req, store->bounce, len, 0);
	err = vf_bounce_write(store, offset_bytes, len);
	vf_blocks_lock(store, F_UNLCK, offset_bytes, len);
	return err;
}

static int vf_blocks_write(struct vf_store *store, struct vf_req *req)
{
	uint64_t unit = vf_blocks_unit(store);

	while (req->left_bytes) {
		size_t skip = (size_t)(req->offset_bytes & (unit - 1u));
		size_t len = req->left_bytes < VF_BOUNCE_BYTES ? (size_t)req->left_bytes : VF_BOUNCE_BYTES;
		int err;

		if (store->emulates && (skip || len < unit)) {
			len = len < unit - skip ? len : (size_t)unit - skip;
			err = vf_block_change_locked(store, req, skip, len);
		} else {
			len = store->emulates ? len & ~(size_t)(unit - 1u) : len;
			err = vf_blocks_write_whole(store, req, len);
		}
		if (err)
			return err;
		vf_req_advance(req, len);
	}
	return 0;
}

/* A transfer that needs only the lock and no bounce buffer: whole blocks in memory that is aligned for O_DIRECT. */
static int vf_blocks_write_as_is(struct vf_store *store, struct vf_req *req)
{
	uint64_t offset_bytes = req->offset_bytes, len_bytes = req->left_bytes;
	int err = vf_blocks_lock(store, F_RDLCK, offset_bytes, len_bytes);

	if (err)
		return err;
	err = vf_store_rw(store, req);
	vf_blocks_lock(store, F_UNLCK, offset_bytes, len_bytes);
	return err;
}

int vf_blocks_rw(struct vf_store *store, struct vf_req *req)
{
	if (req->op == VF_OP_READ)
		return vf_blocks_read(store, req);
	return vf_store_is_aligned(store, req) ? vf_blocks_write_as_is(store, req) : vf_blocks_write(store, req);
}

/* Zero a part of one block. In the page cache that is an ordinary write: the kernel serialises it with others. */
static int vf_block_zero(struct vf_store *store, struct vf_req *part, size_t skip)
{
	if (!store->direct_align)
		return vf_store_write_zero_pages(store, part);
	return vf_block_change_locked(store, part, skip, (size_t)part->left_bytes);
}

int vf_blocks_range(struct vf_store *store, struct vf_req *req, int (*whole)(struct vf_store *, struct vf_req *))
{
	uint64_t unit = store->granule;
	int err = 0;

	while (req->left_bytes && !err) {
		size_t skip = (size_t)(req->offset_bytes & (unit - 1u));
		struct vf_req part = *req;
		uint64_t len;

		part.iov_count = 0;
		if (skip || req->left_bytes < unit) {
			len = req->left_bytes < unit - skip ? req->left_bytes : unit - skip;
			part.left_bytes = len;
			err = req->op == VF_OP_DISCARD ? 0 : vf_block_zero(store, &part, skip);
		} else {
			len = req->left_bytes & ~(unit - 1u);
			part.left_bytes = len;
			err = vf_blocks_lock(store, F_RDLCK, req->offset_bytes, len);
			if (err)
				return err;
			err = whole(store, &part);
			vf_blocks_lock(store, F_UNLCK, req->offset_bytes, len);
		}
		req->offset_bytes += len;
		req->left_bytes -= len;
	}
	return err;
}
