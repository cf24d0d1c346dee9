/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "engine/fixed_buffers.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define VF_FIXED_LOOK_PAGES 512u

void vf_fixed_open(struct vf_fixed_buffers *fixed, struct io_uring *ring)
{
	memset(fixed, 0, sizeof(*fixed));
	if (io_uring_register_buffers_sparse(ring, VF_FIXED_MAX) == 0)
		fixed->ring = ring;
}

/* Whether every page exists; one that is swapped out, or of a mapping that cannot tell, counts as absent. */
static int vf_fixed_exists(uint8_t *va, size_t len_bytes)
{
	size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
	uint8_t resident[VF_FIXED_LOOK_PAGES];

	for (size_t at = 0; at < len_bytes; at += VF_FIXED_LOOK_PAGES * page_bytes) {
		size_t rest = len_bytes - at;
		size_t part = rest < VF_FIXED_LOOK_PAGES * page_bytes ? rest : VF_FIXED_LOOK_PAGES * page_bytes;

		if (mincore(va + at, part, resident))
			return 0;
		for (size_t i = 0; i < part / page_bytes; i++) {
			if (!(resident[i] & 1u))
				return 0;
		}
	}
	return 1;
}

static int vf_fixed_update(struct vf_fixed_buffers *fixed, uint32_t index, void *va, size_t len_bytes)
{
	struct iovec iov = { .iov_base = va, .iov_len = len_bytes };
	__u64 tag = 0;
	int rc = io_uring_register_buffers_update_tag(fixed->ring, index, &iov, &tag, 1);

	return rc < 0 ? rc : 0;
}

static void vf_fixed_add_part(struct vf_fixed_buffers *fixed, uint8_t *va, size_t len_bytes)
{
	uint32_t i = 0;
	int err;

	while (i < fixed->count && fixed->buffer[i].iov_len)
		i++;
	if (i == VF_FIXED_MAX || !vf_fixed_exists(va, len_bytes))
		return;
	err = vf_fixed_update(fixed, i, va, len_bytes);
	/* Others (EFAULT: read-only, or no pages that can be pinned for long) are about this one region. */
	if (err == -ENOMEM)
		fixed->refused = err;
	if (err)
		return;
	fixed->buffer[i] = (struct iovec){ .iov_base = va, .iov_len = len_bytes };
	if (i == fixed->count)
		fixed->count++;
}

void vf_fixed_add(struct vf_fixed_buffers *fixed, void *va, size_t len_bytes)
{
	for (size_t at = 0; fixed->ring && !fixed->refused && at < len_bytes; at += VF_FIXED_BYTES) {
		size_t rest = len_bytes - at;

		vf_fixed_add_part(fixed, (uint8_t *)va + at, rest < VF_FIXED_BYTES ? rest : VF_FIXED_BYTES);
	}
}

void vf_fixed_drop(struct vf_fixed_buffers *fixed, const void *va, size_t len_bytes)
{
	for (uint32_t i = 0; i < fixed->count; i++) {
		struct iovec *buffer = &fixed->buffer[i];

		if (buffer->iov_len == 0 || (uintptr_t)buffer->iov_base - (uintptr_t)va >= len_bytes)
			continue;
		/* Even if that fails, the buffer is unused from now on; its pages are released with the ring at the latest. */
		(void)vf_fixed_update(fixed, i, NULL, 0);
		*buffer = (struct iovec){ .iov_len = 0 };
	}
}
