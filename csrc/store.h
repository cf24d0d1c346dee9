/* SPDX-License-Identifier: Apache-2.0
 *
 * A store: what holds the bytes, as a worker sees it. The calls here block; the sync engine is made of them, and the
 * uring engine uses them for what a ring cannot do.
 */
#ifndef VF_STORE_H
#define VF_STORE_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>

#include "request.h"
#include "store_map.h"

enum vf_store_kind {
	VF_STORE_FILE,
	VF_STORE_BLOCKDEV,
	VF_STORE_MEMORY,
	VF_STORE_NULL,
	VF_STORE_PLUGIN, /* only its engine knows it: of the functions below none but open, close and resize are for it */
};

enum vf_store_cache {
	VF_CACHE_WRITEBACK,
	VF_CACHE_WRITETHROUGH, /* every write is durable when it is answered */
	VF_CACHE_NONE, /* O_DIRECT */
	VF_CACHE_UNSAFE, /* a flush does nothing */
};

#define VF_HOLD_MAX 2u

struct vf_store {
	int fd; /* borrowed; -1 for null and plugin */
	enum vf_store_kind kind;
	enum vf_store_cache cache;
	uint32_t direct_align; /* of offset, length and memory under O_DIRECT; 0 = anything goes */
	uint64_t size_bytes;
	int write_flags; /* RWF_DSYNC or 0 */
	/* Borrowed. An engine whose requests can outlive its process keeps them open until the last one has ended: whoever
	 * waits for their other end, or for the file behind them, knows then that nothing is written any more. */
	int hold_fds[VF_HOLD_MAX];
	uint32_t hold_count;
	uint8_t no_punch_hole; /* the store has refused it: do not ask again */
	uint8_t no_zero_range;
	uint8_t sqpoll; /* of the uring engine: a thread of the kernel's takes what is submitted */
	uint8_t merge; /* adjacent requests may become one call */
	uint8_t map_reads; /* read through a mapping where that is possible */
	uint8_t *map; /* of a memory store */
	struct vf_store_map read_map; /* of a file on tmpfs, while `map_reads` */
	uint8_t *bounce; /* VF_BOUNCE_BYTES, page-aligned: misaligned memory under O_DIRECT, and zeroes */
};

#define VF_BOUNCE_BYTES (1u << 20)

/* 0 or -errno; on an error nothing is held. */
int vf_store_open(struct vf_store *store);
void vf_store_close(struct vf_store *store);

/* Map a file for reading, if that is wanted and possible: for an engine that reads by vf_store_do(). */
void vf_store_map(struct vf_store *store);

/* Whether a read can be told not to wait for the disk. 0 or -errno: -EOPNOTSUPP on tmpfs, for one. */
int vf_store_nowait(const struct vf_store *store);

/* The device has become as large as this; nothing is in flight. */
void vf_store_resize(struct vf_store *store, uint64_t size_bytes);

/* Whether a request's memory is such that O_DIRECT takes it. */
int vf_store_takes(const struct vf_store *store, const struct vf_req *req);

/* Carry out the rest of a request, blocking: short transfers continued, EINTR repeated. Returns 0 or -errno; the
 * request's cursor tells how far it came. */
int vf_store_do(struct vf_store *store, struct vf_req *req);

/* Whether the store has said that it cannot do a thing at all: there is another way, or nothing is lost. */
static inline int vf_store_is_unsupported(int err)
{
	return err == -EOPNOTSUPP || err == -ENOSYS || err == -ENODEV || err == -ENOTTY;
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
