/* SPDX-License-Identifier: Apache-2.0
 *
 * Regions of the driver's memory as registered buffers of an io_uring: the kernel looks their pages up and pins them once,
 * not for every request. Only with O_DIRECT, where each request would pin them. Only regions whose pages all exist,
 * because pinning would allocate the others, as in a bounce area that no request has used yet.
 */
#ifndef VF_FIXED_BUFFERS_H
#define VF_FIXED_BUFFERS_H

#include <liburing.h>
#include <stdint.h>

#define VF_FIXED_MAX 64u
#define VF_FIXED_BYTES ((size_t)1 << 30) /* the kernel's limit of one buffer */

struct vf_fixed_buffers {
	struct io_uring *ring; /* borrowed; NULL: no table */
	int refused; /* -errno of a refusal that holds for all regions: no more memory may be pinned */
	uint32_t count; /* of places that are or were in use */
	uint32_t last_hit;
	struct iovec buffer[VF_FIXED_MAX]; /* length 0: a free place */
};

/* Make a table in ring, if the kernel supports that (5.19). */
void vf_fixed_open(struct vf_fixed_buffers *fixed, struct io_uring *ring);

/* Register [va, va + len_bytes) if that is possible. */
void vf_fixed_add(struct vf_fixed_buffers *fixed, void *va, size_t len_bytes);

/* Release all within [va, va + len_bytes); nothing is in flight. */
void vf_fixed_drop(struct vf_fixed_buffers *fixed, const void *va, size_t len_bytes);

/* The index of the buffer that holds [va, va + len_bytes), or -1. */
static inline int vf_fixed_find(struct vf_fixed_buffers *fixed, const void *va, size_t len_bytes)
{
	for (uint32_t turn = 0; turn < fixed->count; turn++) {
		uint32_t i = turn == 0 ? fixed->last_hit : turn - (turn <= fixed->last_hit);
		uintptr_t offset = (uintptr_t)va - (uintptr_t)fixed->buffer[i].iov_base;

		if (offset < fixed->buffer[i].iov_len && len_bytes <= fixed->buffer[i].iov_len - offset) {
			fixed->last_hit = i;
			return (int)i;
		}
	}
	return -1;
}

#endif
