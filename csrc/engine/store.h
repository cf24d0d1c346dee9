/* SPDX-License-Identifier: Apache-2.0
 *
 * A store, which holds the bytes, as a worker sees it. The calls here block. The sync engine consists of them, and the
 * uring engine uses them for operations that a ring cannot do.
 */
#ifndef VF_STORE_H
#define VF_STORE_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/pieces.h"
#include "engine/publisher.h"
#include "engine/request.h"
#include "engine/store_map.h"

enum vf_store_kind {
	VF_STORE_FILE,
	VF_STORE_BLOCKDEV,
	VF_STORE_MEMORY,
	VF_STORE_NULL,
	VF_STORE_PLUGIN, /* only its engine can access it: of the functions below use only open, close and resize */
};

enum vf_store_cache {
	VF_CACHE_WRITEBACK,
	VF_CACHE_WRITETHROUGH, /* every write is durable when it is completed */
	VF_CACHE_NONE, /* O_DIRECT */
	VF_CACHE_UNSAFE, /* a flush does nothing */
};

#define VF_HOLD_MAX 2u

struct vf_store {
	int fd; /* borrowed; -1 for null and plugin */
	/* Borrowed: another open file description of the same file, which is never synced; -1: none. The kernel reports a
	 * failed write-back once for each description, and all queues share `fd`. */
	int witness_fd;
	enum vf_store_kind kind;
	enum vf_store_cache cache;
	uint32_t direct_align; /* of offset, length and memory under O_DIRECT; 0 = anything goes */
	uint32_t granule; /* of the ranges of discards and zeroes, and under O_DIRECT of all transfers; 0 = anything goes */
	uint8_t emulates; /* the device has smaller blocks than `granule`: store_blocks.h */
	int lock_fd; /* the file of the locks on such blocks; borrowed; -1 = no other process serves the store */
	uint64_t size_bytes;
	int write_flags; /* RWF_DSYNC or 0 */
	/* Borrowed. An engine whose requests can outlive its process keeps them open until the last request has ended. So a process
	 * that waits for their other end, or for a lock on their file, knows that all writes have ended. */
	int hold_fds[VF_HOLD_MAX];
	uint32_t hold_count;
	uint8_t no_punch_hole; /* the store has refused it: do not ask again */
	uint8_t no_zero_range;
	uint8_t no_discard_command; /* the kernel's io_uring has none: from Linux 6.12 on it has */
	uint8_t sqpoll; /* of the uring engine: a kernel thread polls for submissions */
	uint8_t merge; /* adjacent requests may become one call */
	uint8_t map_reads; /* read through a mapping where that is possible */
	volatile int memory_gone; /* a page of the driver's memory has vanished; set by the signal handler */
	uint8_t *map; /* of a memory store */
	struct vf_store_map read_map; /* of a file on tmpfs, while `map_reads` */
	struct vf_pieces pieces;
	struct vf_publisher *publisher; /* borrowed; NULL: nothing waits for the calls below */
	uint8_t *bounce; /* VF_BOUNCE_BYTES, page-aligned: misaligned memory under O_DIRECT, and zeroes */
};

#define VF_BOUNCE_BYTES (1u << 20)
#define VF_TOUCH_BYTES 4096u /* no page is smaller */

/* 0 or -errno; on an error nothing is held. */
int vf_store_open(struct vf_store *store);
void vf_store_close(struct vf_store *store);

/* Unlock the store's bytes, which vf_memory_lock_used() has locked: they are as large as the disk. */
void vf_store_unlock_memory(const struct vf_store *store);

/* Map a file for reading, if that is configured and possible: for an engine that reads by vf_store_do(). */
void vf_store_map(struct vf_store *store);

/* Whether reads that do not wait for the disk are possible. 0 or -errno: -EOPNOTSUPP on tmpfs, for example. */
int vf_store_nowait(const struct vf_store *store);

/* The device has become as large as this; nothing is in flight. */
void vf_store_resize(struct vf_store *store, uint64_t size_bytes);

/* Whether a request's memory and offset are aligned for O_DIRECT. */
int vf_store_is_aligned(const struct vf_store *store, const struct vf_req *req);

/* Whether the kernel can carry out a transfer as it is. */
int vf_store_takes(const struct vf_store *store, const struct vf_req *req);

/* Check, after a successful sync, whether a write-back of the store has failed since the last check, or since its witness was
 * opened. No I/O, and no waiting. 0 or -errno. */
int vf_store_verify(const struct vf_store *store);

/* Map every page of a buffered write's memory that this process has not used before. From Linux 6.15 on the kernel copies such
 * a write without doing that: it stops at each page that is not mapped, gives up the large folio that it has begun, and where the
 * write is not aligned to the store's pages, reads one from the disk for each. 0, or -EFAULT where a page has vanished. */
int vf_store_fault_in(struct vf_store *store, const struct iovec *iov, uint32_t iov_count);

/* Whether that is worthwhile for a request. */
static inline int vf_store_wants_fault_in(const struct vf_store *store, const struct vf_req *req)
{
	return req->op == VF_OP_WRITE && req->left_bytes > VF_TOUCH_BYTES && store->direct_align == 0;
}

/* Carry out the rest of a request, blocking: short transfers continued, EINTR repeated. Returns 0 or -errno; the
 * request's cursor tells how far it came. */
int vf_store_do(struct vf_store *store, struct vf_req *req);

/* Whether an error means that the store can never do an operation, so that it is not tried again. */
static inline int vf_store_is_unsupported(int err)
{
	return err == -EOPNOTSUPP || err == -ENOSYS || err == -ENODEV || err == -ENOTTY;
}

/* Whether an error is a refusal, and no failure of storage. File systems may refuse fallocate() for a file or a range (EINVAL),
 * for now (EBUSY), or for the file's use (EPERM: append-only, ETXTBSY: swapped to). Disks may refuse a discard (EREMOTEIO).
 * There is another way then, or nothing is lost. */
static inline int vf_store_is_refused(int err)
{
	return vf_store_is_unsupported(err) || err == -EINVAL || err == -EBUSY || err == -EPERM || err == -ETXTBSY ||
	       err == -EREMOTEIO;
}

/* Advance a request's cursor over n bytes moved. n is at most what is left. */
static inline void vf_req_advance(struct vf_req *req, uint64_t n)
{
	req->offset_bytes += n;
	req->left_bytes -= n;
	while (n) {
		struct iovec *iov = req->iov;

		if (n < iov->iov_len) {
			iov->iov_base = (uint8_t *)iov->iov_base + n;
			iov->iov_len -= n;
			return;
		}
		n -= iov->iov_len;
		req->iov++;
		req->iov_count--;
	}
}

#endif
