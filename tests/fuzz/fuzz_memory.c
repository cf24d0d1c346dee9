/* SPDX-License-Identifier: Apache-2.0
 *
 * The driver's memory in the fuzz harness, and the driver that changes it between two reads.
 */
#define _GNU_SOURCE
#include "fuzz_world.h"

#include <string.h>

/* The most shared reads that one round may cost: 64 requests, each a chain of the full length, read and copied. */
#define FUZZ_READS_MAX (64u * 1024u)

static const uint8_t *last_read;
static size_t last_read_len;

uint32_t fuzz_region_add(uint64_t start, uint32_t len, uint32_t perm)
{
	struct fuzz_region *region = &world.region[world.region_count];

	FUZZ_ASSERT(world.region_count < FUZZ_REGION_MAX);
	*region = (struct fuzz_region){ .start = start, .len = len, .perm = perm, .mem = malloc(len) };
	FUZZ_ASSERT(region->mem);
	memset(region->mem, 0, len);
	FUZZ_ASSERT(vf_iotlb_add(&world.q->tlb, start, start + (len - 1u), perm, region->mem) == 0);
	return world.region_count++;
}

void fuzz_region_remove(uint32_t index)
{
	free(world.region[index].mem);
	world.region[index].mem = NULL;
}

struct fuzz_region *fuzz_region_of_address(const void *address, size_t len)
{
	uintptr_t at = (uintptr_t)address;

	for (uint32_t i = 0; i < world.region_count; i++) {
		struct fuzz_region *region = &world.region[i];
		uintptr_t mem = (uintptr_t)region->mem;

		if (region->mem && at >= mem && at - mem < region->len && len <= region->len - (at - mem))
			return region;
	}
	return NULL;
}

void fuzz_write(uint64_t iova, const void *from, size_t len)
{
	const uint8_t *bytes = from;

	for (uint32_t i = 0; i < world.region_count; i++) {
		struct fuzz_region *region = &world.region[i];
		uint64_t in_region = iova - region->start; /* modulo 2^64: huge when iova lies before the region */
		uint64_t before = in_region < region->len ? 0 : region->start - iova;

		if (before >= len || !region->mem)
			continue;
		in_region = before ? 0 : in_region;
		size_t n = len - before < region->len - in_region ? len - before : region->len - in_region;
		memcpy(region->mem + in_region, bytes + before, n);
	}
}

static void fuzz_mutate(uint8_t *at, size_t room, uint64_t value, size_t width)
{
	memcpy(at, &value, width < room ? width : room);
}

/* Called before each read of shared memory: a hostile driver changes it between two reads. */
void vf_fuzz_shared_read(const volatile void *address, size_t len_bytes)
{
	FUZZ_ASSERT(++world.shared_reads < FUZZ_READS_MAX);
	for (uint32_t i = 0; i < sizeof(world.mutation) / sizeof(world.mutation[0]); i++) {
		if (!world.mutation[i].armed || world.mutation[i].countdown--)
			continue;
		struct fuzz_region *region = &world.region[world.mutation[i].region];
		uint64_t value = world.mutation[i].value;
		size_t width = world.mutation[i].width;

		world.mutation[i].armed = false;
		if (world.mutation[i].where == 0 && fuzz_region_of_address((const void *)address, len_bytes)) {
			fuzz_mutate((uint8_t *)(uintptr_t)address, len_bytes, value, width);
		} else if (world.mutation[i].where == 1 && fuzz_region_of_address(last_read, last_read_len)) {
			fuzz_mutate((uint8_t *)(uintptr_t)last_read, last_read_len, value, width);
		} else if (world.mutation[i].where == 3) {
			world.q->counters->memory_faults++; /* as the handler of SIGBUS does */
		} else if (region->mem) {
			size_t offset = world.mutation[i].offset % region->len;

			fuzz_mutate(region->mem + offset, region->len - offset, value, width);
		}
	}
	last_read = (const uint8_t *)(uintptr_t)address;
	last_read_len = len_bytes;
}

void fuzz_memory_forget(void)
{
	last_read = NULL;
	last_read_len = 0;
}
