/* SPDX-License-Identifier: Apache-2.0
 *
 * Interrupt moderation: when to tell a sleeping driver of what it can see already. One interrupt for several
 * completions costs less than one for each, on the CPU that the driver needs to send more; but a driver that has nothing
 * more to send, or CPU to spare, only loses time by it. The device cannot see which is the case. So it measures: for a
 * window of completions the interrupt waits for twice as many of them, and that batch is kept only if completions
 * then come faster; a smaller one is kept if it does as well. A hold ends when completions stop coming, or after
 * `limit_ns`; holds in vain end a trial, and trials without success become rare: a driver with one request at a time
 * meets two such holds in 8192 requests.
 *
 * Nothing here depends on the ring's format, or on anything that the driver writes.
 */
#ifndef VF_IRQ_HOLD_H
#define VF_IRQ_HOLD_H

#include <stdint.h>

#include "barrier.h"

#define VF_IRQ_BATCH_MAX 32u /* beyond that, what an interrupt costs is lost among the requests */
#define VF_IRQ_WINDOW 128u /* completions of one measurement */
#define VF_IRQ_PAUSE_MAX 64u /* windows between two trials when none is of use */
#define VF_IRQ_STOPPED 4u /* completions have stopped coming: none for so many times the usual */
#define VF_IRQ_VAIN_MAX 2u /* holds in vain, beyond those that were filled, that end a batch */

/* All zeroes to begin with. */
struct vf_irq_hold {
	uint64_t limit_ns; /* longest hold; 0 = tell at once */
	uint64_t since_ns; /* the first completion that the driver has not been told of; 0 = none */
	uint64_t last_ns; /* the last such completion */
	uint32_t batch; /* completions for one interrupt: 0 and 1 tell at once */
	uint32_t kept_batch; /* that of no trial */
	uint8_t trial; /* batch is on trial */
	uint8_t smaller; /* the direction of this trial, or of the next */
	uint32_t vain; /* holds that ended because completions had stopped, less those that were filled */
	uint32_t pause; /* windows until the next trial */
	uint32_t pause_next;
	uint32_t window_count; /* completions in this window */
	uint64_t window_ns; /* its start; 0 = there has been none */
	uint64_t cost_ns; /* time per completion with kept_batch */
};

static inline void vf_irq_hold_end_trial(struct vf_irq_hold *hold, int kept)
{
	if (kept) {
		hold->kept_batch = hold->batch;
		hold->pause_next = 1;
	} else {
		hold->batch = hold->kept_batch;
		hold->smaller = !hold->smaller;
		hold->pause_next = hold->pause_next < VF_IRQ_PAUSE_MAX ? 2u * hold->pause_next : VF_IRQ_PAUSE_MAX;
	}
	hold->trial = 0;
	hold->pause = hold->pause_next;
}

/* At the end of a window: judge a trial by what a completion has cost, or begin one. */
static inline void vf_irq_hold_judge(struct vf_irq_hold *hold, uint64_t now_ns)
{
	uint64_t old_ns = hold->cost_ns;
	uint64_t cost_ns = (now_ns - hold->window_ns) / hold->window_count;

	hold->window_count = 0;
	if (hold->window_ns == 0) {
		hold->window_ns = now_ns;
		hold->batch = hold->kept_batch = hold->pause = hold->pause_next = 1;
		return;
	}
	hold->window_ns = now_ns;
	if (hold->trial) {
		int kept = cost_ns < (hold->smaller ? old_ns + old_ns / 32u : old_ns - old_ns / 16u);

		if (kept)
			hold->cost_ns = cost_ns;
		vf_irq_hold_end_trial(hold, kept);
		return;
	}
	hold->cost_ns = cost_ns;
	if (--hold->pause)
		return;
	if (hold->batch == (hold->smaller ? 1u : VF_IRQ_BATCH_MAX))
		hold->smaller = !hold->smaller;
	hold->batch = hold->smaller ? hold->batch / 2u : hold->batch * 2u;
	hold->trial = 1;
}

static inline void vf_irq_hold_count(struct vf_irq_hold *hold, uint32_t owed, uint64_t now_ns)
{
	hold->window_count += owed;
	if (vf_unlikely(hold->window_count >= VF_IRQ_WINDOW))
		vf_irq_hold_judge(hold, now_ns);
}

/* After a publication: true when the driver is to be told now. `owed` completions are shown to it and not told. */
static inline int vf_irq_hold_tell(struct vf_irq_hold *hold, uint32_t owed, uint64_t now_ns)
{
	if (owed >= hold->batch) {
		hold->vain -= hold->vain != 0;
		vf_irq_hold_count(hold, owed, now_ns);
		return 1;
	}
	if (hold->since_ns == 0)
		hold->since_ns = now_ns;
	hold->last_ns = now_ns;
	return 0;
}

/* While something is held: true when the driver is to be told all the same. */
static inline int vf_irq_hold_expired(struct vf_irq_hold *hold, uint32_t owed, uint64_t now_ns)
{
	uint64_t wait_ns = VF_IRQ_STOPPED * hold->cost_ns;
	int stopped = now_ns - hold->last_ns > (wait_ns < hold->limit_ns / 2u ? wait_ns : hold->limit_ns / 2u);

	if (!stopped && now_ns - hold->since_ns < hold->limit_ns)
		return 0;
	if (stopped && ++hold->vain >= VF_IRQ_VAIN_MAX) {
		hold->vain = 0;
		if (!hold->trial)
			hold->kept_batch = hold->batch / 2u;
		vf_irq_hold_end_trial(hold, 0);
	}
	vf_irq_hold_count(hold, owed, now_ns);
	return 1;
}

#endif
