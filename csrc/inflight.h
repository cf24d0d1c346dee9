/* SPDX-License-Identifier: Apache-2.0
 *
 * The in-flight log: which heads a queue has taken and not yet given back, and in which order. It lies in the shared
 * pages, behind the histograms of its queue, so that it outlives the worker that writes it.
 */
#ifndef VF_INFLIGHT_H
#define VF_INFLIGHT_H

#include <stdint.h>

#include "barrier.h"

#define VF_INFLIGHT_VERSION 1u

struct vf_inflight_header {
	uint32_t version;
	uint32_t entry_count; /* = queue size */
	uint32_t last_avail_idx; /* where the device stood at its last publication */
	uint32_t last_used_idx;
	uint32_t reserved[12];
};

/* One a head. order is 0 when the head is not in flight, else its place in the sequence of heads taken. */
struct vf_inflight_entry {
	uint64_t order;
};

/* Each change of an entry is one store: a worker may be killed before and after it, and never within. */
static inline void vf_log_set(struct vf_inflight_entry *entry, uint64_t order)
{
	vf_store_relaxed_u64(&entry->order, order);
}

#endif
