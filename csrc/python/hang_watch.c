/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "python/hang_watch.h"

#include <signal.h>
#include <stdlib.h>

#define VF_HANG_STACK_BYTES (128u << 10)
#define VF_NS_PER_S 1000000000u

/* Notice new requests, and return the slot of the oldest one; -1: there is none. */
static int32_t vf_hang_oldest(struct vf_hang_watch *watch, uint64_t now_ns, uint32_t *count)
{
	const struct vf_handoff *handoff = watch->handoff;
	int32_t oldest = -1;

	*count = 0;
	for (uint32_t slot = 0; slot < handoff->slot_count; slot++) {
		struct vf_hang_seen *seen = &watch->seen[slot];
		uint64_t number = vf_load_acquire_u64(&handoff->records[slot].number);

		if (number != seen->number)
			*seen = (struct vf_hang_seen){ .number = number, .first_ns = now_ns };
		if (!number)
			continue;
		++*count;
		if (oldest < 0 || number < watch->seen[oldest].number)
			oldest = (int32_t)slot;
	}
	return oldest;
}

/* Describe the request of a slot. 0: it has just ended. */
static int vf_hang_describe(const struct vf_hang_watch *watch, uint32_t slot, uint64_t first_ns, uint64_t now_ns,
			    struct vf_hang *hang)
{
	const struct vf_handoff_record *record = &watch->handoff->records[slot];

	*hang = (struct vf_hang){
		.number = watch->seen[slot].number,
		.age_ns = now_ns - first_ns,
		.offset_bytes = vf_load_relaxed_u64(&record->offset_bytes),
		.length_bytes = vf_load_relaxed_u64(&record->length_bytes),
		.slot = (uint16_t)slot,
		.op = (uint8_t)vf_load_relaxed_u32(&record->op),
	};
	vf_fence_full();
	return hang->number && vf_load_acquire_u64(&record->number) == hang->number;
}

/* Find what hangs: the call that has not returned, else the oldest request. 0: nothing does. */
static int vf_hang_find(struct vf_hang_watch *watch, int32_t oldest, uint64_t now_ns, struct vf_hang *hang)
{
	const struct vf_handoff *handoff = watch->handoff;
	uint64_t call = vf_load_acquire_u64(&handoff->call);
	uint32_t slot = vf_load_relaxed_u32(&handoff->call_slot), op = vf_load_relaxed_u32(&handoff->call_op);

	if (call != watch->call.number)
		watch->call = (struct vf_hang_seen){ .number = call, .first_ns = now_ns };
	if ((call & 1u) && now_ns - watch->call.first_ns >= VF_HANG_NAME_NS && slot < handoff->slot_count) {
		uint8_t is_open = (uint8_t)vf_hang_describe(watch, slot, watch->call.first_ns, now_ns, hang);

		hang->has_ended = !is_open;
		hang->number = call;
		hang->in_call = 1;
		hang->call_op = (uint8_t)op;
		return vf_load_acquire_u64(&handoff->call) == call;
	}
	if (oldest < 0 || now_ns - watch->seen[oldest].first_ns < VF_HANG_NAME_NS)
		return 0;
	return vf_hang_describe(watch, (uint32_t)oldest, watch->seen[oldest].first_ns, now_ns, hang);
}

static void vf_hang_name(struct vf_hang_watch *watch, const struct vf_hang *hang, uint64_t now_ns)
{
	if (now_ns - watch->hung_ns > VF_HANG_CALM_NS) {
		watch->next_ns = now_ns;
		watch->pause_ns = VF_HANG_PAUSE_MIN_NS;
	}
	watch->hung_ns = now_ns;
	if (now_ns < watch->next_ns)
		return;
	watch->next_ns = now_ns + watch->pause_ns;
	watch->pause_ns = watch->pause_ns < VF_HANG_PAUSE_MAX_NS / 2u ? 2u * watch->pause_ns : VF_HANG_PAUSE_MAX_NS;
	watch->named = hang->number;
	watch->named_slot = hang->slot;
	watch->named_call = hang->in_call;
	watch->named_first_ns = now_ns - hang->age_ns;
	watch->on_event(watch->owner, VF_HANG_NAMED, hang);
}

/* See to requests that are later than their time-out. */
static void vf_hang_check_late(struct vf_hang_watch *watch, int32_t oldest, uint64_t now_ns)
{
	const struct vf_handoff *handoff = watch->handoff;
	struct vf_hang hang;
	uint64_t start_ns;

	if (oldest < 0 || !handoff->timeout_ns ||
	    !vf_hang_describe(watch, (uint32_t)oldest, watch->seen[oldest].first_ns, now_ns, &hang)) {
		watch->late_ticks = 0;
		return;
	}
	start_ns = vf_load_relaxed_u64(&handoff->records[oldest].start_ns);
	if (now_ns < start_ns + handoff->timeout_ns + VF_HANG_LATE_NS) {
		watch->late_ticks = 0;
		return;
	}
	watch->late_ticks++;
	watch->on_event(watch->owner, watch->late_ticks > VF_HANG_GRACE_TICKS ? VF_HANG_DEAF : VF_HANG_LATE, &hang);
}

void vf_hang_watch_look(struct vf_hang_watch *watch, uint64_t now_ns)
{
	struct vf_hang hang;
	uint32_t count;
	int32_t oldest = vf_hang_oldest(watch, now_ns, &count);

	if (watch->named && watch->named != (watch->named_call ? vf_load_acquire_u64(&watch->handoff->call) :
							     watch->seen[watch->named_slot].number)) {
		hang = (struct vf_hang){ .number = watch->named, .age_ns = now_ns - watch->named_first_ns, .slot = watch->named_slot };
		watch->named = 0;
		watch->on_event(watch->owner, VF_HANG_OVER, &hang);
	}
	if (vf_hang_find(watch, oldest, now_ns, &hang)) {
		hang.other_count = count - (count && !hang.has_ended);
		vf_hang_name(watch, &hang, now_ns);
	}
	vf_hang_check_late(watch, oldest, now_ns);
}

static void *vf_hang_watch_run(void *argument)
{
	struct vf_hang_watch *watch = argument;

	while (!vf_load_relaxed_u32(&watch->stop)) {
		uint64_t until_ns = vf_now_ns() + VF_HANG_TICK_NS;
		struct timespec until = { (time_t)(until_ns / VF_NS_PER_S), (long)(until_ns % VF_NS_PER_S) };

		(void)sem_clockwait(&watch->wake, CLOCK_MONOTONIC, &until); /* an early check does no harm */
		if (!vf_load_relaxed_u32(&watch->stop))
			vf_hang_watch_look(watch, vf_now_ns());
	}
	return NULL;
}

int vf_hang_watch_start(struct vf_hang_watch *watch)
{
	pthread_attr_t attr;
	sigset_t all, before;
	int err;

	watch->seen = calloc(watch->handoff->slot_count, sizeof(*watch->seen));
	if (!watch->seen)
		return -ENOMEM;
	watch->stop = 0;
	sem_init(&watch->wake, 0, 0);
	err = pthread_attr_init(&attr);
	if (!err) {
		/* Signals go to the loop and to the class. */
		sigfillset(&all);
		(void)pthread_attr_setstacksize(&attr, VF_HANG_STACK_BYTES);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		err = pthread_create(&watch->thread, &attr, vf_hang_watch_run, watch);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
		pthread_attr_destroy(&attr);
	}
	if (err) {
		sem_destroy(&watch->wake);
		free(watch->seen);
		watch->seen = NULL;
		return -err;
	}
	watch->started = 1;
	return 0;
}

void vf_hang_watch_stop(struct vf_hang_watch *watch)
{
	if (!watch->started)
		return;
	watch->started = 0;
	vf_store_relaxed_u32(&watch->stop, 1);
	sem_post(&watch->wake);
	pthread_join(watch->thread, NULL);
	sem_destroy(&watch->wake);
	free(watch->seen);
	watch->seen = NULL;
}
