/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "engine/store_map.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/core_dump.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

/* mincore() tells the truth only to a file's owner and to processes that may write it; others get "all present". */
static int vf_map_may_ask(int fd, const struct stat *status)
{
	char path[32];

	if (status->st_uid == geteuid())
		return 1;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) == 0;
}

static int vf_map_check(int fd)
{
	struct statfs fs;
	struct stat status;

	if (fstatfs(fd, &fs) || fstat(fd, &status))
		return -errno;
	if (fs.f_type != TMPFS_MAGIC || !S_ISREG(status.st_mode))
		return -ENODEV;
	return vf_map_may_ask(fd, &status) ? 0 : -EACCES;
}

int vf_map_open(struct vf_store_map *map, int fd, uint64_t size_bytes)
{
	uint64_t page_words = (size_bytes >> VF_MAP_UNIT_SHIFT) / 64u + 1u;
	uint64_t chunk_words = (size_bytes >> VF_MAP_CHUNK_SHIFT) / 64u + 1u;
	int err = vf_map_check(fd);
	void *bits, *base;

	memset(map, 0, sizeof(*map));
	if (err)
		return err;
	/* Pages of it exist once there is a bit to be set. */
	map->bits_bytes = (page_words + chunk_words) * sizeof(uint64_t);
	bits = mmap(NULL, map->bits_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (bits == MAP_FAILED)
		return -errno;
	base = mmap(NULL, size_bytes, PROT_READ, MAP_SHARED, fd, 0);
	if (base == MAP_FAILED) {
		err = -errno;
		munmap(bits, map->bits_bytes);
		return err;
	}
	vf_core_exclude(base, size_bytes);
	map->base = base;
	map->size_bytes = size_bytes;
	map->present = bits;
	map->looked = map->present + page_words;
	return 0;
}

void vf_map_close(struct vf_store_map *map)
{
	if (!map->base)
		return;
	munmap(map->base, map->size_bytes);
	munmap(map->present, map->bits_bytes);
	map->base = NULL;
	map->size_bytes = 0;
}

/* From a byte a page to a byte a unit, from the end, as there are never fewer of these. */
static void vf_map_spread(uint8_t *resident, uint32_t unit_count, uint32_t units_of_page)
{
	for (uint32_t i = unit_count; units_of_page > 1u && i-- > 0;)
		resident[i] = resident[i / units_of_page];
}

/* Note which pages of a chunk are present, and map them at once, which saves many faults. */
static void vf_map_look_at(struct vf_store_map *map, uint64_t chunk)
{
	uint64_t start = chunk << VF_MAP_CHUNK_SHIFT, first = start >> VF_MAP_UNIT_SHIFT;
	uint64_t rest = map->size_bytes - start;
	uint32_t run = 0, count = VF_MAP_CHUNK_UNITS;
	uint8_t resident[VF_MAP_CHUNK_UNITS + 1u];

	if (rest < 1u << VF_MAP_CHUNK_SHIFT)
		count = (uint32_t)((rest + (1u << VF_MAP_UNIT_SHIFT) - 1u) >> VF_MAP_UNIT_SHIFT);
	map->looked[chunk / 64u] |= 1ull << (chunk % 64u);
	if (mincore(map->base + start, (size_t)count << VF_MAP_UNIT_SHIFT, resident))
		return; /* the file has been cut, or there is no memory: by pread then */
	vf_map_spread(resident, count, (uint32_t)sysconf(_SC_PAGESIZE) >> VF_MAP_UNIT_SHIFT);
	resident[count] = 0; /* ends the last run */
	for (uint32_t i = 0; i <= count; i++) {
		if (resident[i] & 1u) {
			map->present[(first + i) / 64u] |= 1ull << ((first + i) % 64u);
			run++;
		} else if (run) {
			madvise(map->base + start + ((size_t)(i - run) << VF_MAP_UNIT_SHIFT),
				(size_t)run << VF_MAP_UNIT_SHIFT, MADV_POPULATE_READ);
			run = 0;
		}
	}
}

int vf_map_look(struct vf_store_map *map, uint64_t offset_bytes, uint64_t len_bytes)
{
	uint64_t last = (offset_bytes + len_bytes - 1u) >> VF_MAP_CHUNK_SHIFT;
	int again;

	if (!map->base || offset_bytes + len_bytes > map->size_bytes)
		return 0;
	again = ++map->hole_count % VF_MAP_LOOK_AGAIN == 0;
	for (uint64_t chunk = offset_bytes >> VF_MAP_CHUNK_SHIFT; chunk <= last; chunk++) {
		if (again || !(map->looked[chunk / 64u] >> (chunk % 64u) & 1u))
			vf_map_look_at(map, chunk);
	}
	return vf_map_holds(map, offset_bytes, len_bytes);
}

void vf_map_forget(struct vf_store_map *map, uint64_t offset_bytes, uint64_t len_bytes)
{
	uint64_t end_bytes = offset_bytes + len_bytes;

	if (end_bytes > map->size_bytes)
		return;
	for (uint64_t page = offset_bytes >> VF_MAP_UNIT_SHIFT; page << VF_MAP_UNIT_SHIFT < end_bytes; page++)
		map->present[page / 64u] &= ~(1ull << (page % 64u));
}

int vf_map_zero_pages(struct vf_store_map *map, uintptr_t address)
{
	if (!map->base || address < (uintptr_t)map->base || address - (uintptr_t)map->base >= map->size_bytes)
		return -1;
	if (mmap(map->base, map->size_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
		 0) == MAP_FAILED)
		return -1;
	map->lost = 1;
	return 0;
}
