/* SPDX-License-Identifier: Apache-2.0
 *
 * The seam between the driver and the ring formats: a kernel's virtio_ring, for tests and benchmarks. The only place that
 * knows which formats there are.
 */
#ifndef VF_DRIVER_VQ_H
#define VF_DRIVER_VQ_H

#include "driver/driver_packed.h"
#include "driver/driver_split.h"

/* The parts of a vq. `state` holds `size` entries; it and the areas, zeroed memory, are borrowed for the vq's life. */
struct vf_drv_vq_params {
	void *desc; /* descriptor table or descriptor ring */
	void *driver; /* available ring or driver event suppression */
	void *device; /* used ring or device event suppression */
	struct vf_drv_desc_state *state;
	uint32_t size;
	uint32_t start; /* where the device begins: split: its index; packed: as vf_drv_packed_init() has it */
	bool packed;
	bool event_idx;
	bool in_order;
};

/* -EINVAL when the size is no power of two from 2 to 32768, an area is misaligned, or `start` is no place in the ring. */
static inline int vf_drv_vq_init(struct vf_drv_vq *vq, const struct vf_drv_vq_params *params)
{
	uint32_t size = params->size;

	if (size < 2 || size > VF_QUEUE_SIZE_MAX || (size & (size - 1)))
		return -EINVAL;
	memset(vq, 0, sizeof(*vq));
	vq->state = params->state;
	vq->size = (uint16_t)size;
	vq->mask = (uint16_t)(size - 1u);
	vq->event_idx = params->event_idx;
	vq->in_order = params->in_order;
	vq->is_packed = params->packed;
	vf_drv_ring_link(vq);
	if (vq->is_packed)
		return vf_drv_packed_init(vq, params->desc, params->driver, params->device, params->start);
	return vf_drv_split_init(vq, params->desc, params->driver, params->device, params->start);
}

/* Add one chain of direct descriptors. Returns the number it is reaped by, or -ENOSPC when so many descriptors are not
 * free. The device sees it only after vf_drv_vq_publish(). */
static inline int vf_drv_vq_add(struct vf_drv_vq *vq, const struct vf_drv_segment *segments, uint32_t count,
				uint32_t cookie)
{
	if (vf_unlikely(count == 0 || count > vq->free_count))
		return -ENOSPC;
	return vq->is_packed ? vf_drv_packed_add(vq, segments, count, cookie) :
			       vf_drv_split_add(vq, segments, count, cookie);
}

/* vf_drv_vq_add() for the commonest chain, header, data and status, with nothing to loop over. */
static inline int vf_drv_vq_add_three(struct vf_drv_vq *vq, const struct vf_drv_three *three, uint32_t cookie)
{
	if (vf_unlikely(vq->free_count < 3))
		return -ENOSPC;
	return vq->is_packed ? vf_drv_packed_add_three(vq, three, cookie) : vf_drv_split_add_three(vq, three, cookie);
}

/* Add one chain whose descriptors are in `table` (16 bytes each, at IOVA `table_iova`, borrowed until the chain is
 * reaped): it takes a single descriptor of the ring. Returns as vf_drv_vq_add() does. */
static inline int vf_drv_vq_add_indirect(struct vf_drv_vq *vq, void *table, uint64_t table_iova,
					 const struct vf_drv_segment *segments, uint32_t count, uint32_t cookie)
{
	if (vf_unlikely(count == 0 || vq->free_count == 0))
		return -ENOSPC;
	return vq->is_packed ? vf_drv_packed_add_indirect(vq, table, table_iova, segments, count, cookie) :
			       vf_drv_split_add_indirect(vq, table, table_iova, segments, count, cookie);
}

/* Publish the added chains. Returns 1 when the device wants a kick, else 0. */
static inline int vf_drv_vq_publish(struct vf_drv_vq *vq)
{
	if (vq->avail_idx == vq->published_idx)
		return 0;
	return vq->is_packed ? vf_drv_packed_publish(vq) : vf_drv_split_publish(vq);
}

/* Whether vf_drv_vq_reap() has a result: finished chains, or a device that broke the ring. */
static inline bool vf_drv_vq_has_used(const struct vf_drv_vq *vq)
{
	return vq->is_packed ? vf_drv_packed_has_used(vq) : vf_drv_split_used_count(vq) != 0;
}

/* Pop up to `max` finished chains. Returns how many, or -EPROTO when the device completes what is not in flight, or what
 * is not next under IN_ORDER; chains before that are returned first. */
static inline int vf_drv_vq_reap(struct vf_drv_vq *vq, struct vf_drv_used *out, uint32_t max)
{
	return vq->is_packed ? vf_drv_packed_reap(vq, out, max) : vf_drv_split_reap(vq, out, max);
}

/* Ask for no interrupts. */
static inline void vf_drv_vq_disable_irq(struct vf_drv_vq *vq)
{
	if (vq->is_packed)
		vf_drv_packed_disable_irq(vq);
	else
		vf_drv_split_disable_irq(vq);
}

/* Ask for an interrupt at the next finished chain. Returns whether there is one already: sleep only when there is none. */
static inline bool vf_drv_vq_enable_irq(struct vf_drv_vq *vq)
{
	return vq->is_packed ? vf_drv_packed_enable_irq(vq) : vf_drv_split_enable_irq(vq);
}

/* Where a device begins that has finished all that was added, as vf_drv_vq_params.start. */
static inline uint32_t vf_drv_vq_position(const struct vf_drv_vq *vq)
{
	return vq->is_packed ? vf_drv_packed_position(vq) : vq->avail_idx;
}

#endif
