/* SPDX-License-Identifier: Apache-2.0
 *
 * When a class's hangs are named: hang_watch.c over a made-up handoff and clock. Prints a line for each event: what it is, the
 * second, the age in seconds, the request's or call's number, and how many other requests wait.
 */
#include "python/hang_watch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TICK_S 0.4

static double now_s = 1000.0;

static void print_event(void *owner, enum vf_hang_event event, const struct vf_hang *hang)
{
	static const char *const name[] = { "named", "over", "late", "deaf" };

	(void)owner;
	printf("%s at=%.1f age=%.1f number=%llu call=%d offset=%llu others=%u\n", name[event], now_s - 1000.0,
	       (double)hang->age_ns / 1e9, (unsigned long long)hang->number, hang->in_call,
	       (unsigned long long)hang->offset_bytes, hang->other_count);
}

static void pass(struct vf_hang_watch *watch, double seconds)
{
	for (double until = now_s + seconds - TICK_S / 2; now_s < until;) {
		now_s += TICK_S;
		vf_hang_watch_look(watch, (uint64_t)(now_s * 1e9));
	}
}

static void submit(struct vf_handoff *handoff, uint16_t slot)
{
	handoff->records[slot] = (struct vf_handoff_record){
		.start_ns = (uint64_t)(now_s * 1e9), .offset_bytes = 4096u * slot, .number = ++handoff->submitted
	};
}

int main(int argc, char **argv)
{
	static struct vf_handoff_record records[8];
	static struct vf_hang_seen seen[8];
	struct vf_handoff handoff = { .records = records, .slot_count = 8 };
	struct vf_hang_watch watch = { .handoff = &handoff, .on_event = print_event, .seen = seen };
	const char *what = argc > 1 ? argv[1] : "";

	if (!strcmp(what, "forever")) {
		submit(&handoff, 3);
		submit(&handoff, 1);
		pass(&watch, 7 * 3600);
	} else if (!strcmp(what, "call")) {
		submit(&handoff, 2);
		vf_handoff_call_begin(&handoff, 2, VF_OP_READ);
		pass(&watch, 6);
		vf_handoff_call_end(&handoff);
		records[2].number = 0;
		pass(&watch, 30);
		submit(&handoff, 2); /* a hang after a calm time is named as soon as the first one */
		pass(&watch, 6);
	} else if (!strcmp(what, "answered")) { /* the call has completed its request, and does not return */
		submit(&handoff, 2);
		vf_handoff_call_begin(&handoff, 2, VF_CALL_SUBMIT);
		records[2].number = 0;
		pass(&watch, 6);
	} else if (!strcmp(what, "slow")) { /* each request takes 4.8 s, for ten minutes */
		for (int i = 0; i < 125; i++) {
			submit(&handoff, 0);
			pass(&watch, 4.8);
			records[0].number = 0;
		}
	} else if (!strcmp(what, "busy")) { /* none takes long */
		for (int i = 0; i < 1000; i++) {
			submit(&handoff, (uint16_t)(i % 8));
			pass(&watch, TICK_S);
		}
	} else if (!strcmp(what, "late")) {
		handoff.timeout_ns = 2000000000u;
		submit(&handoff, 5);
		pass(&watch, 8.4);
	}
	return 0;
}
