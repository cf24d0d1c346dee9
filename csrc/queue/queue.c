/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "queue/queue.h"

#include "base/page.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static struct vf_queue *vf_guarded; /* for the signal handler, which gets no argument from us */
static volatile int vf_stop;
static int vf_stop_wake_fd = -1;

static uint32_t vf_round_up(uint32_t value, uint32_t to)
{
	return (value + to - 1u) / to * to;
}

uint32_t vf_shm_block_bytes(uint32_t queue_size)
{
	return vf_round_up(vf_shm_layout().inflight_offset + (uint32_t)sizeof(struct vf_inflight_header) +
				   queue_size * (uint32_t)sizeof(struct vf_inflight_entry),
			   vf_page_bytes());
}

struct vf_shm_layout vf_shm_layout(void)
{
	struct vf_shm_layout layout;

	layout.header_bytes = vf_round_up((uint32_t)sizeof(struct vf_shm_header), vf_page_bytes());
	layout.counters_offset = (uint32_t)(sizeof(struct vf_shm_ctl) + sizeof(struct vf_shm_status));
	layout.hist_offset = vf_round_up(layout.counters_offset + (uint32_t)sizeof(struct vf_counters), 64u);
	layout.inflight_offset = vf_round_up(layout.hist_offset + (uint32_t)sizeof(struct vf_hist), 64u);
	layout.stride_bytes = vf_round_up(layout.inflight_offset + (uint32_t)sizeof(struct vf_inflight_header) +
						  VF_QUEUE_SIZE_MAX * (uint32_t)sizeof(struct vf_inflight_entry),
					  vf_page_bytes());
	return layout;
}

static void vf_queue_set_shm(struct vf_queue *q, uint8_t *block)
{
	struct vf_shm_layout layout = vf_shm_layout();

	q->ctl = (struct vf_shm_ctl *)block;
	q->shm_status = (struct vf_shm_status *)(block + sizeof(struct vf_shm_ctl));
	q->counters = (struct vf_counters *)(block + layout.counters_offset);
	q->hist = (struct vf_hist *)(block + layout.hist_offset);
	q->inflight = (struct vf_inflight_header *)(block + layout.inflight_offset);
	q->inflight_log = (struct vf_inflight_entry *)(q->inflight + 1);
}

int vf_queue_fit(struct vf_queue *q, uint32_t ring_size)
{
	uint32_t segment_max = q->device.seg_max + 2u;
	struct vf_segment *segments;

	segment_max = q->queue_size > segment_max ? q->queue_size : segment_max;
	segment_max = ring_size > segment_max ? ring_size : segment_max;
	if (segment_max == q->chain.segment_max)
		return 0;
	segments = calloc(segment_max, sizeof(*segments));
	if (!segments)
		return -ENOMEM;
	free(q->chain.segments);
	q->chain.segments = segments;
	q->chain.segment_max = segment_max;
	return 0;
}

/* 0 or -ENOMEM; what has been allocated is freed by vf_queue_destroy(). */
static int vf_queue_alloc(struct vf_queue *q)
{
	struct iovec *iovs;
	struct vf_blk_range *ranges;

	q->slot_count = q->queue_size < VF_SLOT_MAX ? q->queue_size : VF_SLOT_MAX;
	/* Twice the limit that we offer, for segments that straddle regions and headers in pieces. */
	q->iov_max = 2u * q->device.seg_max + 8u < VF_IOV_MAX ? 2u * q->device.seg_max + 8u : VF_IOV_MAX;
	q->reqs = calloc(q->slot_count, sizeof(*q->reqs));
	q->free_slots = calloc(q->slot_count, sizeof(*q->free_slots));
	q->unpublished = calloc(q->slot_count, sizeof(*q->unpublished));
	q->fifo = calloc(q->slot_count, sizeof(struct vf_req *));
	if (vf_queue_fit(q, q->queue_size) || !q->reqs || !q->free_slots || !q->unpublished || !q->fifo)
		return -ENOMEM;
	/* The arrays of slot 0 are the first of one block each. */
	iovs = calloc((size_t)q->slot_count * q->iov_max, sizeof(*iovs));
	q->reqs[0].iov_base = iovs;
	ranges = calloc((size_t)q->slot_count * VF_RANGE_MAX, sizeof(*ranges));
	q->reqs[0].ranges = ranges;
	if (!iovs || !ranges)
		return -ENOMEM;
	for (uint32_t i = 0; i < q->slot_count; i++) {
		q->reqs[i].slot = (uint16_t)i;
		q->reqs[i].iov_base = iovs + (size_t)i * q->iov_max;
		q->reqs[i].ranges = ranges + (size_t)i * VF_RANGE_MAX;
		q->free_slots[i] = (uint16_t)(q->slot_count - 1u - i);
	}
	q->free_count = q->slot_count;
	q->next_req = &q->reqs[q->free_slots[q->free_count - 1u]];
	q->tally_last = q->tally;
	return 0;
}

static void vf_queue_region(void *context, void *va, size_t len_bytes, const struct vf_mapping *mapping)
{
	struct vf_engine *engine = &((struct vf_queue *)context)->engine;

	if (engine->ops && engine->ops->region)
		engine->ops->region(engine, va, len_bytes, mapping);
}

struct vf_queue *vf_queue_create(const struct vf_blk_device *device, uint32_t queue_size, void *shm_block)
{
	struct vf_queue *q;

	if (queue_size < 2u || queue_size > VF_QUEUE_SIZE_MAX || device->seg_max > VF_SEG_MAX_LIMIT ||
	    device->discard_max_seg > VF_RANGE_MAX || device->write_zeroes_max_seg > VF_RANGE_MAX ||
	    device->block_sectors == 0) {
		errno = EINVAL;
		return NULL;
	}
	q = calloc(1, sizeof(*q));
	if (!q)
		return NULL;
	q->device = *device;
	q->queue_size = queue_size;
	vf_queue_limit(q, 0);
	vf_iotlb_init(&q->tlb, &q->port);
	vf_iotlb_obey_kernel(&q->tlb);
	q->tlb.region_hook = vf_queue_region;
	q->tlb.region_context = q;
	vf_port_none_init(&q->port, -1);
	vf_queue_set_shm(q, shm_block);
	q->flush_failure = &q->own_flush_failure;
	vf_store_release_u32(&q->shm_status->flushing, 0); /* a previous worker may have died of one */
	q->ctl_seen = vf_load_relaxed_u32(&q->ctl->ctl_seq);
	q->faults_seen = q->counters->memory_faults;
	if (vf_queue_alloc(q)) {
		vf_queue_destroy(q);
		errno = ENOMEM;
		return NULL;
	}
	return q;
}

void vf_queue_raise_slot(struct vf_queue *q, const struct vf_req *req)
{
	uint32_t top = q->free_count - 1u, at = top;

	while (at && q->free_slots[at] != req->slot)
		at--;
	q->free_slots[at] = q->free_slots[top];
	q->free_slots[top] = req->slot;
}

void vf_queue_evict(struct vf_queue *q)
{
	uint64_t rings[] = { q->vring.desc_addr, q->vring.driver_addr, q->vring.device_addr };

	_Static_assert(sizeof(rings) / sizeof(rings[0]) <= VF_IOTLB_KEEP_MAX, "what is kept");
	vf_iotlb_evict(&q->tlb, rings, sizeof(rings) / sizeof(rings[0]));
}

void vf_queue_limit(struct vf_queue *q, uint64_t acked_features)
{
	const uint64_t both = 1ull << VF_BLK_F_SIZE_MAX | 1ull << VF_BLK_F_SEG_MAX;
	uint64_t limit = VF_DATA_BYTES_MAX;

	if (q->device.size_max_bytes && (acked_features & both) == both &&
	    (uint64_t)q->device.size_max_bytes * q->device.seg_max < limit)
		limit = (uint64_t)q->device.size_max_bytes * q->device.seg_max;
	q->request_bytes_max = (uint32_t)limit;
	q->fast_path_sectors_max = (uint32_t)(limit < VF_BIG_BYTES ? limit : VF_BIG_BYTES) / VF_SECTOR_BYTES;
}

void vf_queue_count(struct vf_queue *q, uint64_t now_ns)
{
	for (struct vf_tally *tally = q->tally; tally <= q->tally_last; tally++) {
		if (tally->count == 0)
			continue;
		q->counters->op[tally->op].requests += tally->count;
		q->counters->op[tally->op].bytes += tally->bytes;
		q->counters->requests += tally->count;
		q->hist->bucket[tally->op][vf_hist_bucket(now_ns - tally->start_ns)] += tally->count;
	}
	q->tally[0] = (struct vf_tally){ 0 };
	q->tally_last = q->tally;
}

void vf_queue_tally_new(struct vf_queue *q, const struct vf_req *req, uint64_t bytes)
{
	if (q->tally_last == &q->tally[VF_TALLY_MAX - 1u])
		vf_queue_count(q, vf_now_ns());
	if (q->tally_last->count)
		q->tally_last++;
	*q->tally_last = (struct vf_tally){
		.start_ns = req->start_ns,
		.bytes = bytes,
		.count = 1,
		.op = req->op,
	};
}

void vf_queue_destroy(struct vf_queue *q)
{
	if (!q)
		return;
	if (vf_guarded == q)
		vf_guarded = NULL;
	vf_publisher_stop(&q->publisher);
	vf_engine_close(&q->engine);
	vf_iotlb_drop(&q->tlb, 0, UINT64_MAX);
	if (q->reqs) {
		free(q->reqs[0].iov_base);
		free(q->reqs[0].ranges);
	}
	free(q->fifo);
	free(q->unpublished);
	free(q->free_slots);
	free(q->reqs);
	free(q->chain.segments);
	free(q);
}

/* Async-signal-safe: it only walks a table, calls mmap(2), and sets a counter or flag of ours. */
static void vf_on_sigbus(int signo, siginfo_t *info, void *context)
{
	(void)context;
	if (vf_guarded && vf_iotlb_zero_pages(&vf_guarded->tlb, (uintptr_t)info->si_addr) == 0) {
		vf_guarded->counters->memory_faults++;
		vf_guarded->engine.store.memory_gone = 1;
		return;
	}
	if (vf_guarded && vf_guarded->engine.ops && vf_guarded->engine.ops->zero_pages &&
	    vf_guarded->engine.ops->zero_pages(&vf_guarded->engine, (uintptr_t)info->si_addr) == 0) {
		vf_guarded->counters->memory_faults++;
		return;
	}
	if (vf_guarded && vf_map_zero_pages(&vf_guarded->engine.store.read_map, (uintptr_t)info->si_addr) == 0)
		return;
	signal(signo, SIG_DFL); /* not in the driver's memory: the access faults again and ends the process */
}

int vf_queue_guard(struct vf_queue *q)
{
	struct sigaction action = { .sa_sigaction = vf_on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART };

	vf_guarded = q;
	return sigaction(SIGBUS, &action, NULL) ? -errno : 0;
}

static void vf_on_stop(int signo)
{
	uint64_t one = 1;
	int saved = errno;
	ssize_t written;

	(void)signo;
	vf_stop = 1;
	written = write(vf_stop_wake_fd, &one, sizeof(one));
	(void)written; /* it fails only when the counter is full: the worker is awake already */
	errno = saved;
}

int vf_stop_install(int wake_fd)
{
	struct sigaction action = { .sa_handler = vf_on_stop, .sa_flags = SA_RESTART };

	vf_stop_wake_fd = wake_fd;
	if (sigaction(SIGTERM, &action, NULL) || sigaction(SIGINT, &action, NULL))
		return -errno;
	return 0;
}

const volatile int *vf_stop_flag(void)
{
	return &vf_stop;
}

int vf_die_with_parent(int parent_pid)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
		return -errno;
	return getppid() == parent_pid ? 0 : -ESRCH;
}
