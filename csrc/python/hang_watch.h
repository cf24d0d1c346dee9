/* SPDX-License-Identifier: Apache-2.0
 *
 * A second thread of the process that has a Python class. It finds requests that the class does not answer and calls that do
 * not return, even if the class holds the interpreter's lock: the thread takes no lock, and prints nothing itself.
 *
 * The loop marks each request by a number (vf_handoff_record.number), and each call of the class (vf_handoff.call). The
 * thread checks them every VF_HANG_TICK_NS, and knows for how long it has seen the same ones. So a request costs the loop a
 * few stores and no clock.
 */
#ifndef VF_HANG_WATCH_H
#define VF_HANG_WATCH_H

#include "python/handoff.h"

#include <pthread.h>
#include <semaphore.h>

#define VF_HANG_TICK_NS 400000000u
#define VF_HANG_NAME_NS 4000000000u /* with two ticks this is below 5 s */
#define VF_HANG_PAUSE_MIN_NS 5000000000u /* between two lines; it doubles */
#define VF_HANG_PAUSE_MAX_NS 3600000000000u
#define VF_HANG_CALM_NS 10000000000u /* without a hang, until the pause begins again */
#define VF_HANG_LATE_NS 300000000u /* the loop itself ends requests that are late; it needs less */
#define VF_HANG_GRACE_TICKS 13u /* for an interrupted call to end: 5 s in which this thread ran */

enum vf_hang_event {
	VF_HANG_NAMED, /* a request hangs: a line for people */
	VF_HANG_OVER, /* that request has ended */
	VF_HANG_LATE, /* the time-out of requests has passed: interrupt the call */
	VF_HANG_DEAF, /* that did not help: end the process */
};

struct vf_hang {
	uint64_t number; /* of the call if in_call, else of the request */
	uint64_t age_ns; /* for how long it was seen */
	uint64_t offset_bytes;
	uint64_t length_bytes;
	uint32_t other_count; /* further requests that wait */
	uint16_t slot;
	uint8_t op; /* of the request: enum vf_op */
	uint8_t in_call; /* the class has not returned from a call, whose kind is call_op */
	uint8_t call_op;
	uint8_t has_ended; /* the request: the class has answered it, and not returned */
};

struct vf_hang_seen {
	uint64_t number;
	uint64_t first_ns;
};

struct vf_hang_watch {
	struct vf_handoff *handoff; /* borrowed; open */
	void *owner;
	void (*on_event)(void *owner, enum vf_hang_event event, const struct vf_hang *hang);

	struct vf_hang_seen *seen; /* by slot; owned */
	struct vf_hang_seen call;
	uint64_t named; /* vf_hang.number that was named last, 0: none, or it is over */
	uint64_t named_first_ns;
	uint16_t named_slot;
	uint8_t named_call;
	uint64_t next_ns; /* the next line is not before */
	uint64_t pause_ns;
	uint64_t hung_ns; /* when a hang was last seen */
	uint32_t late_ticks; /* in a row */

	pthread_t thread;
	sem_t wake;
	uint32_t stop;
	uint8_t started;
};

/* Start the thread. handoff, owner and on_event are set, the rest is zero. 0 or -errno. */
int vf_hang_watch_start(struct vf_hang_watch *watch);

/* End the thread. A second call does nothing. `on_event` must be able to return meanwhile. */
void vf_hang_watch_stop(struct vf_hang_watch *watch);

/* One check; `seen` has a place for each slot. */
void vf_hang_watch_look(struct vf_hang_watch *watch, uint64_t now_ns);

#endif
