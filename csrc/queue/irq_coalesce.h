/* SPDX-License-Identifier: Apache-2.0
 *
 * Interrupt moderation: when to interrupt a sleeping driver for published completions. One interrupt for several completions
 * costs less than one for each, on the CPU that the driver needs to send more. But a driver that has nothing more to send, or
 * CPU to spare, only loses time by it. The device cannot see which case it is, so it measures. For a window of completions the
 * interrupt waits for twice as many of them. That batch is kept only if completions then come faster. A smaller batch is kept if
 * it does as well. A wait ends when completions stop coming, or after `limit_ns`. Waits in vain end a trial, and trials without
 * success become rare: a driver with one request at a time meets two such waits in 8192 requests.
 *
 * Nothing here depends on the ring's format, or on anything that the driver writes.
 */
#ifndef VF_IRQ_COALESCE_H
#define VF_IRQ_COALESCE_H

#include <stdint.h>

#include "base/barrier.h"

#define VF_IRQ_BATCH_MAX 32u /* beyond that, the cost of an interrupt is negligible */
#define VF_IRQ_WINDOW 128u /* completions of one measurement */
#define VF_IRQ_PAUSE_MAX 64u /* windows between two trials when none is of use */
#define VF_IRQ_STOPPED 4u /* completions have stopped if none comes for so many times the usual interval */
#define VF_IRQ_VAIN_MAX 2u /* waits in vain, beyond those that were filled, that end a batch */

/* All zeroes to begin with. */
struct vf_irq_coalesce {
	uint64_t limit_ns; /* longest wait; 0 = interrupt at once */
	uint64_t since_ns; /* the first completion without an interrupt; 0 = none */
	uint64_t last_ns; /* the last such completion */
	uint32_t batch; /* completions for one interrupt: 0 and 1 interrupt at once */
	uint32_t kept_batch; /* the batch outside of trials */
	uint8_t trial; /* batch is on trial */
	uint8_t smaller; /* the direction of this trial, or of the next */
	uint32_t vain; /* waits that ended because completions had stopped, less those that were filled */
	uint32_t pause; /* windows until the next trial */
	uint32_t pause_next;
	uint32_t window_count; /* completions in this window */
	uint64_t window_ns; /* its start; 0 = there has been none */
	uint64_t cost_ns; /* time per completion with kept_batch */
};

static inline void vf_irq_coalesce_end_trial(struct vf_irq_coalesce *co, int kept)
{
	if (kept) {
		co->kept_batch = co->batch;
		co->pause_next = 1;
	} else {
		co->batch = co->kept_batch;
		co->smaller = !co->smaller;
		co->pause_next = co->pause_next < VF_IRQ_PAUSE_MAX ? 2u * co->pause_next : VF_IRQ_PAUSE_MAX;
	}
	co->trial = 0;
	co->pause = co->pause_next;
}

/* At the end of a window: judge a trial by the cost of a completion, or begin one. */
static inline void vf_irq_coalesce_judge(struct vf_irq_coalesce *co, uint64_t now_ns)
{
	uint64_t old_ns = co->cost_ns;
	uint64_t cost_ns = (now_ns - co->window_ns) / co->window_count;

	co->window_count = 0;
	if (co->window_ns == 0) {
		co->window_ns = now_ns;
		co->batch = co->kept_batch = co->pause = co->pause_next = 1;
		return;
	}
	co->window_ns = now_ns;
	if (co->trial) {
		int kept = cost_ns < (co->smaller ? old_ns + old_ns / 32u : old_ns - old_ns / 16u);

		if (kept)
			co->cost_ns = cost_ns;
		vf_irq_coalesce_end_trial(co, kept);
		return;
	}
	co->cost_ns = cost_ns;
	if (--co->pause)
		return;
	if (co->batch == (co->smaller ? 1u : VF_IRQ_BATCH_MAX))
		co->smaller = !co->smaller;
	co->batch = co->smaller ? co->batch / 2u : co->batch * 2u;
	co->trial = 1;
}

static inline void vf_irq_coalesce_count(struct vf_irq_coalesce *co, uint32_t owed, uint64_t now_ns)
{
	co->window_count += owed;
	if (vf_unlikely(co->window_count >= VF_IRQ_WINDOW))
		vf_irq_coalesce_judge(co, now_ns);
}

/* After a publication: whether to interrupt the driver now. It has had no interrupt for `owed` published completions. */
static inline int vf_irq_coalesce_should_interrupt(struct vf_irq_coalesce *co, uint32_t owed, uint64_t now_ns)
{
	if (owed >= co->batch) {
		co->vain -= co->vain != 0;
		vf_irq_coalesce_count(co, owed, now_ns);
		return 1;
	}
	if (co->since_ns == 0)
		co->since_ns = now_ns;
	co->last_ns = now_ns;
	return 0;
}

/* While an interrupt waits: whether to send it before its batch is full. */
static inline int vf_irq_coalesce_expired(struct vf_irq_coalesce *co, uint32_t owed, uint64_t now_ns)
{
	uint64_t wait_ns = VF_IRQ_STOPPED * co->cost_ns;
	int stopped = now_ns - co->last_ns > (wait_ns < co->limit_ns / 2u ? wait_ns : co->limit_ns / 2u);

	if (!stopped && now_ns - co->since_ns < co->limit_ns)
		return 0;
	if (stopped && ++co->vain >= VF_IRQ_VAIN_MAX) {
		co->vain = 0;
		if (!co->trial)
			co->kept_batch = co->batch / 2u;
		vf_irq_coalesce_end_trial(co, 0);
	}
	vf_irq_coalesce_count(co, owed, now_ns);
	return 1;
}

#endif
