/* SPDX-License-Identifier: Apache-2.0
 *
 * The in-flight log: which heads a queue has popped and not yet completed, and in which order. It lies in the shared
 * pages, after the histograms of its queue, so it outlives the worker that writes it. Together with the used index, which
 * lies in the driver's memory and also outlives the worker, it shows the next worker where to continue.
 *
 * The log is read when its writer is dead. A killed process has carried out its stores up to some instruction and none
 * after it, so the order of the stores in the program matters. Every store here is a release, which the compiler does not
 * move earlier stores after, and which is free on x86. The order is
 *
 *   1. entry.order = n                  the head is popped. Killed before: it is still in the avail ring after all
 *                                       logged heads, and is popped again. Nothing of it has taken effect.
 *   2. the request is carried out       Killed from here to 4: it is replayed, whole. The driver has not seen its
 *                                       completion, so it may not have used its buffers yet.
 *   3. used ring entry                  not yet visible: as 2.
 *   4. used index                       published, of a whole batch by one store.
 *   5. entry.order = 0, for each        Killed between 4 and 6: the entries of the batch are logged and published. They are
 *                                       found in the used ring, from header.last_used_idx on, and forgotten.
 *   6. header.last_used_idx             No head is popped between 4 and 6, so one that the driver has made available again
 *                                       meanwhile cannot be mistaken for the published one.
 *
 * A request that was carried out and not published is replayed after the published ones. That must never put an older write over
 * a newer one. So an engine that keeps the order of writes publishes in that order: 4 waits for its collected writes (merge.h).
 *
 * So every available head is published, or logged, or lies after these in the avail ring: the next worker pops from used index +
 * number of entries on. A replay keeps the orders, so a killed replay is repeated in the same order.
 *
 * With IN_ORDER the used ring does not name every head. There the order of a head is, modulo 2^16, its place in the avail ring,
 * which gives the same information.
 *
 * A packed ring needs less. Its chains are completed in the order of popping, so a used element never overwrites a descriptor in
 * flight, and all unpublished chains are popped again from the ring. header.last_used_idx is the position of the next used
 * element, noted at each publication. For each element published since, header.next_used_idx notes its end, and entry.order of
 * its slot the number of its descriptors; both are written before the element. So the next worker can follow the elements up to
 * next_used_idx, and only has to check whether the last one was published.
 */
#ifndef VF_INFLIGHT_H
#define VF_INFLIGHT_H

#include <stdint.h>
#include <string.h>

#include "base/barrier.h"

#define VF_LOG_MAGIC "VDUSELOG"
#define VF_LOG_VERSION 2u
#define VF_LOG_DEATHS_MAX 3u /* a request that has killed so many workers is completed with an error */
#define VF_LOG_HOPELESS 6u /* even that did not help */

enum vf_log_format {
	VF_LOG_SPLIT, /* a head is the index of an entry; the chain is found again in the ring */
	VF_LOG_PACKED, /* an entry belongs to a slot of the ring */
	VF_LOG_SPLIT_IN_ORDER, /* as VF_LOG_SPLIT, and an order is a place in the avail ring */
};

enum vf_log_state {
	VF_LOG_VOID, /* nothing has been popped since the reset, or all of it was completed: start at the used index */
	VF_LOG_VALID,
};

struct vf_inflight_header {
	char magic[8];
	uint32_t version;
	uint16_t ring_format; /* enum vf_log_format */
	uint16_t entry_bytes;
	uint32_t entry_count; /* in use: at least the size of the ring that the log is of */
	uint32_t state; /* enum vf_log_state */
	uint32_t last_avail_idx; /* the device's cursors at its last publication: indices, or positions of a packed ring */
	uint32_t last_used_idx;
	uint32_t working; /* head + 1 of the request that our own code is processing; 0 = none. A death is counted against it. */
	uint32_t next_used_idx; /* packed ring: the end of the used element that is published next, or was published last */
	uint32_t reserved[6];
};

/* One per head, or slot. Of a head: 0 when it is not in flight, else its place in the sequence of popped heads. */
struct vf_inflight_entry {
	uint64_t order;
	uint32_t deaths; /* workers that died while they processed it */
	uint32_t reserved;
};

_Static_assert(sizeof(struct vf_inflight_header) == 64, "shared_pages.py has the same layout");
_Static_assert(sizeof(struct vf_inflight_entry) == 16, "shared_pages.py has the same layout");

/* Each change of an entry is one store: a worker may be killed before and after it, and never within. */
static inline void vf_log_set(struct vf_inflight_entry *entry, uint64_t order)
{
	vf_store_release_u64(&entry->order, order);
}

/* Enter a head that is not in flight. */
static inline void vf_log_take(struct vf_inflight_entry *entry, uint64_t order)
{
	entry->deaths = 0;
	vf_log_set(entry, order);
}

/* Note the device's cursors, after it has published and cleared everything before them. */
static inline void vf_log_note(struct vf_inflight_header *header, uint16_t last_avail_idx, uint16_t last_used_idx)
{
	vf_store_release_u32(&header->last_avail_idx, last_avail_idx);
	vf_store_release_u32(&header->last_used_idx, last_used_idx);
}

/* Packed ring: announce where the next used element will end. */
static inline void vf_log_announce(struct vf_inflight_header *header, uint16_t next_used_idx)
{
	vf_store_release_u32(&header->next_used_idx, next_used_idx);
}

/* Note the request that is processed next, before it is read; 0 when it is done or submitted. */
static inline void vf_log_work(struct vf_inflight_header *header, uint32_t head_plus_one)
{
	vf_store_release_u32(&header->working, head_plus_one);
}

/* An empty log of a queue that starts at these indices or positions. Until the last store there is none. */
static inline void vf_log_begin(struct vf_inflight_header *header, struct vf_inflight_entry *entries, uint32_t entry_count,
				enum vf_log_format format, uint16_t last_avail_idx, uint16_t last_used_idx)
{
	vf_store_release_u32(&header->state, VF_LOG_VOID);
	memset(entries, 0, entry_count * sizeof(*entries));
	memcpy(header->magic, VF_LOG_MAGIC, sizeof(header->magic));
	header->version = VF_LOG_VERSION;
	header->ring_format = (uint16_t)format;
	header->entry_bytes = sizeof(*entries);
	header->entry_count = entry_count;
	vf_log_work(header, 0);
	vf_log_announce(header, last_used_idx);
	vf_log_note(header, last_avail_idx, last_used_idx);
	vf_store_release_u32(&header->state, VF_LOG_VALID);
}

/* Whether this is a log that a ring of that size can continue from, within the room that there is. */
static inline int vf_log_is_ours(const struct vf_inflight_header *header, enum vf_log_format format, uint32_t ring_size,
				 uint32_t entry_count_max)
{
	return memcmp(header->magic, VF_LOG_MAGIC, sizeof(header->magic)) == 0 && header->version == VF_LOG_VERSION &&
	       header->ring_format == format && header->entry_bytes == sizeof(struct vf_inflight_entry) &&
	       header->entry_count >= ring_size && header->entry_count <= entry_count_max && header->state == VF_LOG_VALID &&
	       header->last_used_idx <= UINT16_MAX && header->next_used_idx <= UINT16_MAX &&
	       header->working <= header->entry_count;
}

#endif
