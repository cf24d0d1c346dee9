/* SPDX-License-Identifier: Apache-2.0
 *
 * After the first failure of a write-back every later flush of the device fails, until an operator clears that.
 *
 * The kernel reports such a failure once for each open file description, and then marks the pages clean although their data is
 * lost: the next fdatasync() succeeds. So the failure is kept in the header of the shared pages, where all queues of the device
 * and all later processes see it. The cases, also if a process is killed before it has kept the failure:
 *
 *   a flush fails                       The failure is kept before the flush is completed. If the worker is killed in between, the
 *                                       supervisor's own witness reports it again (write_back.py), before a successor starts.
 *   another queue's flush got it        All queues share one description. Each also has a witness: a description of the same
 *                                       file that is never synced, so the failure is still reported there.
 *   two flushes of a queue at once      The same witness: one thread asks it after every successful flush.
 *   everything is killed                A failure that no process has seen is reported to the next server's descriptions. One that
 *                                       was seen by a flush in that moment is not; the next server says which flushes were cut off.
 *
 * Only flushes come here.
 */
#ifndef VF_FLUSH_H
#define VF_FLUSH_H

#include "base/barrier.h"
#include "queue/queue.h"

/* A failure in one word: errno, and CLOCK_REALTIME in seconds. 0 = none. */
#define VF_FLUSH_ERRNO_BITS 16u

static inline int vf_flush_failure_errno(uint64_t failure)
{
	return (int)(failure & ((1u << VF_FLUSH_ERRNO_BITS) - 1u));
}

/* Begin a flush. 0, or -errno of the kept failure, with which it is completed. */
static inline int vf_flush_begin(struct vf_queue *q)
{
	uint64_t failure = vf_load_relaxed_u64(q->flush_failure);

	if (vf_unlikely(failure))
		return -vf_flush_failure_errno(failure);
	vf_store_release_u32(&q->shm_status->flushing, q->shm_status->flushing + 1u);
	return 0;
}

/* End a flush with the store's result. Returns the result to complete it with. A failure is kept. */
int vf_flush_end(struct vf_queue *q, int result);

#endif
