/* SPDX-License-Identifier: Apache-2.0
 *
 * Faults built in on purpose, one per build (-DVF_SEED_FAULT=1 to 7), by which tests check that the torture suite detects
 * them. Without the macro every hook is constant and compiled out. They also widen the windows that a kill has to hit, so
 * that a test needs few kills.
 */
#ifndef VF_SEED_FAULT_H
#define VF_SEED_FAULT_H

#include <signal.h>
#include <stdint.h>
#include <unistd.h>

#include "base/counters.h"

#ifndef VF_SEED_FAULT
#define VF_SEED_FAULT 0
#endif

enum vf_seed_fault {
	VF_SEED_NONE,
	VF_SEED_FORGET, /* some heads are never entered into the log */
	VF_SEED_WRITE_EARLY, /* a write is completed before its data is submitted */
	VF_SEED_FLUSH_EARLY, /* a flush is completed before it is carried out */
	VF_SEED_DISORDER, /* a replay has the wrong order */
	VF_SEED_REPEAT, /* completed requests are replayed, too */
	VF_SEED_DEADLY, /* a write to a certain place kills the worker */
	VF_SEED_NO_FENCE, /* writes are sent to an NBD server again while it may still work on the old ones */
};

#define VF_SEED_FORGET_EVERY 8u
#define VF_SEED_PAUSE_US 300u
#define VF_SEED_DEADLY_BYTES 65536u /* where the deadly place begins */

/* Widen a window, in the build that has `fault`. */
static inline void vf_seed_pause(enum vf_seed_fault fault)
{
	if (VF_SEED_FAULT == fault)
		usleep(VF_SEED_PAUSE_US);
}

/* Whether the head of that order is left out of the log. */
static inline int vf_seed_forgets(uint64_t order)
{
	return VF_SEED_FAULT == VF_SEED_FORGET && order % VF_SEED_FORGET_EVERY == 0;
}

/* Whether a request is completed first and carried out after that. */
static inline int vf_seed_answers_early(uint32_t op)
{
	return (VF_SEED_FAULT == VF_SEED_WRITE_EARLY && op == VF_OP_WRITE) ||
	       (VF_SEED_FAULT == VF_SEED_FLUSH_EARLY && op == VF_OP_FLUSH);
}

/* Whether a takeover leaves published requests in the log. */
static inline int vf_seed_repeats(void)
{
	return VF_SEED_FAULT == VF_SEED_REPEAT;
}

/* Die on a certain request. */
static inline void vf_seed_die(uint32_t op, uint64_t offset_bytes)
{
	if (VF_SEED_FAULT == VF_SEED_DEADLY && op == VF_OP_WRITE && offset_bytes == VF_SEED_DEADLY_BYTES)
		raise(SIGKILL);
}

/* Whether the end of the last connection to an NBD server is not waited for. */
static inline int vf_seed_has_no_fence(void)
{
	return VF_SEED_FAULT == VF_SEED_NO_FENCE;
}

#endif
