/* SPDX-License-Identifier: Apache-2.0
 *
 * What a process remembers of a slot that it has in flight: a piece of a request of its program.
 */
#ifndef VF_PIECES_H
#define VF_PIECES_H

#include "preload/disk.h"

struct vf_piece {
	struct vf_disk_io *io; /* NULL: none in flight */
	struct vf_disk_user *user;
	uint64_t iova; /* of direct data; 0: through the slot's buffer */
	uint32_t length_bytes;
	bool whole; /* all of the request, of which nothing else is noted: see plain.h */
	uint32_t iov_index; /* where its data begins in the vector */
	size_t iov_used_bytes;
};

#endif
