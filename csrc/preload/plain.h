/* SPDX-License-Identifier: Apache-2.0
 *
 * How the commonest request is put on a queue: all of it in one piece, whose data is one segment that the device reaches.
 */
#ifndef VF_PLAIN_H
#define VF_PLAIN_H

#include "preload/user.h"

_Static_assert(VF_DISK_READ == VF_BLK_T_IN && VF_DISK_WRITE == VF_BLK_T_OUT && VF_DESC_F_WRITE == 2, "op to type and flags");

/* Whether the memory that the device reaches has changed since `generation`. The address of the data is in a piece already: a
 * thread that takes memory away looks there after it has raised the generation (vf_areas_shrink()). */
static inline bool vf_piece_is_stale(const struct vf_client *client, uint32_t generation)
{
	if (vf_unlikely(!client->joined))
		vf_fence_full();
	vf_fence_compiler(); /* pairs with vf_membarrier() in vf_areas_shrink() */
	return vf_unlikely(vf_peek_u32(&vf_area_generation) != generation);
}

enum vf_put { VF_PUT_DONE, VF_PUT_NO_ROOM, VF_PUT_STALE };

/* Take a slot for a request, all of which goes from or to `iova`, and put what is noted of it into the slot: its piece, its
 * header, and what a successor needs. Its queue is locked, and has a free slot. It is not on the ring yet. */
static inline void vf_plain_fill(struct vf_disk_user *user, struct vf_board_slot *s, uint8_t *line, struct vf_piece *piece,
				 struct vf_disk_io *io, uint64_t iova)
{
	piece->io = io;
	piece->user = user;
	piece->whole = true;
	*(struct vf_blk_header *)(void *)line = (struct vf_blk_header){ io->op, 0, io->offset_bytes / VF_SECTOR_BYTES };
	vf_store_relaxed_u8(line + VF_BOARD_STATUS_AT, VF_BOARD_STATUS_UNSET);
	s->owner = user->number;
	s->segment_count = 1;
	s->data[0] = (struct vf_drv_segment){ iova, (uint32_t)io->length_bytes, io->op ^ 1u };
	vf_store_relaxed_u32(&s->state, VF_SLOT_INFLIGHT);
	vf_fence_compiler();
}

static inline struct vf_drv_three vf_plain_three(const struct vf_disk_io *io, const uint8_t *line, uint64_t iova)
{
	return (struct vf_drv_three){
		.header_iova = (uintptr_t)line,
		.data_iova = iova,
		.status_iova = (uintptr_t)line + VF_BOARD_STATUS_AT,
		.header_bytes = sizeof(struct vf_blk_header),
		.data_bytes = (uint32_t)io->length_bytes,
		.data_flags = (io->op ^ 1u) * VF_DESC_F_WRITE,
	};
}

#endif
