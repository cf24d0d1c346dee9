/* SPDX-License-Identifier: Apache-2.0
 *
 * The IOTLB: a sorted table of fixed capacity, IOVA range -> mapped address. Ranges are inclusive, [start, last], so
 * that a region may end at 2^64-1. A lookup checks the last hit first, then searches. A miss is fetched through the port and
 * mapped. If the table is nearly full, regions that were not used lately are dropped while nothing is in flight
 * (vf_iotlb_evict), and fetched again when they are used. Mapping a region touches no page of it: in a bounce region only
 * pages named by live descriptors may be touched.
 */
#ifndef VF_IOTLB_H
#define VF_IOTLB_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>

#include "base/barrier.h"
#include "memory/port.h"

#define VF_IOTLB_CAPACITY 8192u
#define VF_IOTLB_RESERVE 1100u /* free places that a request may need: a region for each segment of the longest chain */
#define VF_IOTLB_KEEP_MAX 3u

#define VF_PERM_RO 1u
#define VF_PERM_WO 2u
#define VF_PERM_RW 3u

struct vf_iotlb_region {
	uint64_t start;
	uint64_t last;
	uintptr_t base; /* address of IOVA 0 of this region, modulo 2^64: va = base + iova */
	uint32_t perm;
	uint8_t used; /* since the last eviction checked it */
	uint8_t evicted;
	uint16_t reserved;
	void *map; /* the mapping, in whole pages of its file; NULL for memory that we must not unmap */
	size_t map_bytes;
};

/* Where a region that has just been mapped comes from. */
struct vf_mapping {
	int fd; /* borrowed, for the duration of the call */
	int prot;
	uint64_t offset_bytes; /* of the mapping's first page */
};

struct vf_iotlb {
	struct vf_iotlb_region *last_hit; /* never NULL: points at `none` when there is none */
	/* The regions in which the last plain request had its header and its data, as fast_path.h compares with them. */
	uint64_t head_start;
	uint64_t header_span; /* the last offset at which a header is whole */
	uint64_t status_span;
	uintptr_t head_base;
	uint64_t data_start;
	uint64_t data_span;
	uintptr_t data_base;
	uint8_t has_windows;
	uint32_t region_count;
	uint32_t region_limit; /* with more than these, it is time for an eviction */
	uint32_t hand; /* where the next eviction continues */
	uint64_t miss_count;
	uint64_t evict_count;
	struct vf_port *port; /* borrowed */
	/* Called for each region that has been mapped, or is about to be unmapped (mapping is NULL then); NULL: no callback. */
	void (*region_hook)(void *context, void *va, size_t len_bytes, const struct vf_mapping *mapping);
	void *region_context;
	struct vf_iotlb_region none; /* start > last: matches nothing */
	struct vf_iotlb_region region[VF_IOTLB_CAPACITY];
};

void vf_iotlb_init(struct vf_iotlb *tlb, struct vf_port *port);

/* Map fd at [start, last] with perm; consumes nothing: the caller still owns fd. 0 or -errno (-EEXIST on overlap,
 * -ENOSPC when the table is full, -EINVAL when the range is empty or wraps). */
int vf_iotlb_map(struct vf_iotlb *tlb, uint64_t start, uint64_t last, uint32_t perm, int fd, uint64_t offset_bytes);

/* As vf_iotlb_map, a region whose pages all exist and stay: mapped at once, without a fault for each later. */
int vf_iotlb_map_whole(struct vf_iotlb *tlb, uint64_t start, uint64_t last, uint32_t perm, int fd,
		       uint64_t offset_bytes);

/* Enter memory of this process that the caller keeps mapped (tests and fuzzing). 0 or -errno as vf_iotlb_map. */
int vf_iotlb_add(struct vf_iotlb *tlb, uint64_t start, uint64_t last, uint32_t perm, void *address);

/* Drop and unmap every region that overlaps [start, last]. The count dropped. */
uint32_t vf_iotlb_drop(struct vf_iotlb *tlb, uint64_t start, uint64_t last);

/* Drop and unmap about half of the regions, those first that were not found since the last eviction; not the ones that hold
 * one of the keep_count (at most VF_IOTLB_KEEP_MAX) IOVAs. Nothing may refer to memory of any other. The count dropped. */
uint32_t vf_iotlb_evict(struct vf_iotlb *tlb, const uint64_t *keep, uint32_t keep_count);

/* Let a table hold no more mappings than this kernel allows a process (vm.max_map_count), with room for others. */
void vf_iotlb_obey_kernel(struct vf_iotlb *tlb);

/* The region that holds iova: from the table, else fetched through the port. NULL when there is none. */
struct vf_iotlb_region *vf_iotlb_find(struct vf_iotlb *tlb, uint64_t iova);

/* Replace the whole mapping that holds an address of this process with zero pages; async-signal-safe. 0, or -1 when none
 * does or the kernel refuses. */
int vf_iotlb_zero_pages(const struct vf_iotlb *tlb, uintptr_t address);

/*
 * Translate the start of [iova, iova + len): the address, and in *run how many bytes follow it in the same region, at
 * most len. NULL when the address is outside the table or lacks a permission of perm. len is not 0, and the caller has
 * checked that iova + len does not wrap.
 */
static inline void *vf_iotlb_translate(struct vf_iotlb *tlb, uint64_t iova, uint32_t len, uint32_t perm, uint32_t *run)
{
	struct vf_iotlb_region *r = tlb->last_hit;

	if (vf_unlikely(iova < r->start || iova > r->last)) {
		r = vf_iotlb_find(tlb, iova);
		if (!r)
			return NULL;
		tlb->last_hit = r;
	}
	if (vf_unlikely((r->perm & perm) != perm))
		return NULL;
	uint64_t rest = r->last - iova; /* one less than the bytes left; cannot wrap: iova <= last */
	*run = rest >= len - 1u ? len : (uint32_t)(rest + 1u);
	return (void *)(r->base + (uintptr_t)iova);
}

/* Prefetch iova's cache line, if it lies in the region of headers; a hint, valid for any address. */
static inline void vf_iotlb_prefetch(const struct vf_iotlb *tlb, uint64_t iova)
{
	__builtin_prefetch((const void *)(tlb->head_base + (uintptr_t)iova), 1);
}

/* Copy len bytes at iova into private memory, across regions. 0 or -EFAULT. */
int vf_iotlb_copy_from(struct vf_iotlb *tlb, uint64_t iova, void *to, size_t len);

#endif
