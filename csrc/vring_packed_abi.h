/* SPDX-License-Identifier: Apache-2.0
 *
 * What lies in the memory of a packed virtqueue (VIRTIO 1.3, 2.8), as driver and device see it.
 */
#ifndef VF_VRING_PACKED_ABI_H
#define VF_VRING_PACKED_ABI_H

#include <stdint.h>

#define VF_PACKED_DESC_F_AVAIL_BIT 7u
#define VF_PACKED_DESC_F_USED_BIT 15u
#define VF_PACKED_DESC_F_AVAIL (1u << VF_PACKED_DESC_F_AVAIL_BIT)
#define VF_PACKED_DESC_F_USED (1u << VF_PACKED_DESC_F_USED_BIT)

/* vf_packed_event.flags */
#define VF_PACKED_EVENT_ENABLE 0u
#define VF_PACKED_EVENT_DISABLE 1u
#define VF_PACKED_EVENT_DESC 2u

/* off_wrap: an offset into the ring, and the wrap counter that goes with it */
#define VF_PACKED_WRAP_BIT 15u
#define VF_PACKED_OFF_MASK 0x7fffu

struct vf_packed_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t id;
	uint16_t flags;
};

/* The event suppression structure. */
struct vf_packed_event {
	uint16_t off_wrap;
	uint16_t flags;
};

_Static_assert(sizeof(struct vf_packed_desc) == 16, "VIRTIO 1.3, 2.8.13");
_Static_assert(sizeof(struct vf_packed_event) == 4, "VIRTIO 1.3, 2.8.14");

#endif
