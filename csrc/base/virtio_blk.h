/* SPDX-License-Identifier: Apache-2.0
 *
 * Definitions of VIRTIO 1.3 for both sides of a block device: feature bits (6 and 5.2.3) and requests (5.2.6).
 */
#ifndef VF_VIRTIO_BLK_H
#define VF_VIRTIO_BLK_H

#include <stdint.h>

#define VF_SECTOR_BYTES 512u

/* Bit numbers; vdusefast/transport/uapi.py has the same as masks, and a test compares them. */
#define VF_BLK_F_SIZE_MAX 1u
#define VF_BLK_F_SEG_MAX 2u
#define VF_BLK_F_FLUSH 9u
#define VF_BLK_F_DISCARD 13u
#define VF_BLK_F_WRITE_ZEROES 14u
#define VF_RING_F_INDIRECT_DESC 28u
#define VF_RING_F_EVENT_IDX 29u
#define VF_F_RING_PACKED 34u
#define VF_F_IN_ORDER 35u

#define VF_BLK_T_IN 0u
#define VF_BLK_T_OUT 1u
#define VF_BLK_T_FLUSH 4u
#define VF_BLK_T_GET_ID 8u
#define VF_BLK_T_DISCARD 11u
#define VF_BLK_T_WRITE_ZEROES 13u

#define VF_BLK_S_OK 0u
#define VF_BLK_S_IOERR 1u
#define VF_BLK_S_UNSUPP 2u

#define VF_BLK_ID_BYTES 20u
#define VF_BLK_HEADER_BYTES 16u
#define VF_BLK_WRITE_ZEROES_F_UNMAP 1u

struct vf_blk_header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

/* struct virtio_blk_discard_write_zeroes */
struct vf_blk_range {
	uint64_t sector;
	uint32_t num_sectors;
	uint32_t flags;
};

_Static_assert(sizeof(struct vf_blk_header) == VF_BLK_HEADER_BYTES, "VIRTIO 1.3, 5.2.6");
_Static_assert(sizeof(struct vf_blk_range) == 16, "VIRTIO 1.3, 5.2.6");

static inline int vf_has_feature(uint64_t features, unsigned int bit)
{
	return (int)(features >> bit & 1u);
}

#endif
