/* SPDX-License-Identifier: Apache-2.0
 *
 * The fast path for the commonest request: a read or write whose header, data and status are one descriptor each, in the regions
 * that the previous request used. It peeks at the next chain in the ring, and either makes a request of it, or changes nothing.
 * Then the general path (vf_vring_pop and blk_parse) copies, walks and checks the chain, and uses no value that was read here.
 *
 * The checks are those of blk_parse_any for such a request, on values in registers; nothing of the driver's memory is read twice.
 */
#ifndef VF_FAST_PATH_H
#define VF_FAST_PATH_H

#include "queue/queue.h"

#define VF_FAST_PATH_SHAPE_MASK 0x0000ffffffffffffull /* length and flags of a split descriptor */
#define VF_FAST_PATH_HEADER ((uint64_t)VF_DESC_F_NEXT << 32 | VF_BLK_HEADER_BYTES)
#define VF_FAST_PATH_STATUS ((uint64_t)VF_DESC_F_WRITE << 32 | 1u)
#define VF_FAST_PATH_DATA_MASK (0xffffull << 32 ^ (uint64_t)VF_DESC_F_WRITE << 32) /* its flags but the direction */
#define VF_FAST_PATH_DATA ((uint64_t)VF_DESC_F_NEXT << 32)

/* Cache the regions that hold this request's header and data, if both are read-write. */
static inline void vf_fast_path_aim(struct vf_iotlb *tlb, uint64_t header_iova, uint64_t data_iova)
{
	const struct vf_iotlb_region *head = vf_iotlb_find(tlb, header_iova), *data = vf_iotlb_find(tlb, data_iova);

	tlb->has_windows = 0;
	if (!head || !data || head->perm != VF_PERM_RW || data->perm != VF_PERM_RW ||
	    head->last - head->start < VF_BLK_HEADER_BYTES - 1u)
		return;
	tlb->head_start = head->start;
	tlb->head_base = head->base;
	tlb->header_span = head->last - head->start - (VF_BLK_HEADER_BYTES - 1u);
	tlb->status_span = head->last - head->start;
	tlb->data_start = data->start;
	tlb->data_base = data->base;
	tlb->data_span = data->last - data->start;
	tlb->has_windows = 1;
}

/* The shape of a segment for vf_fast_path_fill(). */
static inline uint64_t vf_fast_path_shape(const struct vf_segment *segment)
{
	return (uint64_t)segment->writable << 33 | segment->len;
}

/* Make a request of three segments of the right shapes. shape: length of the data, and VF_DESC_F_WRITE above 32 bits. 1, or 0 with
 * nothing done. */
static inline int vf_fast_path_fill(struct vf_queue *q, struct vf_req *req, uint64_t header_iova, uint64_t data_iova,
				uint64_t data_shape, uint64_t status_iova)
{
	const struct vf_iotlb *tlb = &q->tlb;
	uint32_t bytes = (uint32_t)data_shape, writable = (uint32_t)(data_shape >> 33) & 1u;
	/* Bytes of a broken sector end up at the top: what is too much, too little and broken is one comparison. */
	uint32_t sectors = bytes >> 9 | bytes << 23;
	uint64_t type, sector, end_sector, data_at = data_iova - tlb->data_start;

	/* Offsets modulo 2^64: an address below its window lies far above it. */
	if (vf_unlikely(header_iova - tlb->head_start > tlb->header_span || status_iova - tlb->head_start > tlb->status_span))
		return 0;
	_Static_assert(VF_SECTOR_BYTES == 1u << 9, "sectors");
	if (vf_unlikely(sectors - 1u >= q->fast_path_sectors_max))
		return 0;
	if (vf_unlikely(data_at > tlb->data_span || tlb->data_span - data_at < bytes - 1u))
		return 0;
	vf_load_pair_from_shared((const void *)(tlb->head_base + (uintptr_t)header_iova), &type, &sector);
	_Static_assert(VF_BLK_T_IN == 0 && VF_BLK_T_OUT == 1, "the type is the inverse of the direction");
	if (vf_unlikely((uint32_t)type != (writable ^ 1u) || (q->device.read_only && !writable)))
		return 0;
	if (vf_unlikely((sector | sectors) & (q->device.block_sectors - 1u) ||
			__builtin_add_overflow(sector, sectors, &end_sector) || end_sector > q->device.capacity_sectors))
		return 0;
	memset(req, 0, offsetof(struct vf_req, iov_count));
	req->op = (uint8_t)(writable ? VF_OP_READ : VF_OP_WRITE);
	req->iov_count = 1;
	req->iov = req->iov_base;
	req->iov->iov_base = (void *)(tlb->data_base + (uintptr_t)data_iova);
	req->iov->iov_len = bytes;
	req->offset_bytes = sector * VF_SECTOR_BYTES;
	req->left_bytes = bytes;
	req->data_bytes = bytes;
	req->writable_bytes = (uint64_t)(bytes & (0u - writable)) + 1u; /* the data of a read, and the status */
	req->status = (uint8_t *)(tlb->head_base + (uintptr_t)status_iova);
	return 1;
}

/* Peek at the next chain of a split ring; vf_split_available() has found one. It is not popped yet. */
static inline int vf_fast_path_parse_split(struct vf_queue *q, struct vf_req *req)
{
	const struct vf_split *vr = &q->vring.split;
	uint16_t head = vf_load_relaxed_u16(&vr->avail_ring[vr->last_avail_idx & vr->mask]);
	const uint64_t *desc;
	uint64_t header_iova, data_iova, status_iova, rest, data_shape;

	if (vf_unlikely(head > vr->mask))
		return 0;
	desc = (const uint64_t *)(const void *)&vr->desc[head];
	header_iova = vf_load_relaxed_u64(&desc[0]);
	rest = vf_load_relaxed_u64(&desc[1]);
	if (vf_unlikely((rest & VF_FAST_PATH_SHAPE_MASK) != VF_FAST_PATH_HEADER || rest >> 48 > vr->mask))
		return 0;
	desc = (const uint64_t *)(const void *)&vr->desc[rest >> 48];
	data_iova = vf_load_relaxed_u64(&desc[0]);
	data_shape = vf_load_relaxed_u64(&desc[1]);
	if (vf_unlikely((data_shape & VF_FAST_PATH_DATA_MASK) != VF_FAST_PATH_DATA || data_shape >> 48 > vr->mask))
		return 0;
	desc = (const uint64_t *)(const void *)&vr->desc[data_shape >> 48];
	status_iova = vf_load_relaxed_u64(&desc[0]);
	rest = vf_load_relaxed_u64(&desc[1]);
	if (vf_unlikely((rest & VF_FAST_PATH_SHAPE_MASK) != VF_FAST_PATH_STATUS))
		return 0;
	req->head = head;
	return vf_fast_path_fill(q, req, header_iova, data_iova, data_shape, status_iova);
}

/* As above, of a packed ring. 1, 0, or -1: there is no chain. */
static inline int vf_fast_path_parse_packed(struct vf_queue *q, struct vf_req *req)
{
	const struct vf_packed *vr = &q->vring.packed;
	const uint64_t *desc = (const uint64_t *)(const void *)&vr->desc[vr->avail_slot];
	/* The bits that make a descriptor available count for the first of a chain, and none for the others. */
	const uint64_t mask = VF_FAST_PATH_SHAPE_MASK, no_bits = ~((uint64_t)(VF_PACKED_DESC_F_AVAIL | VF_PACKED_DESC_F_USED) << 32);
	uint64_t first = vf_load_acquire_u64(&desc[1]), data, last; /* Barrier A */

	if (!vf_packed_flags_avail((uint16_t)(first >> 48), vr->avail_wrap_counter))
		return -1;
	/* Side by side, without the end of the ring between them. */
	if (vf_unlikely(vr->avail_slot + 3u > vr->size || vr->size - vr->taken_count < 3u))
		return 0;
	data = vf_load_relaxed_u64(&desc[3]);
	last = vf_load_relaxed_u64(&desc[5]);
	/* Length and flags side by side, as a split ring has them. */
	uint64_t header_shape = ((first >> 16 & 0xffffull << 32) | (uint32_t)first) & no_bits & mask;
	uint64_t data_shape = ((data >> 16 & 0xffffull << 32) | (uint32_t)data) & no_bits;
	uint64_t status_shape = ((last >> 16 & 0xffffull << 32) | (uint32_t)last) & no_bits & mask;
	if (vf_unlikely(header_shape != VF_FAST_PATH_HEADER || (data_shape & VF_FAST_PATH_DATA_MASK) != VF_FAST_PATH_DATA ||
			status_shape != VF_FAST_PATH_STATUS))
		return 0;
	req->head = vr->avail_slot;
	req->id = (uint16_t)(last >> 32);
	req->slot_count = 3;
	return vf_fast_path_fill(q, req, vf_load_relaxed_u64(&desc[0]), vf_load_relaxed_u64(&desc[2]), data_shape,
			     vf_load_relaxed_u64(&desc[4]));
}

#endif
