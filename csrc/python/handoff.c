/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "python/handoff.h"

#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

void vf_handoff_free(struct vf_handoff *handoff)
{
	free(handoff->records);
	free(handoff->backlog);
	free(handoff->done);
	handoff->records = NULL;
	handoff->backlog = handoff->done = NULL;
}

static int vf_handoff_open(struct vf_engine *engine, uint32_t slot_count)
{
	struct vf_handoff *handoff = engine->context;
	uint32_t capacity = 1;

	while (capacity < slot_count)
		capacity *= 2u;
	vf_handoff_free(handoff);
	handoff->records = calloc(slot_count, sizeof(*handoff->records));
	handoff->backlog = calloc(slot_count, sizeof(*handoff->backlog));
	handoff->done = calloc(capacity, sizeof(*handoff->done));
	if (!handoff->records || !handoff->backlog || !handoff->done) {
		vf_handoff_free(handoff);
		return -ENOMEM;
	}
	handoff->slot_count = slot_count;
	handoff->done_mask = capacity - 1u;
	handoff->engine = engine;
	engine->state = handoff;
	engine->always = handoff->has_loop;
	return 0;
}

static void vf_handoff_close(struct vf_engine *engine)
{
	struct vf_handoff *handoff = engine->state;

	handoff->shut(handoff->owner);
	handoff->engine = NULL;
}

void vf_handoff_queue(struct vf_handoff *handoff, uint16_t slot)
{
	uint32_t at = handoff->backlog_at + handoff->backlog_count;

	handoff->backlog[at >= handoff->slot_count ? at - handoff->slot_count : at] = slot;
	handoff->backlog_count++;
}

void vf_handoff_pop(struct vf_handoff *handoff)
{
	handoff->backlog_at = handoff->backlog_at + 1u < handoff->slot_count ? handoff->backlog_at + 1u : 0;
	handoff->backlog_count--;
}

int vf_handoff_push(struct vf_handoff *handoff, uint16_t slot)
{
	handoff->done[handoff->done_tail & handoff->done_mask] = slot;
	vf_store_release_u32(&handoff->done_tail, handoff->done_tail + 1u); /* pairs with the acquire of vf_handoff_take() */
	vf_fence_full(); /* pairs with those of vf_handoff_sleep() and Engine.sleep_in_loop() */
	return vf_load_relaxed_u32(&handoff->sleeping) != 0;
}

static int vf_handoff_submit(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_handoff *handoff = engine->state;

	handoff->records[req->slot] = (struct vf_handoff_record){
		.req = req,
		.start_ns = handoff->timeout_ns ? vf_now_ns() : 0,
		.stage = VF_STAGE_DATA,
		.offset_bytes = req->offset_bytes,
		.length_bytes = req->left_bytes,
		.op = req->op,
	};
	/* Pairs with the acquire of vf_hang_oldest(). */
	vf_store_release_u64(&handoff->records[req->slot].number, ++handoff->submitted);
	vf_handoff_queue(handoff, req->slot);
	engine->inflight_count++;
	return 0;
}

static void vf_handoff_flush(struct vf_engine *engine)
{
	struct vf_handoff *handoff = engine->state;

	if (handoff->backlog_count ||
	    (handoff->has_loop && vf_now_ns() - handoff->stepped_ns > VF_HANDOFF_STEP_NS))
		handoff->hand_over(handoff->owner);
}

/* Return requests that have ended; those with another stage are queued to be handed over again. */
static uint32_t vf_handoff_take(struct vf_handoff *handoff, struct vf_req **done, uint32_t max)
{
	uint32_t tail = vf_load_acquire_u32(&handoff->done_tail), count = 0;

	while (handoff->done_head != tail && count < max) {
		uint16_t slot = handoff->done[handoff->done_head++ & handoff->done_mask];
		struct vf_handoff_record *record = &handoff->records[slot];

		if (record->stage != VF_STAGE_DONE) {
			vf_handoff_queue(handoff, slot);
			continue;
		}
		vf_store_release_u64(&record->number, 0);
		record->req->result = record->error;
		if (record->req->op == VF_OP_READ && !record->error)
			vf_req_advance(record->req, record->req->left_bytes);
		done[count++] = record->req;
	}
	handoff->engine->inflight_count -= count;
	return count;
}

static uint32_t vf_handoff_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_handoff *handoff = engine->state;
	uint32_t count = vf_handoff_take(handoff, done, max);

	if (!count && handoff->has_loop) {
		handoff->step(handoff->owner);
		count = vf_handoff_take(handoff, done, max);
	}
	if (handoff->timeout_ns && vf_now_ns() - handoff->looked_ns > VF_HANDOFF_EXPIRY_NS)
		handoff->expire(handoff->owner);
	return count;
}

static int vf_handoff_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	struct vf_handoff *handoff = engine->state;
	struct pollfd polled[VF_WATCH_MAX + 1u];
	uint64_t wakes;
	int ready = 1;

	if (vf_handoff_is_done(handoff) || (handoff->backlog_count && !handoff->stuck))
		return 0;
	if (handoff->has_loop)
		return handoff->sleep_in_loop(handoff->owner, fds, count, timeout_ms);
	for (uint32_t i = 0; i < count; i++)
		polled[i] = (struct pollfd){ .fd = fds[i], .events = POLLIN };
	polled[count] = (struct pollfd){ .fd = handoff->wake_fd, .events = POLLIN };
	vf_store_relaxed_u32(&handoff->sleeping, 1);
	vf_fence_full(); /* pairs with the one of vf_handoff_push() */
	if (!vf_handoff_is_done(handoff)) {
		ready = poll(polled, count + 1u, timeout_ms);
		for (uint32_t i = 0; ready > 0 && i < count; i++)
			engine->readable |= (uint32_t)(polled[i].revents != 0) << i;
		if (ready > 0 && polled[count].revents) {
			ssize_t n = read(handoff->wake_fd, &wakes, sizeof(wakes));
			(void)n; /* nothing to read: it was read already */
		}
	}
	vf_store_relaxed_u32(&handoff->sleeping, 0);
	return ready == 0;
}

static void vf_handoff_wait(struct vf_engine *engine)
{
	const struct vf_handoff *handoff = engine->state;

	/* Time-outs are checked now and then. */
	vf_handoff_sleep(engine, NULL, 0, handoff->timeout_ns ? (int)(VF_HANDOFF_EXPIRY_NS / 1000000u) : -1);
}

static void vf_handoff_region(struct vf_engine *engine, void *va, size_t len_bytes, const struct vf_mapping *mapping)
{
	struct vf_handoff *handoff = engine->state;

	handoff->region(handoff->owner, va, len_bytes, mapping);
}

static int vf_handoff_zero_pages(struct vf_engine *engine, uintptr_t address)
{
	struct vf_handoff *handoff = engine->state;

	return handoff->zero_pages(handoff->owner, address);
}

const struct vf_engine_ops vf_engine_python = {
	.name = "python",
	.open = vf_handoff_open,
	.submit = vf_handoff_submit,
	.flush = vf_handoff_flush,
	.reap = vf_handoff_reap,
	.wait = vf_handoff_wait,
	.sleep = vf_handoff_sleep,
	.close = vf_handoff_close,
	.region = vf_handoff_region,
	.zero_pages = vf_handoff_zero_pages,
	.publish_batch = 16,
	.blocks = 1,
};
