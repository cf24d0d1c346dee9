/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory of the program that the device reaches without a copy. An area is a range of addresses; its region is what the
 * device knows, which an area may be a part of, after an munmap of another part. A region is registered by the first request
 * from it, in each process: a child of fork() registers again, so that its parent may end before it.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/membarrier.h"
#include "preload/attach.h"
#include "preload/forked.h"
#include "preload/pieces.h"
#include "preload/signals.h"

#define VF_AREAS_MAX 256u

struct vf_region {
	int fd; /* owned */
	off_t offset;
	uintptr_t start; /* where it was mapped first, as a whole */
	size_t length;
	uint64_t iova; /* 0: not registered */
	bool refused; /* the server would not have it */
	uint32_t area_count;
	struct vf_region *next_removed; /* without areas, but requests were in flight; or to be freed */
};

struct vf_area {
	uintptr_t start;
	size_t length;
	struct vf_region *region;
};

static pthread_mutex_t vf_areas_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t vf_areas_mask; /* the signals of the thread that has the lock */
static struct vf_area vf_areas[VF_AREAS_MAX];
static uint32_t vf_area_count;
uint32_t vf_area_generation = 1;
static struct vf_region *vf_removed;
static struct vf_region *vf_freed; /* once the lock is free: an allocator may call munmap(), which comes back here */

void vf_memory_lock(void)
{
	uint64_t mask;

	vf_signals_block(&mask);
	pthread_mutex_lock(&vf_areas_lock);
	vf_areas_mask = mask;
}

void vf_memory_lock_again(void)
{
	vf_areas_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
	vf_memory_lock();
}

void vf_memory_unlock(void)
{
	struct vf_region *freed = vf_freed;
	uint64_t mask = vf_areas_mask;

	vf_freed = NULL;
	pthread_mutex_unlock(&vf_areas_lock);
	while (freed) {
		struct vf_region *next = freed->next_removed;
		free(freed);
		freed = next;
	}
	vf_signals_restore(&mask);
}

static void vf_areas_changed(void)
{
	uint32_t next = vf_area_generation + 1u;

	vf_store_release_u32(&vf_area_generation, next ? next : 1u);
}

/* The same, and have those that send see it: from here on, either we see the address in their piece, or they see that the
 * memory has changed, and send it another way. Pairs with vf_piece_is_stale(). */
static void vf_areas_shrink(void)
{
	vf_areas_changed();
	vf_fence_full(); /* where vf_membarrier() is not to be had, those that send have a fence */
	vf_membarrier();
}

static void vf_region_free(struct vf_region *region)
{
	vf_own_close(region->fd);
	region->next_removed = vf_freed;
	vf_freed = region;
}

static bool vf_region_in_flight(const struct vf_client *client, const struct vf_region *region)
{
	uint32_t count = client->geometry.queue_count * client->geometry.slot_count;

	for (uint32_t i = 0; i < count; i++) {
		uint64_t iova = vf_peek_u64(&client->pieces[i].iova);
		if (iova >= region->iova && iova - region->iova < region->length)
			return true;
	}
	return false;
}

/* Have the server forget a region without areas; one with requests in flight is kept for later. */
static void vf_region_remove(struct vf_region *region)
{
	struct vf_client *client = vf_client_now();

	if (region->iova && client) {
		if (vf_region_in_flight(client, region)) {
			region->next_removed = vf_removed;
			vf_removed = region;
			return;
		}
		struct vf_attach_message message = { .op = VF_ATTACH_REMOVE_REGION, .a = region->iova };
		vf_client_tell(client, &message);
	}
	vf_region_free(region);
}

static void vf_regions_remove_late(void)
{
	struct vf_region *late = vf_removed;

	vf_removed = NULL;
	while (late) {
		struct vf_region *next = late->next_removed;
		vf_region_remove(late);
		late = next;
	}
}

void vf_memory_forget_regions(void)
{
	for (uint32_t i = 0; i < vf_area_count; i++) {
		vf_areas[i].region->iova = 0;
		vf_areas[i].region->refused = false;
	}
	for (struct vf_region *late = vf_removed; late; late = late->next_removed)
		late->iova = 0;
	vf_regions_remove_late();
	vf_areas_changed();
}

void vf_disk_memory_add(void *address, size_t length, int fd, off_t offset)
{
	vf_fork_check();
	int own = vf_own_take(fd);
	if (own < 0)
		return; /* it is copied through buffers then */
	vf_disk_memory_remove(address, length);
	struct vf_region *region = calloc(1, sizeof(*region));
	vf_memory_lock();
	if (!region || vf_area_count == VF_AREAS_MAX) {
		vf_memory_unlock();
		vf_own_close(own);
		free(region);
		return;
	}
	*region = (struct vf_region){
		.fd = own, .offset = offset, .start = (uintptr_t)address, .length = length, .area_count = 1
	};
	vf_areas[vf_area_count++] = (struct vf_area){ (uintptr_t)address, length, region };
	vf_regions_remove_late();
	vf_areas_changed();
	vf_memory_unlock();
}

void vf_disk_memory_remove(void *address, size_t length)
{
	uintptr_t first = (uintptr_t)address, end = first + length;

	vf_fork_check();
	vf_memory_lock();
	bool changed = false;
	for (uint32_t i = 0; i < vf_area_count;) {
		struct vf_area *area = &vf_areas[i];
		uintptr_t area_end = area->start + area->length;
		if (area->start >= end || area_end <= first) {
			i++;
			continue;
		}
		if (!changed)
			vf_areas_shrink();
		changed = true;
		struct vf_region *region = area->region;
		struct vf_area after = { end, area_end > end ? area_end - end : 0, region };
		if (area->start < first) {
			area->length = first - area->start;
			i++;
		} else {
			*area = vf_areas[--vf_area_count];
			region->area_count--;
		}
		if (after.length && vf_area_count < VF_AREAS_MAX) {
			vf_areas[vf_area_count++] = after;
			region->area_count++;
		}
		if (region->area_count == 0)
			vf_region_remove(region);
	}
	if (changed)
		vf_regions_remove_late();
	vf_memory_unlock();
}

static void vf_region_register(struct vf_client *client, struct vf_region *region)
{
	struct vf_attach_message message = {
		.op = VF_ATTACH_ADD_REGION, .a = region->length, .b = (uint64_t)region->offset
	};
	int fds[2];

	if (vf_client_ask(client, &message, region->fd, fds))
		region->refused = true;
	else
		region->iova = message.a;
}

/* Find the area that holds an address, or the gap between areas. */
static void vf_memory_look_up(struct vf_client *client, uintptr_t start, struct vf_memory_hit *hit)
{
	uintptr_t gap_start = 0, gap_end = UINTPTR_MAX;

	for (uint32_t i = 0; i < vf_area_count; i++) {
		struct vf_area *area = &vf_areas[i];
		struct vf_region *region = area->region;
		if (area->start > start) {
			gap_end = area->start < gap_end ? area->start : gap_end;
			continue;
		}
		if (start - area->start >= area->length) {
			uintptr_t end = area->start + area->length;
			gap_start = end > gap_start ? end : gap_start;
			continue;
		}
		if (!region->iova && !region->refused)
			vf_region_register(client, region);
		*hit = (struct vf_memory_hit){ area->start, area->length, region->iova - region->start, vf_area_generation,
					       region->iova != 0 };
		return;
	}
	*hit = (struct vf_memory_hit){ gap_start, gap_end - gap_start, 0, vf_area_generation, false };
}

bool vf_memory_find(struct vf_client *client, struct vf_memory_hit *hit, const void *address, size_t length, uint64_t *delta)
{
	uintptr_t start = (uintptr_t)address;
	uint32_t generation = vf_load_acquire_u32(&vf_area_generation);

	if (hit->generation != generation || start - hit->start >= hit->length) {
		if (vf_peek_u32(&vf_area_count) == 0)
			return false;
		vf_memory_lock();
		vf_memory_look_up(client, start, hit);
		vf_memory_unlock();
	}
	if (!hit->reached || length > hit->length - (start - hit->start))
		return false;
	*delta = hit->delta;
	return true;
}
