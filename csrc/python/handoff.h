/* SPDX-License-Identifier: Apache-2.0
 *
 * The half of the engine for Python classes that needs no Python. Submitted requests wait here until the round ends, and are
 * handed over under one hold of the interpreter's lock. Any thread that holds the lock pushes completed requests to a ring,
 * from which they are reaped without the lock.
 */
#ifndef VF_HANDOFF_H
#define VF_HANDOFF_H

#include "base/barrier.h"
#include "base/clock.h"
#include "engine/engine.h"

#define VF_HANDOFF_STEP_NS 1000000u /* the class's own tasks run at least this often */
#define VF_HANDOFF_EXPIRY_NS 50000000u /* how often time-outs are checked */

enum vf_handoff_stage {
	VF_STAGE_DATA,
	VF_STAGE_FLUSH, /* a flush after a write, which makes it durable */
	VF_STAGE_DONE,
};

/* A request in flight, by its slot. */
struct vf_handoff_record {
	struct vf_req *req;
	uint64_t zeroed_bytes; /* of zeroes that are written out, part after part */
	uint64_t start_ns; /* where requests have a time-out */
	int32_t error;
	uint32_t piece_count; /* not answered */
	uint8_t stage; /* enum vf_handoff_stage */

	/* For the thread of hang_watch.h: `number` is stored last, and cleared when the request has ended. */
	uint64_t offset_bytes;
	uint64_t length_bytes;
	uint32_t op; /* enum vf_op */
	uint64_t number; /* of all requests, from 1 on; 0: none */
};

struct vf_handoff {
	/* The other half; each takes the lock. */
	void *owner;
	void (*hand_over)(void *owner);
	void (*step)(void *owner); /* run the event loop once */
	void (*expire)(void *owner);
	int (*sleep_in_loop)(void *owner, const int *fds, uint32_t count, int timeout_ms);
	void (*region)(void *owner, void *va, size_t len_bytes, const struct vf_mapping *mapping);
	int (*zero_pages)(void *owner, uintptr_t address); /* this one does not take the lock, as it runs in a signal handler */
	void (*shut)(void *owner);

	struct vf_engine *engine; /* NULL: it is not open */
	struct vf_handoff_record *records; /* slot_count; owned, as the two circles are */
	uint32_t slot_count;
	uint16_t *backlog; /* slots that are not handed over yet */
	uint32_t backlog_at;
	uint32_t backlog_count;
	uint16_t *done; /* slots whose stage is over; its ends run freely */
	uint32_t done_head;
	uint32_t done_tail;
	uint32_t done_mask;
	uint32_t sleeping;
	int wake_fd; /* an eventfd; borrowed */
	uint8_t stuck; /* there was no room for the first request of the backlog */
	uint8_t has_loop;
	uint64_t timeout_ns; /* 0: none */
	uint64_t looked_ns; /* when time-outs were last checked */
	uint64_t stepped_ns;
	uint64_t submitted; /* so many requests */

	/* For the thread of hang_watch.h. */
	uint64_t call; /* odd: the class runs, called for the request in call_slot */
	uint32_t call_slot;
	uint32_t call_op; /* the method: enum vf_op, or VF_CALL_SUBMIT */
};

#define VF_CALL_SUBMIT 255u

/* The engine of a plugin whose context is a struct vf_handoff. */
extern const struct vf_engine_ops vf_engine_python;

void vf_handoff_free(struct vf_handoff *handoff);

/* Pop the next slot of the backlog, which is not empty. */
void vf_handoff_pop(struct vf_handoff *handoff);

/* Push a slot whose stage has ended; under the lock, so one at a time. 1: the loop sleeps and has to be woken. */
int vf_handoff_push(struct vf_handoff *handoff, uint16_t slot);

/* Queue a request that was popped, or the next stage of one, to be handed over. */
void vf_handoff_queue(struct vf_handoff *handoff, uint16_t slot);

/* Mark a call of the class, and its end, which may be marked twice. */
static inline void vf_handoff_call_begin(struct vf_handoff *handoff, uint16_t slot, uint8_t op)
{
	vf_store_relaxed_u32(&handoff->call_slot, slot);
	vf_store_relaxed_u32(&handoff->call_op, op);
	vf_store_release_u64(&handoff->call, handoff->call + 1u); /* pairs with the acquire of vf_hang_find() */
}

static inline void vf_handoff_call_end(struct vf_handoff *handoff)
{
	if (handoff->call & 1u)
		vf_store_release_u64(&handoff->call, handoff->call + 1u);
}

/* Whether the time-out of a request has passed. */
static inline int vf_handoff_is_late(const struct vf_handoff *handoff, uint16_t slot, uint64_t now_ns)
{
	return handoff->timeout_ns && now_ns - handoff->records[slot].start_ns > handoff->timeout_ns;
}

static inline int vf_handoff_is_done(const struct vf_handoff *handoff)
{
	return vf_load_acquire_u32(&handoff->done_tail) != handoff->done_head;
}

#endif
