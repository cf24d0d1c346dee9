/* SPDX-License-Identifier: Apache-2.0
 *
 * A read-only mapping of a file on tmpfs, through which the sync engine reads: the pages are memory already, so that a
 * copy costs about half of what pread() does, most of which is finding the page.
 *
 * Only present pages are read so, because touching a hole of such a mapping would allocate a page. The kernel reports the
 * present pages (mincore) when a chunk is first read, and again after many reads that found a hole. If another process
 * punches out a page later, reading it costs memory, but never returns a wrong byte: the mapping is the file.
 *
 * A page that is unavailable (the file was truncated, the machine is out of memory) raises SIGBUS. The handler replaces the
 * mapping with zero pages and sets `lost`. The read is repeated by pread, which returns an errno.
 */
#ifndef VF_STORE_MAP_H
#define VF_STORE_MAP_H

#include <stdint.h>

#define VF_MAP_UNIT_SHIFT 12u /* of a bit: the smallest page; a larger one has several */
#define VF_MAP_CHUNK_SHIFT 21u /* what is asked about at once */
#define VF_MAP_CHUNK_UNITS (1u << (VF_MAP_CHUNK_SHIFT - VF_MAP_UNIT_SHIFT))
#define VF_MAP_LOOK_AGAIN 64u /* reads of holes until the kernel is asked again, as other processes write, too */

struct vf_store_map {
	uint8_t *base; /* NULL: not mapped */
	uint64_t size_bytes; /* 0: not mapped; what is read lies below */
	uint64_t *present; /* a bit a unit */
	uint64_t *looked; /* a bit a chunk */
	uint64_t bits_bytes; /* of both */
	uint32_t hole_count; /* reads that found one */
	volatile int lost; /* set by the signal handler */
};

/* Map size_bytes of fd if it is a file on tmpfs, and the kernel tells us which pages it has. 0 or -errno (-ENODEV: it is
 * no such file); on an error nothing is held. */
int vf_map_open(struct vf_store_map *map, int fd, uint64_t size_bytes);
void vf_map_close(struct vf_store_map *map);

/* As vf_map_holds(), for ranges that it has not found: asks the kernel if that was not done yet, or is due again. */
int vf_map_look(struct vf_store_map *map, uint64_t offset_bytes, uint64_t len_bytes);

/* Forget the pages that are about to be deallocated. */
void vf_map_forget(struct vf_store_map *map, uint64_t offset_bytes, uint64_t len_bytes);

/* Replace the mapping with zero pages if it holds an address of this process; async-signal-safe. 0, or -1 when it does not,
 * or the kernel refuses. */
int vf_map_zero_pages(struct vf_store_map *map, uintptr_t address);

/* Whether all of a range, which is not empty and does not wrap, is known to be present. */
static inline int vf_map_holds(const struct vf_store_map *map, uint64_t offset_bytes, uint64_t len_bytes)
{
	uint64_t end_bytes = offset_bytes + len_bytes;

	if (end_bytes > map->size_bytes)
		return 0;
	for (uint64_t page = offset_bytes >> VF_MAP_UNIT_SHIFT; page << VF_MAP_UNIT_SHIFT < end_bytes; page++) {
		if (!(map->present[page / 64u] >> (page % 64u) & 1u))
			return 0;
	}
	return 1;
}

#endif
