/* SPDX-License-Identifier: Apache-2.0
 *
 * The whole state of a worker's virtqueue. vf_queue_create() allocates its memory. vf_queue_fit() allocates the parts that
 * depend on the driver's ring, before that is started. Serving allocates nothing.
 */
#ifndef VF_QUEUE_H
#define VF_QUEUE_H

#include "base/clock.h"
#include "base/counters.h"
#include "engine/engine.h"
#include "engine/publisher.h"
#include "engine/request.h"
#include "memory/iotlb.h"
#include "queue/irq_coalesce.h"
#include "ring/inflight.h"
#include "ring/takeover.h"
#include "ring/vring_format.h"

#define VF_SLOT_MAX 1024u /* requests in flight at once; more wait in the ring */
#define VF_BATCH_MAX 64u /* requests of one round */
#define VF_BIG_BYTES (512u << 10) /* a request with more data ends its round: the control word is looked at before the next */
#define VF_INFLIGHT_BYTES_MAX (32u << 20) /* no more is popped until some of it is done: a reset waits for all of it */
#define VF_SEG_MAX_LIMIT 1022u /* with header and status a chain of 1024 */

/* The properties of the device; set once. Sectors are of 512 bytes. */
struct vf_blk_device {
	uint64_t capacity_sectors;
	uint32_t block_sectors; /* smallest unit of a transfer */
	uint32_t seg_max;
	uint32_t size_max_bytes; /* of a data segment; 0 = none is offered */
	uint32_t discard_max_sectors; /* 0 = no discard */
	uint32_t discard_max_seg;
	uint32_t write_zeroes_max_sectors; /* 0 = no write zeroes */
	uint32_t write_zeroes_max_seg;
	uint8_t read_only;
	uint8_t ignores_discards; /* they are answered, and nothing is done */
	uint8_t keeps_zeroes; /* what is zeroed stays allocated, whatever the driver allows */
	uint8_t discard; /* acked by the driver, at the last start */
	uint8_t write_zeroes;
	char serial[VF_BLK_ID_BYTES]; /* padded with zeroes */
};

/* A request that was completed with an error because it has killed workers. */
struct vf_poison {
	uint32_t count; /* how many there were; what follows is of the last */
	uint32_t deaths;
	uint16_t head;
	uint8_t op; /* enum vf_op */
	uint64_t offset_bytes;
};

#define VF_TALLY_MAX 16u

/* Requests that are completed and not yet counted: of one kind, begun at one moment. */
struct vf_tally {
	uint64_t start_ns;
	uint64_t bytes;
	uint32_t count;
	uint32_t op; /* enum vf_op */
};

struct vf_queue {
	struct vf_vring vring;
	struct vf_chain chain;
	struct vf_engine engine;
	struct vf_port port;
	struct vf_blk_device device;

	struct vf_req *reqs; /* slot_count of them */
	uint16_t *free_slots; /* a stack: the slot used last is the warmest */
	uint32_t free_count;
	struct vf_req *next_req; /* that of the topmost slot, also when it is none of the free ones */
	uint32_t slot_count;
	uint32_t iov_max; /* of one request */
	uint32_t request_bytes_max; /* data of a read or write, as the driver was told */
	uint32_t fast_path_sectors_max; /* the same for fast_path.h: what is larger, or big, goes the general way */
	uint64_t inflight_bytes; /* data of the reads and writes that hold a slot */

	uint16_t *unpublished; /* heads pushed and not yet cleared in the log */
	uint32_t unpublished_count;
	struct vf_tally *tally_last; /* tally[0] to this one are in use */
	struct vf_tally tally[VF_TALLY_MAX];

	/* Of a ring whose chains are completed in order: requests in that order, from the first one that the engine had not
	 * finished when it was submitted. A circle of slot_count places. */
	struct vf_req **fifo;
	uint32_t fifo_head;
	uint32_t fifo_count;
	uint32_t suspect_count; /* of a packed ring: entries of the log with deaths */

	struct vf_irq_coalesce irq_coalesce;
	uint8_t irq_due; /* the last interrupt could not be sent: try again */
	struct vf_publisher publisher;

	/* The queue's block of the shared pages. */
	struct vf_shm_ctl *ctl;
	struct vf_shm_status *shm_status;
	uint64_t *flush_failure; /* of the device: vf_shm_header.flush_failure */
	uint64_t own_flush_failure; /* in place of that where the header is not mapped */
	struct vf_counters *counters;
	struct vf_hist *hist;
	struct vf_inflight_header *inflight;
	struct vf_inflight_entry *inflight_log; /* room for the largest ring; the header says how many entries are in use */
	uint64_t next_order;
	struct vf_poison poison; /* of the last takeover */

	uint32_t queue_size; /* as offered; a driver may set up a larger ring, and serving it holds no more requests at once */
	uint32_t ctl_seen; /* last value of ctl->ctl_seq that was acted upon */
	uint64_t faults_seen;
	uint32_t ring_error; /* enum vf_ring_error that stopped the queue */

	struct vf_req *done[VF_BATCH_MAX]; /* what a reap has found */
	struct vf_iotlb tlb; /* large, so last */
};

/* Offsets of the shared pages. A queue's block has a place for the log of the largest ring; what of it is in memory is what the
 * ring in use needs. */
struct vf_shm_layout {
	uint32_t header_bytes; /* where the first queue's block starts */
	uint32_t counters_offset; /* from the start of a queue's block, as the next two */
	uint32_t hist_offset;
	uint32_t inflight_offset;
	uint32_t stride_bytes;
};

struct vf_shm_layout vf_shm_layout(void);

/* How much of a queue's block a ring of that size needs. */
uint32_t vf_shm_block_bytes(uint32_t queue_size);

/* A queue with its tables, or NULL with errno set. shm_block is the queue's block, borrowed. No engine is open yet. */
struct vf_queue *vf_queue_create(const struct vf_blk_device *device, uint32_t queue_size, void *shm_block);

/* Allocate room for the chains of a ring of that size, which is started next. 0 or -ENOMEM. */
int vf_queue_fit(struct vf_queue *q, uint32_t ring_size);
void vf_queue_destroy(struct vf_queue *q);

/* Share the device's part of the header (borrowed) with the other queues. */
static inline void vf_queue_use_header(struct vf_queue *q, struct vf_shm_header *header)
{
	q->flush_failure = &header->flush_failure;
}

/* Survive accesses to vanished pages (SIGBUS in a mapping of q's IOTLB): replace the region with zero pages, and count that in
 * q's counters. One queue per process. 0 or -errno. */
int vf_queue_guard(struct vf_queue *q);

/* Make SIGTERM and SIGINT raise *vf_stop_flag() and write to wake_fd (an eventfd). 0 or -errno. */
int vf_stop_install(int wake_fd);
const volatile int *vf_stop_flag(void);

/* SIGKILL for this process when the thread that started it ends, however it does. 0 or -errno; -ESRCH: it has ended. */
int vf_die_with_parent(int parent_pid);

/* Check reads and writes against the limits that a driver with these features knows (VIRTIO 1.3, 5.2.4). A driver that has not
 * acknowledged a limit knows none: EDK2 reads a file by one descriptor, however large it is. */
void vf_queue_limit(struct vf_queue *q, uint64_t acked_features);

/* Make room in the IOTLB. Nothing is in flight: a request refers to the driver's memory until it is completed. The
 * rings stay where they are. */
void vf_queue_evict(struct vf_queue *q);

/* Whether more may be popped. */
static inline int vf_queue_has_room(const struct vf_queue *q)
{
	return q->free_count && q->inflight_bytes < VF_INFLIGHT_BYTES_MAX && q->tlb.region_count <= q->tlb.region_limit;
}

/* How many requests a round may pop, if none of them is big: those that are end it. */
static inline uint32_t vf_queue_room(const struct vf_queue *q)
{
	return vf_queue_has_room(q) ? (uint32_t)((VF_INFLIGHT_BYTES_MAX - q->inflight_bytes) / VF_BIG_BYTES) + 1u : 0;
}

static inline uint64_t vf_req_transfer_bytes(const struct vf_req *req)
{
	return req->op == VF_OP_READ || req->op == VF_OP_WRITE ? req->data_bytes : 0;
}

/* Bring the slot of req to the top of the free ones, where it was when req was begun. While the loop waited in a call for it, the
 * publisher's thread may have completed others, whose slots lie above it now. */
void vf_queue_raise_slot(struct vf_queue *q, const struct vf_req *req);

/* Keep the slot of req, which outlives the turn of the loop that has begun it. */
static inline void vf_queue_hold(struct vf_queue *q, struct vf_req *req)
{
	if (req->held)
		return;
	if (vf_unlikely(q->next_req != req))
		vf_queue_raise_slot(q, req);
	req->held = 1;
	q->inflight_bytes += vf_req_transfer_bytes(req);
	q->free_count--;
	q->next_req = &q->reqs[q->free_slots[q->free_count ? q->free_count - 1u : 0]];
}

static inline void vf_queue_free(struct vf_queue *q, struct vf_req *req)
{
	q->inflight_bytes -= vf_req_transfer_bytes(req);
	q->free_slots[q->free_count++] = req->slot;
	q->next_req = req;
}

/* Count completed requests: their number, bytes, and time up to now. */
void vf_queue_count(struct vf_queue *q, uint64_t now_ns);

/* Note a request that is completed and is of another kind, or was begun at another moment, than the one before. */
void vf_queue_tally_new(struct vf_queue *q, const struct vf_req *req, uint64_t bytes);

/* Note a request that is completed, for vf_queue_count(): most are like the one before. */
static inline void vf_queue_tally(struct vf_queue *q, const struct vf_req *req, uint64_t bytes)
{
	struct vf_tally *tally = q->tally_last;

	if (vf_unlikely(tally->op != req->op || tally->start_ns != req->start_ns)) {
		vf_queue_tally_new(q, req, bytes);
		return;
	}
	tally->count++;
	tally->bytes += bytes;
}

#endif
