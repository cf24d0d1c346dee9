/* SPDX-License-Identifier: Apache-2.0
 *
 * The calls that wait: each thread has a user of the disk, which carries out one request at a time. Without O_DIRECT any
 * offset and length will do; blocks that a write covers in part are read first, under a lock that all processes respect.
 */
#ifndef VF_TRANSFER_H
#define VF_TRANSFER_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "preload/files.h"

#define VF_TRANSFER_MAX_BYTES 0x7ffff000u /* of one read or write, as Linux's */
#define VF_AT_POSITION (-1) /* in place of an offset: where the description stands, which is moved */

/* As preadv2() and pwritev2() of a block device. */
ssize_t vf_transfer(struct vf_file *file, bool write, const struct iovec *iov, int iov_count, int64_t offset,
		    uint32_t rwf_flags);

/* Each returns 0, or -1 with errno. Of a range: whole blocks inside the capacity, checked by the caller. */
int vf_flush(void);
int vf_discard(uint64_t offset_bytes, uint64_t length_bytes);
int vf_write_zeroes(uint64_t offset_bytes, uint64_t length_bytes, bool may_write_data);

#endif
