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

/* A queue, as its user sees it that works on it. */
struct vf_plain_queue {
	struct vf_board_parts *parts;
	struct vf_piece *pieces;
	uint32_t slot_count;
	bool tagged; /* vf_drv_split_add_tagged() will do */
};

enum vf_put { VF_PUT_DONE, VF_PUT_NO_ROOM, VF_PUT_STALE };

/* Put a request on the queue. Nothing is done unless it returns VF_PUT_DONE. */
static inline enum vf_put vf_plain_put(struct vf_disk_user *user, const struct vf_plain_queue *at, struct vf_disk_io *io,
				       uint64_t iova, uint32_t generation)
{
	struct vf_board_queue *queue = at->parts->queue;
	uint32_t left = queue->free_count - 1u, reads = io->op ^ 1u, length = (uint32_t)io->length_bytes;

	/* Each free slot keeps a descriptor for a table. */
	if (vf_unlikely(left >= at->slot_count || queue->vq.free_count < 3u + left))
		return VF_PUT_NO_ROOM;
	uint32_t slot = at->parts->free_slots[left];
	if (vf_unlikely(slot >= at->slot_count))
		return VF_PUT_NO_ROOM; /* the board was written over */
	struct vf_piece *piece = &at->pieces[slot];
	vf_store_relaxed_u64(&piece->iova, iova);
	if (vf_piece_is_stale(user->client, generation)) {
		vf_store_relaxed_u64(&piece->iova, 0);
		return VF_PUT_STALE;
	}
	piece->io = io;
	piece->user = user;
	piece->whole = true;
	uint8_t *line = vf_board_line(at->parts, slot);
	*(struct vf_blk_header *)(void *)line = (struct vf_blk_header){ io->op, 0, io->offset_bytes / VF_SECTOR_BYTES };
	vf_store_relaxed_u8(line + VF_BOARD_STATUS_AT, VF_BOARD_STATUS_UNSET);
	struct vf_board_slot *s = &at->parts->slots[slot];
	s->owner = user->number;
	s->segment_count = 1;
	s->data[0] = (struct vf_drv_segment){ iova, length, reads };
	vf_store_relaxed_u32(&s->state, VF_SLOT_INFLIGHT);
	vf_fence_compiler();
	queue->free_count = left;
	struct vf_drv_three three = {
		.header_iova = (uintptr_t)line,
		.data_iova = iova,
		.status_iova = (uintptr_t)line + VF_BOARD_STATUS_AT,
		.header_bytes = sizeof(struct vf_blk_header),
		.data_bytes = length,
		.data_flags = reads * VF_DESC_F_WRITE,
	};
	if (vf_likely(at->tagged))
		vf_drv_split_add_tagged(&queue->vq, &three, slot);
	else
		vf_drv_vq_add_three(&queue->vq, &three, slot);
	return VF_PUT_DONE;
}

#endif
