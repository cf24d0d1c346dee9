/* SPDX-License-Identifier: Apache-2.0
 *
 * After the first failure of a write-back every later flush of the device fails, until an operator says otherwise.
 *
 * The kernel reports such a failure once for each open file description, and then calls the pages clean whose data is lost: the
 * next fdatasync() says OK. So the failure is kept in the header of the shared pages, where all queues of the device and all
 * processes after them see it. Who learns of it, and what if the process is killed before it can tell:
 *
 *   a flush fails                       It is kept before the flush is answered. Killed in between: the supervisor, which has a
 *                                       witness of its own, learns it from that once more (write_back.py), before a successor starts.
 *   another queue's flush took it       All queues share one description. Each has a witness beside it: a description of the same
 *                                       file that is never synced, so that the failure is still to be reported there.
 *   two flushes of a queue at once      The same witness: it is asked after every flush that went well, by one thread.
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

/* Begin a flush. 0, or -errno of the failure that answers it. */
static inline int vf_flush_begin(struct vf_queue *q)
{
	uint64_t failure = vf_load_relaxed_u64(q->flush_failure);

	if (vf_unlikely(failure))
		return -vf_flush_failure_errno(failure);
	vf_store_release_u32(&q->shm_status->flushing, q->shm_status->flushing + 1u);
	return 0;
}

/* A flush that began has ended with result: what it is to be answered with. A failure is kept. */
int vf_flush_end(struct vf_queue *q, int result);

#endif
