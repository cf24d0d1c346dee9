/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "engine/faulty.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/barrier.h"
#include "base/clock.h"

#define VF_NS_PER_MS 1000000u

struct vf_held {
	struct vf_req *req;
	uint64_t due_ns;
	int32_t err;
};

struct vf_faulty {
	struct vf_engine inner;
	uint32_t fault_count;
	struct vf_fault fault[VF_FAULT_MAX];
	uint64_t random;
	uint32_t held_count;
	struct vf_held held[]; /* in no order: a place for each slot */
};

/* xorshift64*, for a sequence that a seed repeats */
static uint32_t vf_faulty_random(struct vf_faulty *faulty, uint32_t below)
{
	faulty->random ^= faulty->random >> 12;
	faulty->random ^= faulty->random << 25;
	faulty->random ^= faulty->random >> 27;
	return (uint32_t)((faulty->random * 0x2545F4914F6CDD1Du) >> 32) % below;
}

static int vf_fault_fits(const struct vf_fault *fault, const struct vf_req *req)
{
	if (!(fault->ops & (1u << req->op)))
		return 0;
	if (req->op != VF_OP_FLUSH &&
	    (req->offset_bytes > fault->last || req->offset_bytes + req->left_bytes <= fault->start))
		return 0;
	return fault->path[0] == '\0' || access(fault->path, F_OK) == 0;
}

/* Whether it is the rule's turn; counts the request. */
static int vf_fault_strikes(struct vf_faulty *faulty, struct vf_fault *fault)
{
	uint64_t place = fault->seen++;

	if (place < fault->skip || (place - fault->skip) % fault->every)
		return 0;
	if (fault->limit && fault->done == fault->limit)
		return 0;
	if (fault->chance < VF_FAULT_CHANCE_ONE && vf_faulty_random(faulty, VF_FAULT_CHANCE_ONE) >= fault->chance)
		return 0;
	fault->done++;
	return 1;
}

static struct vf_fault *vf_faulty_choose(struct vf_faulty *faulty, const struct vf_req *req)
{
	for (uint32_t i = 0; i < faulty->fault_count; i++) {
		if (vf_fault_fits(&faulty->fault[i], req) && vf_fault_strikes(faulty, &faulty->fault[i]))
			return &faulty->fault[i];
	}
	return NULL;
}

/* Copy the loop's changes of its store to the inner one. */
static void vf_faulty_follow(struct vf_engine *engine, struct vf_engine *inner)
{
	inner->store.write_flags = engine->store.write_flags;
	inner->store.size_bytes = engine->store.size_bytes;
}

static void vf_faulty_hear(struct vf_engine *engine, struct vf_engine *inner)
{
	engine->readable |= inner->readable;
	engine->always = inner->always;
	inner->readable = 0;
}

static int vf_faulty_submit(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_faulty *faulty = engine->state;
	const struct vf_fault *fault = vf_faulty_choose(faulty, req);

	if (fault && fault->delay_ns) {
		faulty->held[faulty->held_count++] = (struct vf_held){
			.req = req,
			.due_ns = vf_now_ns() + fault->delay_ns,
			.err = fault->err,
		};
		engine->inflight_count++;
		return 0;
	}
	if (fault) {
		req->result = -fault->err;
		return 1;
	}
	vf_faulty_follow(engine, &faulty->inner);
	if (faulty->inner.ops->submit(&faulty->inner, req))
		return 1;
	engine->inflight_count++;
	return 0;
}

static void vf_faulty_flush(struct vf_engine *engine)
{
	struct vf_faulty *faulty = engine->state;

	if (faulty->inner.ops->flush)
		faulty->inner.ops->flush(&faulty->inner);
}

/* Release delayed requests whose time is up: finished ones into done, the others to the engine. */
static uint32_t vf_faulty_release(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_faulty *faulty = engine->state;
	uint64_t now_ns = vf_now_ns();
	uint32_t count = 0;

	for (uint32_t i = faulty->held_count; i-- > 0 && count < max;) {
		struct vf_held held = faulty->held[i];

		if (held.due_ns > now_ns)
			continue;
		faulty->held[i] = faulty->held[--faulty->held_count];
		vf_faulty_follow(engine, &faulty->inner);
		if (held.err)
			held.req->result = -held.err;
		else if (!faulty->inner.ops->submit(&faulty->inner, held.req))
			continue;
		done[count++] = held.req;
	}
	return count;
}

static uint32_t vf_faulty_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_faulty *faulty = engine->state;
	uint32_t count = faulty->held_count ? vf_faulty_release(engine, done, max) : 0;

	if (faulty->inner.inflight_count && count < max)
		count += faulty->inner.ops->reap(&faulty->inner, done + count, max - count);
	vf_faulty_hear(engine, &faulty->inner);
	engine->inflight_count -= count;
	return count;
}

/* Milliseconds until the first delayed request is due, at most limit_ms; rounded up. */
static int vf_faulty_due_ms(const struct vf_faulty *faulty, int limit_ms)
{
	uint64_t now_ns = vf_now_ns();

	for (uint32_t i = 0; i < faulty->held_count; i++) {
		uint64_t due_ns = faulty->held[i].due_ns;
		uint64_t left_ms = due_ns > now_ns ? (due_ns - now_ns + VF_NS_PER_MS - 1u) / VF_NS_PER_MS : 0;

		if (left_ms < (uint64_t)limit_ms)
			limit_ms = (int)left_ms;
	}
	return limit_ms;
}

static int vf_faulty_poll(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	struct pollfd polled[VF_WATCH_MAX];
	int ready;

	for (uint32_t i = 0; i < count; i++)
		polled[i] = (struct pollfd){ .fd = fds[i], .events = POLLIN };
	ready = poll(polled, count, timeout_ms);
	for (uint32_t i = 0; ready > 0 && i < count; i++)
		engine->readable |= (uint32_t)(polled[i].revents != 0) << i;
	return ready == 0;
}

static int vf_faulty_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	struct vf_faulty *faulty = engine->state;
	struct vf_engine *inner = &faulty->inner;
	int due_ms = vf_faulty_due_ms(faulty, timeout_ms);
	int timed_out;

	vf_faulty_flush(engine);
	if (!inner->inflight_count && !inner->always)
		timed_out = vf_faulty_poll(engine, fds, count, due_ms);
	else
		timed_out = inner->ops->sleep(inner, fds, count, due_ms);
	vf_faulty_hear(engine, inner);
	return timed_out && due_ms == timeout_ms;
}

static void vf_faulty_wait(struct vf_engine *engine)
{
	struct vf_faulty *faulty = engine->state;
	struct vf_engine *inner = &faulty->inner;

	vf_faulty_flush(engine);
	if (!faulty->held_count && inner->inflight_count)
		inner->ops->wait(inner);
	else if (faulty->held_count) /* the engine's own requests are polled every millisecond */
		poll(NULL, 0, vf_faulty_due_ms(faulty, inner->inflight_count ? 1 : 1000));
	vf_faulty_hear(engine, inner);
}

static void vf_faulty_close(struct vf_engine *engine)
{
	struct vf_faulty *faulty = engine->state;

	vf_engine_close(&faulty->inner);
	free(faulty);
	engine->state = NULL;
}

static void vf_faulty_region(struct vf_engine *engine, void *va, size_t len_bytes, const struct vf_mapping *mapping)
{
	struct vf_faulty *faulty = engine->state;

	if (faulty->inner.ops->region)
		faulty->inner.ops->region(&faulty->inner, va, len_bytes, mapping);
}

static int vf_faulty_zero_pages(struct vf_engine *engine, uintptr_t address)
{
	struct vf_faulty *faulty = engine->state;

	return faulty->inner.ops->zero_pages ? faulty->inner.ops->zero_pages(&faulty->inner, address) : -1;
}

static const struct vf_engine_ops vf_engine_faulty = {
	.name = "faulty",
	.submit = vf_faulty_submit,
	.flush = vf_faulty_flush,
	.reap = vf_faulty_reap,
	.wait = vf_faulty_wait,
	.sleep = vf_faulty_sleep,
	.close = vf_faulty_close,
	.region = vf_faulty_region,
	.zero_pages = vf_faulty_zero_pages,
	.publish_batch = 4,
	.blocks = 1,
};

struct vf_faulty *vf_faulty_new(const struct vf_fault *faults, uint32_t fault_count, uint64_t seed, uint32_t slot_count)
{
	struct vf_faulty *faulty;

	errno = EINVAL;
	if (fault_count > VF_FAULT_MAX)
		return NULL;
	for (uint32_t i = 0; i < fault_count; i++) {
		if (!faults[i].every || !memchr(faults[i].path, '\0', sizeof(faults[i].path)))
			return NULL;
	}
	faulty = calloc(1, sizeof(*faulty) + slot_count * sizeof(faulty->held[0]));
	if (!faulty)
		return NULL;
	memcpy(faulty->fault, faults, fault_count * sizeof(*faults));
	faulty->fault_count = fault_count;
	faulty->random = seed ? seed : 1u;
	return faulty;
}

struct vf_engine *vf_faulty_inner(struct vf_faulty *faulty)
{
	return &faulty->inner;
}

void vf_faulty_attach(struct vf_engine *engine, struct vf_faulty *faulty)
{
	/* The inner engine owns the store's memory; the loop uses only kind, size and flags of ours. */
	*engine = (struct vf_engine){ .ops = &vf_engine_faulty, .store = faulty->inner.store, .state = faulty };
	engine->store.map = NULL;
	engine->store.bounce = NULL;
	engine->store.read_map = (struct vf_store_map){ .base = NULL };
	vf_faulty_hear(engine, &faulty->inner);
}

void vf_faulty_free(struct vf_faulty *faulty)
{
	free(faulty);
}
