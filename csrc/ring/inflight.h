/* SPDX-License-Identifier: Apache-2.0
 *
 * The in-flight log: which heads a queue has popped and not yet completed, and in which order. It lies in the shared
 * pages, after the histograms of its queue, so that it outlives the worker that writes it. With the used index, which
 * lies in the driver's memory and outlives us as well, it tells the next worker where this one stood.
 *
 * The log is read when its writer is dead. A process that is killed has carried out its stores up to
 * some instruction and none after it, so that the order of the stores in the program is what counts; every store here
 * is a release, which the compiler does not move earlier stores after, and which is free on x86. The order is
 *
 *   1. entry.order = n                  the head is popped. Killed before: it is still in the avail ring after all that
 *                                       is logged, and is taken again. Nothing of it has taken effect.
 *   2. the request is carried out       Killed from here to 4: it is carried out again, whole. The driver has not been
 *                                       told of its end, so that it may not have used what it was reading from or into.
 *   3. used ring entry                  not yet visible: as 2.
 *   4. used index                       published, of a whole batch by one store.
 *   5. entry.order = 0, for each        Killed between 4 and 6: the entries of the batch are logged and told. They are found
 *                                       in the used ring, from header.last_used_idx on, and forgotten.
 *   6. header.last_used_idx             No head is taken between 4 and 6: one that the driver has made available again
 *                                       meanwhile cannot be mistaken for the one that was told.
 *
 * A request that was carried out and not published is replayed after those that were. So that this is never an older write over a
 * newer one, an engine that keeps the order of writes publishes in that order: 4 waits for what it has held back (merge.h).
 *
 * Hence everything that was made available is published, or logged, or after them: the next worker takes from
 * used index + number of entries on. A replay keeps the orders, so that one that is killed is repeated in the same order.
 *
 * With IN_ORDER the used ring does not name every head. There the order of a head is, modulo 2^16, its place in the avail ring,
 * which tells the same.
 *
 * A packed ring needs less. Its chains are completed in the order of popping, so that a used element never overwrites what is in
 * flight, and all that was not told is taken again from the ring. header.last_used_idx is the position of the next used element,
 * noted at each publication. Of each element shown since, header.next_used_idx says where it ends, and entry.order of its slot how
 * many descriptors it stands for; both are written before the element. Hence the elements up to next_used_idx can be followed, and
 * only of the last one is it to be asked whether the driver was shown it.
 */
#ifndef VF_INFLIGHT_H
#define VF_INFLIGHT_H

#include <stdint.h>
#include <string.h>

#include "base/barrier.h"

#define VF_LOG_MAGIC "VDUSELOG"
#define VF_LOG_VERSION 2u
#define VF_LOG_DEATHS_MAX 3u /* a request that so many workers died of is answered with an error */
#define VF_LOG_HOPELESS 6u /* even that was of no use */

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
	uint32_t last_avail_idx; /* where the device stood at its last publication: indices, or positions of a packed ring */
	uint32_t last_used_idx;
	uint32_t working; /* head + 1 of the request that our own code is at; 0 = none. Whose fault a death may be. */
	uint32_t next_used_idx; /* packed ring: the end of the used element that is about to be shown, or was shown last */
	uint32_t reserved[6];
};

/* One a head, or a slot. Of a head: 0 when it is not in flight, else its place in the sequence of heads taken. */
struct vf_inflight_entry {
	uint64_t order;
	uint32_t deaths; /* workers that died while at it */
	uint32_t reserved;
};

_Static_assert(sizeof(struct vf_inflight_header) == 64, "shared_pages.py has the same layout");
_Static_assert(sizeof(struct vf_inflight_entry) == 16, "shared_pages.py has the same layout");

/* Each change of an entry is one store: a worker may be killed before and after it, and never within. */
static inline void vf_log_set(struct vf_inflight_entry *entry, uint64_t order)
{
	vf_store_release_u64(&entry->order, order);
}

/* Take a head that is not in flight. */
static inline void vf_log_take(struct vf_inflight_entry *entry, uint64_t order)
{
	entry->deaths = 0;
	vf_log_set(entry, order);
}

/* Note where the device stands, after everything that it has published and cleared. */
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

/* Note whose request comes next, before it is looked at; 0 when it is done or in the engine's hands. */
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
