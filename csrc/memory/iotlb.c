/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "memory/iotlb.h"

#include "base/page.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/core_dump.h"

/* Entries have moved, or gone. */
static void vf_iotlb_forget_hits(struct vf_iotlb *tlb)
{
	tlb->last_hit = &tlb->none;
	tlb->head_base = 0;
	tlb->has_windows = 0;
}

void vf_iotlb_init(struct vf_iotlb *tlb, struct vf_port *port)
{
	tlb->none = (struct vf_iotlb_region){ .start = 1, .last = 0 };
	vf_iotlb_forget_hits(tlb);
	tlb->region_count = 0;
	tlb->region_limit = VF_IOTLB_CAPACITY - VF_IOTLB_RESERVE;
	tlb->hand = 0;
	tlb->miss_count = 0;
	tlb->evict_count = 0;
	tlb->port = port;
	tlb->region_hook = NULL;
}

/* The first region whose last is at or above iova; region_count when there is none. */
static uint32_t vf_iotlb_lower_bound(const struct vf_iotlb *tlb, uint64_t iova)
{
	uint32_t lo = 0, hi = tlb->region_count;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2u;
		if (tlb->region[mid].last < iova)
			lo = mid + 1u;
		else
			hi = mid;
	}
	return lo;
}

static int vf_iotlb_insert(struct vf_iotlb *tlb, const struct vf_iotlb_region *region)
{
	if (region->start > region->last)
		return -EINVAL;
	if (tlb->region_count == VF_IOTLB_CAPACITY)
		return -ENOSPC;
	uint32_t at = vf_iotlb_lower_bound(tlb, region->start);
	if (at < tlb->region_count && tlb->region[at].start <= region->last)
		return -EEXIST;
	memmove(&tlb->region[at + 1u], &tlb->region[at], (tlb->region_count - at) * sizeof(tlb->region[0]));
	tlb->region[at] = *region;
	tlb->region[at].used = 1;
	tlb->region_count++;
	vf_iotlb_forget_hits(tlb);
	return 0;
}

int vf_iotlb_add(struct vf_iotlb *tlb, uint64_t start, uint64_t last, uint32_t perm, void *address)
{
	struct vf_iotlb_region region = {
		.start = start,
		.last = last,
		.base = (uintptr_t)address - (uintptr_t)start,
		.perm = perm,
	};
	return vf_iotlb_insert(tlb, &region);
}

/* A mapping that remained would outlive its invalidation. */
static void vf_unmap(const struct vf_iotlb_region *region)
{
	if (munmap(region->map, region->map_bytes))
		abort();
}

static int vf_prot_of_perm(uint32_t perm)
{
	/* A write-only region is mapped readable too: x86 and arm64 cannot do less; the table refuses reads of it. */
	return (perm & VF_PERM_WO) ? PROT_READ | PROT_WRITE : PROT_READ;
}

/* Size of the pages that a file is mapped by: offset and length of a mapping are multiples of it. 0 or -errno. */
static int vf_file_page_bytes(int fd, uint64_t *page_bytes)
{
	struct statfs fs;

	if (fstatfs(fd, &fs))
		return -errno;
	*page_bytes = fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : vf_page_bytes();
	return 0;
}

static int vf_iotlb_map_file(struct vf_iotlb *tlb, uint64_t start, uint64_t last, uint32_t perm, int fd,
			     uint64_t offset_bytes, int whole)
{
	int flags = MAP_SHARED | (whole ? MAP_POPULATE : 0);
	uint64_t len = last - start; /* one less than the region's */
	uint64_t page_bytes = 0, slack;
	int err;

	if (start > last || (perm & VF_PERM_RW) == 0)
		return -EINVAL;
	err = vf_file_page_bytes(fd, &page_bytes);
	if (err)
		return err;
	slack = offset_bytes % page_bytes;
	if (len > INT64_MAX - 2u * page_bytes || offset_bytes > INT64_MAX)
		return -EOVERFLOW;
	size_t map_bytes = (size_t)((len + slack) / page_bytes * page_bytes + page_bytes);
	struct vf_mapping mapping = { .fd = fd, .prot = vf_prot_of_perm(perm), .offset_bytes = offset_bytes - slack };
	void *map = mmap(NULL, map_bytes, mapping.prot, flags, fd, (off_t)mapping.offset_bytes);
	if (map == MAP_FAILED && errno == EACCES && (perm & VF_PERM_WO)) {
		mapping.prot = PROT_WRITE;
		map = mmap(NULL, map_bytes, mapping.prot, flags, fd, (off_t)mapping.offset_bytes);
	}
	if (map == MAP_FAILED)
		return -errno;
	vf_core_exclude_driver(map, map_bytes);

	struct vf_iotlb_region region = {
		.start = start,
		.last = last,
		.base = (uintptr_t)map + (uintptr_t)slack - (uintptr_t)start,
		.perm = perm,
		.map = map,
		.map_bytes = map_bytes,
	};
	err = vf_iotlb_insert(tlb, &region);
	if (err)
		vf_unmap(&region);
	else if (tlb->region_hook)
		tlb->region_hook(tlb->region_context, map, map_bytes, &mapping);
	return err;
}

int vf_iotlb_map(struct vf_iotlb *tlb, uint64_t start, uint64_t last, uint32_t perm, int fd, uint64_t offset_bytes)
{
	return vf_iotlb_map_file(tlb, start, last, perm, fd, offset_bytes, 0);
}

int vf_iotlb_map_whole(struct vf_iotlb *tlb, uint64_t start, uint64_t last, uint32_t perm, int fd,
		       uint64_t offset_bytes)
{
	return vf_iotlb_map_file(tlb, start, last, perm, fd, offset_bytes, 1);
}

/* Unmap the marked regions, and close the gaps. Returns their count. */
static uint32_t vf_iotlb_sweep(struct vf_iotlb *tlb)
{
	uint32_t kept = 0, count = tlb->region_count;

	for (uint32_t i = 0; i < count; i++) {
		struct vf_iotlb_region *r = &tlb->region[i];

		if (!r->evicted) {
			tlb->region[kept++] = *r;
			continue;
		}
		if (r->map && tlb->region_hook)
			tlb->region_hook(tlb->region_context, r->map, r->map_bytes, NULL);
		if (r->map)
			vf_unmap(r);
	}
	tlb->region_count = kept;
	vf_iotlb_forget_hits(tlb);
	return count - kept;
}

uint32_t vf_iotlb_drop(struct vf_iotlb *tlb, uint64_t start, uint64_t last)
{
	for (uint32_t i = 0; i < tlb->region_count; i++)
		tlb->region[i].evicted = tlb->region[i].last >= start && tlb->region[i].start <= last;
	return vf_iotlb_sweep(tlb);
}

static int vf_iotlb_is_kept(const struct vf_iotlb_region *r, const uint64_t *keep, uint32_t keep_count)
{
	for (uint32_t i = 0; i < keep_count; i++)
		if (r->start <= keep[i] && keep[i] <= r->last)
			return 1;
	return 0;
}

/* A clock: the hand passes each region at most twice, and takes those that were not found since it came by last. */
uint32_t vf_iotlb_evict(struct vf_iotlb *tlb, const uint64_t *keep, uint32_t keep_count)
{
	uint32_t count = tlb->region_count, wanted = count / 2u, found = 0;

	for (uint32_t step = 0; step < 2u * count && found < wanted; step++) {
		struct vf_iotlb_region *r = &tlb->region[tlb->hand < count ? tlb->hand : 0];

		tlb->hand = (uint32_t)(r - tlb->region) + 1u;
		if (r->evicted || vf_iotlb_is_kept(r, keep, keep_count))
			continue;
		r->evicted = !r->used;
		r->used = 0;
		found += r->evicted;
	}
	tlb->evict_count += found;
	return vf_iotlb_sweep(tlb);
}

void vf_iotlb_obey_kernel(struct vf_iotlb *tlb)
{
	FILE *file = fopen("/proc/sys/vm/max_map_count", "re");
	unsigned long most;

	if (!file)
		return; /* the usual limit allows for far more */
	/* A Python class's buffers are second mappings of the same regions, and libraries have mappings, too. */
	if (fscanf(file, "%lu", &most) == 1 && most / 4u < tlb->region_limit)
		tlb->region_limit = (uint32_t)(most / 4u);
	fclose(file);
}

struct vf_iotlb_region *vf_iotlb_find(struct vf_iotlb *tlb, uint64_t iova)
{
	uint32_t at = vf_iotlb_lower_bound(tlb, iova);
	if (at < tlb->region_count && tlb->region[at].start <= iova) {
		tlb->region[at].used = 1;
		return &tlb->region[at];
	}
	if (!tlb->port)
		return NULL;

	struct vf_vduse_iotlb_entry entry;
	int fd = tlb->port->iotlb_get_fd(tlb->port, iova, iova, &entry);
	if (fd < 0)
		return NULL;
	tlb->miss_count++;
	int err = -EINVAL;
	if (entry.start <= iova && iova <= entry.last)
		err = vf_iotlb_map_file(tlb, entry.start, entry.last, entry.perm, fd, entry.offset,
					tlb->port->fetched_whole);
	close(fd);
	if (err)
		return NULL;
	at = vf_iotlb_lower_bound(tlb, iova);
	return &tlb->region[at];
}

int vf_iotlb_zero_pages(const struct vf_iotlb *tlb, uintptr_t address)
{
	for (uint32_t i = 0; i < tlb->region_count; i++) {
		const struct vf_iotlb_region *r = &tlb->region[i];
		if (!r->map || address < (uintptr_t)r->map || address - (uintptr_t)r->map >= r->map_bytes)
			continue;
		/* The whole mapping: pages of a huge file cannot be replaced one by one, and many faults become one. */
		if (mmap(r->map, r->map_bytes, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
			return -1;
		vf_core_exclude_driver(r->map, r->map_bytes); /* data stored there from now on is the driver's, too */
		return 0;
	}
	return -1;
}

int vf_iotlb_copy_from(struct vf_iotlb *tlb, uint64_t iova, void *to, size_t len)
{
	uint8_t *out = to;

	if (len && iova > UINT64_MAX - (len - 1u))
		return -EFAULT;
	while (len) {
		uint32_t run, want = len > UINT32_MAX ? UINT32_MAX : (uint32_t)len;
		void *va = vf_iotlb_translate(tlb, iova, want, VF_PERM_RO, &run);
		if (!va)
			return -EFAULT;
		vf_copy_from_shared(out, va, run);
		out += run;
		iova += run;
		len -= run;
	}
	return 0;
}
