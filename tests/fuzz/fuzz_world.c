/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "fuzz_world.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz_hooks.h"

/* _fuzz.pyx */
int fuzz_queue_round(struct vf_queue *q);
int fuzz_queue_adopt(struct vf_queue *q, uint16_t state);
int fuzz_queue_redo(struct vf_queue *q, uint32_t count);
void fuzz_queue_drain(struct vf_queue *q);
void fuzz_queue_fail(struct vf_queue *q, int err);

struct fuzz_world world;

static uint8_t *store_bytes; /* FUZZ_CAPACITY_SECTORS, exactly */
static uint8_t store_before[FUZZ_CAPACITY_SECTORS * 512u];

static struct {
	bool out; /* popped and not yet completed */
	uint64_t writable_bytes;
} head_state[FUZZ_QUEUE_MAX];

static struct vf_req *pending[FUZZ_QUEUE_MAX];
static bool engine_must_finish;

static uint32_t fuzz_random(void)
{
	world.random = world.random * 1664525u + 1013904223u;
	return world.random >> 8;
}

/* Invariants of chains */

static void fuzz_order_add(uint16_t head)
{
	if (!world.q->vring.ordered)
		return;
	FUZZ_ASSERT(world.order_count < FUZZ_QUEUE_MAX);
	world.order[world.order_count++] = head;
}

/* What comes back is what was taken first. */
static void fuzz_order_remove(uint16_t head)
{
	if (!world.q->vring.ordered)
		return;
	FUZZ_ASSERT(world.order_count && world.order[0] == head);
	memmove(world.order, world.order + 1, --world.order_count * sizeof(world.order[0]));
}

void fuzz_popped(const struct vf_chain *chain)
{
	FUZZ_ASSERT(chain->head < world.q->vring.size);
	FUZZ_ASSERT(chain->segment_count >= 1 && chain->segment_count <= chain->segment_max);
	world.last_popped = chain->head;
	world.busy_popped = head_state[chain->head].out;
	FUZZ_ASSERT(!world.busy_popped || !world.q->vring.is_packed); /* slots in flight are never taken again */
	if (world.busy_popped)
		return; /* what is known of the chain in flight stays */
	fuzz_order_add(chain->head);
	head_state[chain->head].out = true;
	head_state[chain->head].writable_bytes = 0;
	for (uint32_t i = 0; i < chain->segment_count; i++) {
		if (chain->segments[i].writable)
			head_state[chain->head].writable_bytes += chain->segments[i].len;
	}
}

void fuzz_fast_path(const struct vf_req *req)
{
	struct vf_segment segment = { .len = (uint32_t)req->writable_bytes, .writable = 1 };
	struct vf_chain chain = { .head = req->head, .segment_count = 1, .segment_max = 1, .segments = &segment };

	fuzz_popped(&chain);
}

/* A chain that a worker before had taken is looked at again, as the driver has it by now. */
void fuzz_walked(const struct vf_chain *chain)
{
	FUZZ_ASSERT(chain->head < world.q->vring.size && head_state[chain->head].out);
	fuzz_order_add(chain->head);
	head_state[chain->head].writable_bytes = 0;
	for (uint32_t i = 0; i < chain->segment_count; i++) {
		if (chain->segments[i].writable)
			head_state[chain->head].writable_bytes += chain->segments[i].len;
	}
}

void fuzz_pushed(uint16_t head, uint32_t written_bytes)
{
	FUZZ_ASSERT(head < FUZZ_QUEUE_MAX && head_state[head].out);
	FUZZ_ASSERT(written_bytes <= head_state[head].writable_bytes);
	fuzz_order_remove(head);
	head_state[head].out = false;
}

/* The one whose turn it is. */
void fuzz_pushed_next(uint32_t written_bytes)
{
	FUZZ_ASSERT(world.order_count);
	fuzz_pushed(world.order[0], written_bytes);
}

/* Engine */

static void fuzz_check_iovs(const struct vf_req *req)
{
	uint32_t perm = req->op == VF_OP_READ ? VF_PERM_WO : VF_PERM_RO;
	uint64_t total = 0;

	FUZZ_ASSERT(req->iov_count >= 1 && req->iov_count <= world.q->iov_max && req->iov == req->iov_base);
	for (uint32_t i = 0; i < req->iov_count; i++) {
		struct fuzz_region *region = fuzz_region_of_address(req->iov[i].iov_base, req->iov[i].iov_len);

		FUZZ_ASSERT(region && (region->perm & perm) == perm && req->iov[i].iov_len > 0);
		total += req->iov[i].iov_len;
	}
	FUZZ_ASSERT(total == req->left_bytes);
}

static void fuzz_check_req(const struct vf_req *req)
{
	bool is_transfer = req->op == VF_OP_READ || req->op == VF_OP_WRITE;

	FUZZ_ASSERT(req->status && fuzz_region_of_address(req->status, 1));
	if (req->op == VF_OP_FLUSH)
		return;
	FUZZ_ASSERT(is_transfer || req->op == VF_OP_DISCARD || req->op == VF_OP_WRITE_ZEROES);
	FUZZ_ASSERT(req->op == VF_OP_READ || !world.q->device.read_only);
	FUZZ_ASSERT(req->left_bytes > 0 && req->left_bytes <= sizeof(store_before));
	FUZZ_ASSERT(req->offset_bytes <= sizeof(store_before) - req->left_bytes);
	FUZZ_ASSERT((req->offset_bytes | req->left_bytes) % (512u * world.q->device.block_sectors) == 0);
	if (is_transfer)
		fuzz_check_iovs(req);
	else
		FUZZ_ASSERT(req->range_at < req->range_count && req->range_count <= VF_RANGE_MAX);
}

/* Carry a request out, or part of it and then an error. */
static void fuzz_perform(struct vf_req *req)
{
	static const int errors[] = { -EIO, -ENOSPC, -EDQUOT, -EFAULT };
	uint32_t at = ++world.request_count;

	if (world.error_every && at % world.error_every == 0) {
		if (req->op == VF_OP_READ || req->op == VF_OP_WRITE)
			vf_req_advance(req, fuzz_random() % req->left_bytes);
		req->result = errors[at / world.error_every % 4u];
		return;
	}
	req->result = vf_store_do(&world.q->engine.store, req);
}

static int fuzz_engine_submit(struct vf_engine *engine, struct vf_req *req)
{
	fuzz_check_req(req);
	if (!world.async || fuzz_random() % 4u == 0) {
		fuzz_perform(req);
		return 1;
	}
	FUZZ_ASSERT(engine->inflight_count < world.q->slot_count);
	pending[engine->inflight_count++] = req;
	return 0;
}

static void fuzz_engine_flush(struct vf_engine *engine)
{
	(void)engine;
}

static uint32_t fuzz_engine_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	uint32_t count = 0;

	while (engine->inflight_count && count < max && (engine_must_finish || fuzz_random() % 2u)) {
		uint32_t at = fuzz_random() % engine->inflight_count;

		engine_must_finish = false;
		done[count] = pending[at];
		pending[at] = pending[--engine->inflight_count];
		fuzz_perform(done[count++]);
	}
	return count;
}

static void fuzz_engine_wait(struct vf_engine *engine)
{
	FUZZ_ASSERT(engine->inflight_count);
	engine_must_finish = true;
}

static const struct vf_engine_ops fuzz_engine = {
	.name = "fuzz",
	.submit = fuzz_engine_submit,
	.flush = fuzz_engine_flush,
	.reap = fuzz_engine_reap,
	.wait = fuzz_engine_wait,
	.publish_batch = 4,
};

static int fuzz_inject_irq(struct vf_port *port)
{
	(void)port;
	world.irq_count++;
	return world.irq_fail_every && world.irq_count % world.irq_fail_every == 0 ? -EAGAIN : 0;
}

/* Queues: made once, with arrays of their own for every slot, so that one slot's overrun is seen. */

static struct vf_queue *fuzz_queue_make(uint32_t queue_size, uint32_t seg_max)
{
	static void *replaced[16]; /* the arrays of all slots in one; kept reachable, for the leak check */
	static uint32_t replaced_count;
	struct vf_blk_device device = { .block_sectors = 1, .seg_max = seg_max };
	struct vf_queue *q = vf_queue_create(&device, queue_size, calloc(1, vf_shm_layout().stride_bytes));

	FUZZ_ASSERT(q);
	replaced[replaced_count++] = q->reqs[0].iov_base;
	replaced[replaced_count++] = q->reqs[0].ranges;
	for (uint32_t i = 0; i < q->slot_count; i++) {
		q->reqs[i].iov_base = calloc(q->iov_max, sizeof(struct iovec));
		q->reqs[i].ranges = calloc(VF_RANGE_MAX, sizeof(struct vf_blk_range));
	}
	return q;
}

static struct vf_queue *fuzz_queue_get(uint8_t which)
{
	static const struct {
		uint32_t queue_size, seg_max;
	} geometry[] = { { 16, 14 }, { 32, 30 }, { 2, 1 }, { 32, 1 }, { 8, 6 }, { 4, 2 }, { 16, 126 }, { 128, 4 } };
	static struct vf_queue *queues[8];

	which %= 8u;
	if (!queues[which])
		queues[which] = fuzz_queue_make(geometry[which].queue_size, geometry[which].seg_max);
	return queues[which];
}

static void fuzz_store_fill(void)
{
	if (!store_bytes) {
		store_bytes = malloc(sizeof(store_before));
		for (size_t i = 0; i < sizeof(store_before); i++)
			store_before[i] = (uint8_t)(i / 512u + i);
	}
	memcpy(store_bytes, store_before, sizeof(store_before));
}

void fuzz_world_open(uint8_t which_queue, uint8_t device_bits)
{
	struct vf_queue *q = fuzz_queue_get(which_queue);

	world = (struct fuzz_world){ .q = q };
	memset(head_state, 0, sizeof(head_state));
	fuzz_memory_forget();
	engine_must_finish = false;
	fuzz_store_fill();
	vf_iotlb_init(&q->tlb, &q->port);
	if (which_queue & 128u) /* with the regions of driver_map() the table is full: about half of them are evicted */
		q->tlb.region_limit = 7;
	q->port.inject_irq = fuzz_inject_irq;
	q->device.capacity_sectors = FUZZ_CAPACITY_SECTORS;
	q->device.read_only = (device_bits & 1u) != 0;
	q->device.discard = (device_bits & 2u) == 0;
	q->device.write_zeroes = (device_bits & 4u) == 0;
	q->device.block_sectors = device_bits & 8u ? 8u : 1u;
	q->device.discard_max_sectors = device_bits & 16u ? 4u : 1u << 20;
	q->device.discard_max_seg = device_bits & 32u ? 1u : VF_RANGE_MAX;
	q->device.write_zeroes_max_sectors = device_bits & 64u ? 4u : UINT32_MAX;
	q->device.write_zeroes_max_seg = device_bits & 128u ? 2u : VF_RANGE_MAX;
	q->engine = (struct vf_engine){ .ops = &fuzz_engine };
	q->engine.store = (struct vf_store){
		.fd = -1,
		.kind = VF_STORE_MEMORY,
		.size_bytes = sizeof(store_before),
		.no_punch_hole = 1,
		.map = store_bytes,
	};
	q->faults_seen = q->counters->memory_faults;
	q->ring_error = VF_RING_OK;
	q->fifo_head = q->fifo_count = 0;
	q->tally_last = q->tally;
	q->tally[0].count = 0;
	memset(q->inflight_log, 0, FUZZ_QUEUE_MAX * sizeof(*q->inflight_log)); /* a packed ring leaves its lengths there */
	/* The same input must do the same again, whatever ran before. */
	for (uint32_t i = 0; i < q->slot_count; i++)
		q->free_slots[i] = (uint16_t)(q->slot_count - 1u - i);
	q->next_req = &q->reqs[0];
}

void fuzz_world_round(void)
{
	int moved;

	world.shared_reads = 0;
	world.busy_popped = false;
	moved = fuzz_queue_round(world.q);
	FUZZ_ASSERT(moved <= (int)(2u * VF_BATCH_MAX));
	FUZZ_ASSERT(moved > -(int)VF_RING_ERROR_COUNT);
	/* A vanished page is what the round reports, whatever else went wrong in it. */
	FUZZ_ASSERT((moved == -VF_RING_MEMORY_GONE) == (world.q->counters->memory_faults != world.q->faults_seen));
	FUZZ_ASSERT(!world.busy_popped || moved == -VF_RING_HEAD_BUSY || moved == -VF_RING_MEMORY_GONE);
	/* Given back within this round, but not yet published when it was taken again: that second chain never was. */
	if ((moved == -VF_RING_HEAD_BUSY || moved == -VF_RING_MEMORY_GONE) && !world.q->vring.is_packed &&
	    !world.q->inflight_log[world.last_popped].order) {
		if (head_state[world.last_popped].out && world.q->vring.ordered)
			world.order_count--;
		head_state[world.last_popped].out = false;
	}
	if (moved < 0)
		fuzz_world_fail(moved);
}

/* Nothing is held for requests that are over. */
static void fuzz_check_idle(void)
{
	const struct vf_queue *q = world.q;
	bool seen[FUZZ_QUEUE_MAX] = { false };

	FUZZ_ASSERT(q->engine.inflight_count == 0 && q->unpublished_count == 0);
	FUZZ_ASSERT(q->free_count == q->slot_count);
	for (uint32_t i = 0; i < q->slot_count; i++) {
		FUZZ_ASSERT(q->free_slots[i] < q->slot_count && !seen[q->free_slots[i]]);
		seen[q->free_slots[i]] = true;
	}
	for (uint32_t i = 0; i < FUZZ_QUEUE_MAX; i++)
		FUZZ_ASSERT(!head_state[i].out && (q->vring.is_packed || q->inflight_log[i].order == 0));
	FUZZ_ASSERT(q->fifo_count == 0 && q->tally_last == q->tally && q->tally[0].count == 0 && world.order_count == 0);
	if (q->vring.is_packed)
		FUZZ_ASSERT(q->vring.packed.taken_count == 0 && q->vring.packed.run_count == 0);
	else
		FUZZ_ASSERT(q->vring.split.published_used_idx == q->vring.split.last_used_idx);
}

void fuzz_world_drain(void)
{
	world.shared_reads = 0;
	fuzz_queue_drain(world.q);
	fuzz_check_idle();
}

/* The log is all that a worker leaves behind. What it says is what is out: the ring may say anything. */
static void fuzz_forget(bool log_too)
{
	struct vf_queue *q = world.q;

	q->engine.inflight_count = 0;
	q->unpublished_count = q->fifo_count = 0;
	q->tally_last = q->tally;
	q->tally[0].count = 0;
	world.order_count = 0;
	q->irq_due = 0;
	q->free_count = q->slot_count;
	for (uint32_t i = 0; i < q->slot_count; i++)
		q->free_slots[i] = (uint16_t)i;
	q->next_req = &q->reqs[q->slot_count - 1u];
	for (uint32_t i = 0; i < FUZZ_QUEUE_MAX; i++) {
		if (log_too)
			q->inflight_log[i].order = 0;
		head_state[i].out = !q->vring.is_packed && q->inflight_log[i].order != 0;
	}
}

/* The worker dies between two rounds, and another one takes the ring over, as Queue.start(recover=True) does. */
void fuzz_world_crash(void)
{
	int err;

	world.shared_reads = 0;
	fuzz_forget(false);
	/* Now and then it dies of a request, of one and the same until that is refused. */
	if (fuzz_random() % 4u)
		world.q->inflight->working = fuzz_random() % 2u ? 1u : fuzz_random() % world.q->vring.size + 1u;
	err = fuzz_queue_adopt(world.q, 0);
	FUZZ_ASSERT(err == -VF_RING_LOG || err == -VF_RING_POISON || (err >= 0 && (uint32_t)err <= world.q->slot_count));
	if (err >= 0) {
		fuzz_forget(false); /* the adoption has taken out what the used ring names */
		err = fuzz_queue_redo(world.q, (uint32_t)err);
		FUZZ_ASSERT(err <= 0 && err > -(int)VF_RING_ERROR_COUNT);
	}
	if (err == 0)
		return;
	/* What could not be started again stays in the log; it is nobody's any more. */
	engine_must_finish = false;
	world.failed = true;
	fuzz_queue_fail(world.q, err);
	FUZZ_ASSERT(world.q->engine.inflight_count == 0 && world.q->unpublished_count == 0);
	FUZZ_ASSERT(world.q->free_count == world.q->slot_count);
	fuzz_forget(true);
}

void fuzz_world_fail(int err)
{
	world.failed = true;
	world.shared_reads = 0;
	fuzz_queue_fail(world.q, err);
	FUZZ_ASSERT(world.q->ring_error == (uint32_t)-err);
	fuzz_check_idle();
}

void fuzz_world_close(void)
{
	if (!world.failed)
		fuzz_world_drain();
	if (world.q->device.read_only)
		FUZZ_ASSERT(memcmp(store_bytes, store_before, sizeof(store_before)) == 0);
	for (uint32_t i = 0; i < world.region_count; i++)
		fuzz_region_remove(i);
	vf_iotlb_drop(&world.q->tlb, 0, UINT64_MAX);
}
