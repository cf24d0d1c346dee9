/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "queue/flush.h"

#include <errno.h>
#include <time.h>

/* Whether a flush with this result may have lost data. Not if nothing was tried, or if a store on a network did not reply: it
 * has the data that it has accepted, and the next flush covers that again. */
static int vf_flush_loses(const struct vf_engine *engine, int err)
{
	if (err == 0 || engine->ops == &vf_engine_fail || vf_store_is_unsupported(err))
		return 0;
	if (engine->store.kind == VF_STORE_PLUGIN)
		return err != -ETIMEDOUT && err != -ENOTCONN && err != -ESHUTDOWN;
	return err != -EINVAL;
}

/* The first failure stays; two queues may meet one at the same moment. */
static void vf_flush_keep(uint64_t *flush_failure, int err)
{
	struct timespec now = { 0 };
	uint64_t failure;

	clock_gettime(CLOCK_REALTIME, &now);
	failure = (uint64_t)now.tv_sec << VF_FLUSH_ERRNO_BITS | (uint64_t)-err;
	vf_set_once_u64(flush_failure, failure);
}

int vf_flush_end(struct vf_queue *q, int result)
{
	if (result == 0)
		result = vf_store_verify(&q->engine.store);
	if (vf_unlikely(vf_flush_loses(&q->engine, result)))
		vf_flush_keep(q->flush_failure, result);
	if (result == 0) /* another queue may have met one meanwhile */
		result = -vf_flush_failure_errno(vf_load_relaxed_u64(q->flush_failure));
	/* After the failure is noted: a reader that finds no flush in flight knows that none has failed unseen. */
	vf_store_release_u32(&q->shm_status->flushing, q->shm_status->flushing - 1u);
	return result;
}
