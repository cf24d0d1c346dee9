/* SPDX-License-Identifier: Apache-2.0
 *
 * The seam between the loop and the ring formats: the only place that knows which formats there are. Another format
 * adds a member to the union and a branch to each function; the loop does not change.
 */
#ifndef VF_VRING_FORMAT_H
#define VF_VRING_FORMAT_H

#include "vring_split.h"

#define VF_F_RING_INDIRECT_DESC 28u
#define VF_F_RING_EVENT_IDX 29u

struct vf_vring {
	union {
		struct vf_split split;
	};
	uint64_t desc_addr; /* IOVAs, to map the areas again after an invalidation */
	uint64_t driver_addr;
	uint64_t device_addr;
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
	uint32_t size = vr->split.size;

	if (vr->desc_addr % 16u || vr->driver_addr % 2u || vr->device_addr % 4u)
		return -VF_RING_MISALIGNED;
	void *desc = vf_vring_area(tlb, vr->desc_addr, vf_split_desc_bytes(size), VF_PERM_RO);
	void *avail = vf_vring_area(tlb, vr->driver_addr, vf_split_avail_bytes(size), VF_PERM_RO);
	void *used = vf_vring_area(tlb, vr->device_addr, vf_split_used_bytes(size), VF_PERM_RW);
	if (!desc || !avail || !used)
		return -VF_RING_UNMAPPED;
	/* An IOVA is aligned; the address behind it is only as aligned as the region's offset in its file. */
	if ((uintptr_t)desc % 8u || (uintptr_t)avail % 2u || (uintptr_t)used % 4u)
		return -VF_RING_MISALIGNED;
	vf_split_set_areas(&vr->split, desc, avail, used);
	vr->mapped = 1;
	return 0;
}

/* Set a queue up. -EINVAL for a size that VIRTIO 1.3, 2.7 does not allow. */
static inline int vf_vring_setup(struct vf_vring *vr, uint64_t acked_features, uint32_t size, uint64_t desc_addr,
				 uint64_t driver_addr, uint64_t device_addr)
{
	if (size < 2u || size > VF_QUEUE_SIZE_MAX || (size & (size - 1u)))
		return -EINVAL;
	*vr = (struct vf_vring){
		.desc_addr = desc_addr,
		.driver_addr = driver_addr,
		.device_addr = device_addr,
	};
	vr->split.size = size;
	vr->split.mask = (uint16_t)(size - 1u);
	vr->split.event_idx = (acked_features >> VF_F_RING_EVENT_IDX) & 1u;
	vr->split.indirect = (acked_features >> VF_F_RING_INDIRECT_DESC) & 1u;
	return 0;
}

static inline void vf_vring_start(struct vf_vring *vr, uint16_t last_avail_idx)
{
	vf_split_start(&vr->split, last_avail_idx);
}

static inline int vf_vring_available(struct vf_vring *vr)
{
	return vf_split_available(&vr->split);
}

static inline int vf_vring_pop(struct vf_vring *vr, struct vf_iotlb *tlb, struct vf_chain *chain)
{
	return vf_split_pop(&vr->split, tlb, chain);
}

static inline int vf_vring_walk(struct vf_vring *vr, struct vf_iotlb *tlb, uint16_t head, struct vf_chain *chain)
{
	return vf_split_walk(&vr->split, tlb, head, chain);
}

static inline uint32_t vf_vring_size(const struct vf_vring *vr)
{
	return vr->split.size;
}

static inline int vf_vring_used_since(const struct vf_vring *vr, uint16_t logged_used_idx)
{
	return vf_split_used_since(&vr->split, logged_used_idx);
}

static inline uint32_t vf_vring_used_head(const struct vf_vring *vr, uint16_t idx)
{
	return vf_split_used_head(&vr->split, idx);
}

static inline int vf_vring_is_idle(const struct vf_vring *vr)
{
	return vf_split_is_idle(&vr->split);
}

static inline int vf_vring_could_take(const struct vf_vring *vr, uint16_t last_avail_idx)
{
	return vf_split_could_take(&vr->split, last_avail_idx);
}

static inline void vf_vring_unpop(struct vf_vring *vr)
{
	vf_split_unpop(&vr->split);
}

static inline void vf_vring_prefetch(const struct vf_vring *vr, const struct vf_iotlb *tlb, uint32_t count)
{
	vf_split_prefetch(&vr->split, tlb, count);
}

static inline void vf_vring_push(struct vf_vring *vr, uint16_t head, uint32_t written_bytes)
{
	vf_split_push(&vr->split, head, written_bytes);
}

static inline void vf_vring_publish(struct vf_vring *vr)
{
	vf_split_publish(&vr->split);
}

static inline int vf_vring_irq_wanted(struct vf_vring *vr)
{
	return vf_split_irq_wanted(&vr->split);
}

static inline uint32_t vf_vring_irq_owed(const struct vf_vring *vr)
{
	return vf_split_irq_owed(&vr->split);
}

static inline void vf_vring_kick_disable(struct vf_vring *vr)
{
	vf_split_kick_disable(&vr->split);
}

static inline int vf_vring_kick_enable(struct vf_vring *vr)
{
	return vf_split_kick_enable(&vr->split);
}

static inline uint16_t vf_vring_last_avail_idx(const struct vf_vring *vr)
{
	return vr->split.last_avail_idx;
}

static inline uint16_t vf_vring_last_used_idx(const struct vf_vring *vr)
{
	return vr->split.published_used_idx;
}

#endif
