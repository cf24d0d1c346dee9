/* SPDX-License-Identifier: Apache-2.0
 *
 * Structures and numbers of a packed virtqueue (VIRTIO 1.3, 2.8), for both of its sides.
 */
#ifndef VF_VRING_PACKED_ABI_H
#define VF_VRING_PACKED_ABI_H

#include <stdint.h>

/* Bits of a descriptor's flags, besides VF_DESC_F_*. Available: AVAIL is the driver's wrap counter, USED its inverse. Used:
 * both are the device's wrap counter (2.8.1). */
#define VF_PACKED_DESC_F_AVAIL_BIT 7u
#define VF_PACKED_DESC_F_USED_BIT 15u
#define VF_PACKED_DESC_F_AVAIL (1u << VF_PACKED_DESC_F_AVAIL_BIT)
#define VF_PACKED_DESC_F_USED (1u << VF_PACKED_DESC_F_USED_BIT)

/* vf_packed_event.flags */
#define VF_PACKED_EVENT_ENABLE 0u
#define VF_PACKED_EVENT_DISABLE 1u
#define VF_PACKED_EVENT_DESC 2u /* at the descriptor that off_wrap names; with EVENT_IDX alone */

/* vf_packed_event.off_wrap: the slot, and the wrap counter above it */
#define VF_PACKED_EVENT_WRAP_BIT 15u

struct vf_packed_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t id;
	uint16_t flags;
};

/* The driver's: for which used descriptors it wants interrupts. The device's: for which available ones it wants kicks. */
struct vf_packed_event {
	uint16_t off_wrap;
	uint16_t flags;
};

_Static_assert(sizeof(struct vf_packed_desc) == 16, "VIRTIO 1.3, 2.8.13");
_Static_assert(sizeof(struct vf_packed_event) == 4, "VIRTIO 1.3, 2.8.14");

#endif
