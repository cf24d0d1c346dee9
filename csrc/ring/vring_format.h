/* SPDX-License-Identifier: Apache-2.0
 *
 * The seam between the loop and the ring formats: the only place that knows which formats there are. Another format
 * adds a member to the union and a branch to each function; the loop does not change.
 */
#ifndef VF_VRING_FORMAT_H
#define VF_VRING_FORMAT_H

#include "base/virtio_blk.h"
#include "ring/vring_packed.h"
#include "ring/vring_split.h"

struct vf_vring {
	union {
		struct vf_split split;
		struct vf_packed packed;
	};
	uint64_t desc_addr; /* IOVAs, to map the areas again after an invalidation */
	uint64_t driver_addr;
	uint64_t device_addr;
	uint32_t size;
	uint8_t is_packed;
	uint8_t ordered; /* chains are completed in the order in which they are popped */
	uint8_t mapped;
};

/* Translate one area. NULL unless one region holds it all with that permission. */
static inline void *vf_vring_area(struct vf_iotlb *tlb, uint64_t iova, size_t len_bytes, uint32_t perm)
{
	uint32_t run;

	if (iova > UINT64_MAX - (len_bytes - 1u))
		return NULL;
	void *va = vf_iotlb_translate(tlb, iova, (uint32_t)len_bytes, perm, &run);
	return va && run == len_bytes ? va : NULL;
}

/* Map the areas named by the addresses. 0 or -enum vf_ring_error. */
static inline int vf_vring_map(struct vf_vring *vr, struct vf_iotlb *tlb)
{
	uint32_t size = vr->size;
	/* Descriptors, the driver's area, the device's: bytes and alignment (VIRTIO 1.3, 2.7 and 2.8.10.1). */
	size_t desc_bytes = vr->is_packed ? vf_packed_desc_bytes(size) : vf_split_desc_bytes(size);
	size_t driver_bytes = vr->is_packed ? sizeof(struct vf_packed_event) : vf_split_avail_bytes(size);
	size_t device_bytes = vr->is_packed ? sizeof(struct vf_packed_event) : vf_split_used_bytes(size);
	uint32_t driver_align = vr->is_packed ? 4u : 2u;

	if (vr->desc_addr % 16u || vr->driver_addr % driver_align || vr->device_addr % 4u)
		return -VF_RING_MISALIGNED;
	void *desc = vf_vring_area(tlb, vr->desc_addr, desc_bytes, vr->is_packed ? VF_PERM_RW : VF_PERM_RO);
	void *driver = vf_vring_area(tlb, vr->driver_addr, driver_bytes, VF_PERM_RO);
	void *device = vf_vring_area(tlb, vr->device_addr, device_bytes, VF_PERM_RW);
	if (!desc || !driver || !device)
		return -VF_RING_UNMAPPED;
	/* The IOVA is aligned, but its address is only as aligned as the region's offset in its file. */
	if ((uintptr_t)desc % 8u || (uintptr_t)driver % driver_align || (uintptr_t)device % 4u)
		return -VF_RING_MISALIGNED;
	if (vr->is_packed)
		vf_packed_set_areas(&vr->packed, desc, driver, device);
	else
		vf_split_set_areas(&vr->split, desc, driver, device);
	vr->mapped = 1;
	return 0;
}

/* Whether VIRTIO 1.3, 2.7 and 2.8.10.1, allow a ring of that size: a split one is a power of two. It may be larger than the device
 * has offered: drivers set such rings up over vhost, which passes any size on. */
static inline int vf_vring_size_is_valid(uint32_t size, int is_packed)
{
	return size >= 1u && size <= VF_QUEUE_SIZE_MAX && (is_packed || (size & (size - 1u)) == 0);
}

/* Set a queue up. log_header, log: of the queue, with room for an entry for each descriptor. -EINVAL for a size that is none. */
static inline int vf_vring_setup(struct vf_vring *vr, uint64_t acked_features, uint32_t size, uint64_t desc_addr,
				 uint64_t driver_addr, uint64_t device_addr, struct vf_inflight_header *log_header,
				 struct vf_inflight_entry *log)
{
	uint8_t event_idx = vf_has_feature(acked_features, VF_RING_F_EVENT_IDX);
	uint8_t indirect = vf_has_feature(acked_features, VF_RING_F_INDIRECT_DESC);
	uint8_t in_order = vf_has_feature(acked_features, VF_F_IN_ORDER);

	if (!vf_vring_size_is_valid(size, vf_has_feature(acked_features, VF_F_RING_PACKED)))
		return -EINVAL;
	*vr = (struct vf_vring){
		.desc_addr = desc_addr,
		.driver_addr = driver_addr,
		.device_addr = device_addr,
		.size = size,
		.is_packed = vf_has_feature(acked_features, VF_F_RING_PACKED),
	};
	vr->ordered = vr->is_packed || in_order;
	if (vr->is_packed) {
		vr->packed.log_header = log_header;
		vr->packed.log = log;
		vr->packed.size = size;
		vr->packed.event_idx = event_idx;
		vr->packed.indirect = indirect;
		vr->packed.in_order = in_order;
		return 0;
	}
	vr->split.size = size;
	vr->split.mask = (uint16_t)(size - 1u);
	vr->split.event_idx = event_idx;
	vr->split.indirect = indirect;
	vr->split.in_order = in_order;
	return 0;
}

/* The format of the in-flight log that goes with the ring. */
static inline enum vf_log_format vf_vring_log_format(const struct vf_vring *vr)
{
	if (vr->is_packed)
		return VF_LOG_PACKED;
	return vr->ordered ? VF_LOG_SPLIT_IN_ORDER : VF_LOG_SPLIT;
}

/* Start where nothing is in flight. state: an index of a split ring, a position of a packed one. 0, or -VF_RING_LOG for a
 * position outside the ring. */
static inline int vf_vring_start(struct vf_vring *vr, uint16_t state)
{
	if (vr->is_packed)
		return vf_packed_start(&vr->packed, state);
	vf_split_start(&vr->split, state);
	return 0;
}

/* How many chains are available, as far as that is known without walking them: of a packed ring 1 means some. 0, or
 * -enum vf_ring_error. */
static inline int vf_vring_available(struct vf_vring *vr)
{
	return vr->is_packed ? vf_packed_available(&vr->packed) : vf_split_available(&vr->split);
}

/* Pop the next chain. 0, VF_RING_EMPTY, or -enum vf_ring_error. */
static inline int vf_vring_pop(struct vf_vring *vr, struct vf_iotlb *tlb, struct vf_chain *chain)
{
	return vr->is_packed ? vf_packed_pop(&vr->packed, tlb, chain) : vf_split_pop(&vr->split, tlb, chain);
}

/* Prefetch for the next count pops; hints. */
static inline void vf_vring_prefetch(const struct vf_vring *vr, const struct vf_iotlb *tlb, uint32_t count)
{
	if (vr->is_packed)
		vf_packed_prefetch(&vr->packed, tlb, count);
	else
		vf_split_prefetch(&vr->split, tlb, count);
}

static inline void vf_vring_push(struct vf_vring *vr, uint16_t head, uint16_t id, uint32_t slot_count, uint32_t written_bytes,
				 int full)
{
	if (vr->is_packed)
		vf_packed_push(&vr->packed, id, slot_count, written_bytes, full);
	else
		vf_split_push(&vr->split, head, written_bytes, full);
}

static inline void vf_vring_publish(struct vf_vring *vr)
{
	if (vr->is_packed)
		vf_packed_publish(&vr->packed);
	else
		vf_split_publish(&vr->split);
}

static inline int vf_vring_irq_wanted(struct vf_vring *vr)
{
	return vr->is_packed ? vf_packed_irq_wanted(&vr->packed) : vf_split_irq_wanted(&vr->split);
}

static inline uint32_t vf_vring_irq_owed(const struct vf_vring *vr)
{
	return vr->is_packed ? vr->packed.owed_count : vf_split_irq_owed(&vr->split);
}

static inline void vf_vring_kick_disable(struct vf_vring *vr)
{
	if (vr->is_packed)
		vf_packed_kick_disable(&vr->packed);
	else
		vf_split_kick_disable(&vr->split);
}

static inline int vf_vring_kick_enable(struct vf_vring *vr)
{
	return vr->is_packed ? vf_packed_kick_enable(&vr->packed) : vf_split_kick_enable(&vr->split);
}

/* Where the device pops next: an index, or a position. */
static inline uint16_t vf_vring_avail_state(const struct vf_vring *vr)
{
	return vr->is_packed ? vf_packed_avail_position(&vr->packed) : vr->split.last_avail_idx;
}

/* The published position: the used index, or the position of the next used element. */
static inline uint16_t vf_vring_used_state(const struct vf_vring *vr)
{
	return vr->is_packed ? vf_packed_used_position(&vr->packed) : vr->split.published_used_idx;
}

#endif
