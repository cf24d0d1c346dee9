/* SPDX-License-Identifier: Apache-2.0
 *
 * The board: the memory by which several processes together are the driver of one device. It holds the rings, the driver's
 * private state of them, the requests, and buffers to copy data through. It is one memfd, mapped at the same address in the
 * server and in every client, and is one region of the device, whose IOVA is that address: a pointer into the board is valid
 * everywhere. docs/design/preload.md has the whole picture.
 *
 *   server    a thread of the process that has the device. It makes the board, starts and resets the device.
 *   client    a process that uses the disk: one connection to the server, which says when it has ended.
 *   user      an AIO context or a thread of a client. It has requests in flight, and waits for them.
 *   slot      one request: what the device sees (a line of header, range and status; an indirect table; a bounce buffer), and
 *             what a successor needs to send it again.
 *
 * A user that works on a queue holds its lock, which is a word with the number of the owner. Nothing between locking and
 * unlocking blocks or calls into a program. A client that is killed in between leaves its number there. So the server knows
 * that the ring may be half-written, takes all locks, resets the device, and sends every request of the living again: a
 * request may be carried out twice, but only while nobody was told that it is done.
 *
 * Solo: a user that is alone on a queue works on it without the lock, if `solo` has its number. It stores its number in
 * `inside` meanwhile. Only the server writes `solo`: it takes it away, fences all clients (base/membarrier.h), and from then on
 * a user that has the lock waits until `inside` is 0. A number in `inside` is as good as one in the lock when its owner dies.
 *
 * A slot is FREE, INFLIGHT, DONE (reaped by another user than its owner) or TAKEN (its owner is copying the data). State and
 * owner are set before the ring is touched, so that at any moment the states alone say what there is: the list of free slots
 * can be made again from them, and so can the owners' marks.
 *
 * Marks: a user that reaps another's request stores the status, sets the slot to DONE, sets its bit among the owner's marks,
 * and wakes the owner. A stale mark is harmless: the owner checks state and owner of the slot.
 *
 * Sleep: a user that waits has a bit in `waiting` of each queue on which it waits. The first polls the queue's interrupt
 * eventfd (it is the queue's poller), the others sleep on a futex until their owner's mark is set. A poller that leaves wakes
 * another. `sleep` of a user says how it is to be woken: by its futex, or by the eventfd that it polls.
 *
 * All processes are of one user of the machine and trust each other's intentions, but a client may have been killed or have
 * written where it should not. The server relies on nothing in the board: see "Writes that go astray" in server.c. A client
 * checks indices, and those of 16 bits lead no further than VF_BOARD_TAIL_BYTES; it does rely on the pointers of a ring.
 */
#ifndef VF_BOARD_H
#define VF_BOARD_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/virtio_blk.h"
#include "driver/driver_vq.h"

#define VF_BOARD_MAGIC 0x5646424f41524431ull
#define VF_BOARD_QUEUES_MAX 64u
#define VF_BOARD_USERS_MAX 1024u
#define VF_BOARD_SLOTS_MAX 4096u /* of one queue */
#define VF_BOARD_SEGMENTS_MAX 64u /* of data in one request */
#define VF_BOARD_LINE_BYTES 64u /* header at 0, range at 16, status at 32: one cache line a request */
#define VF_BOARD_RANGE_AT 16u
#define VF_BOARD_STATUS_AT 32u
#define VF_BOARD_BOUNCE_MAX_BYTES 131072u
#define VF_BOARD_BOUNCE_GAP_BYTES 4096u /* so that small requests of many slots do not share a cache set */
#define VF_BOARD_STATUS_UNSET 0xffu
#define VF_BOARD_TAIL_BYTES 0x110000u /* unused memory at the end: 65536 entries of any table of a ring, 16 bytes each */

enum vf_slot_state { VF_SLOT_FREE, VF_SLOT_INFLIGHT, VF_SLOT_DONE, VF_SLOT_TAKEN };

enum vf_board_route { VF_ROUTE_OWN, VF_ROUTE_CROSS };

#define VF_ROUTE_CROSS_SHIFT 20u /* VF_ROUTE_CROSS changes the queue with each MiB */

/* Words of a queue's lock. */
#define VF_LOCK_FREE 0u
#define VF_LOCK_SERVER 0x40000000u
#define VF_LOCK_WAITERS 0x80000000u

/* Words of a user's `sleep`. */
#define VF_AWAKE 0u
#define VF_SLEEP_FUTEX 1u
#define VF_SLEEP_POLL 2u /* and the queue's index: on that interrupt eventfd */

enum vf_user_state { VF_USER_FREE, VF_USER_LIVE, VF_USER_DEAD }; /* dead: some of its requests are in flight */

struct vf_board_slot {
	uint32_t state; /* enum vf_slot_state */
	uint32_t owner; /* a user's number, from 1 */
	uint32_t segment_count; /* of data */
	uint32_t status; /* of a DONE one */
	struct vf_drv_segment data[VF_BOARD_SEGMENTS_MAX];
};

struct vf_board_user {
	uint32_t state; /* enum vf_user_state */
	uint32_t home_queue;
	uint32_t sleep; /* a futex */
	uint32_t marked; /* some mark is set */
	uint32_t joined; /* fences reach its process: it may work solo */
	uint32_t reserved[11];
};

_Static_assert(sizeof(struct vf_board_user) == 64, "a cache line a user");

struct vf_board_queue {
	/* Under the lock: */
	uint32_t lock;
	uint32_t free_count;
	uint32_t user_count; /* that may use this queue */
	uint32_t poller; /* user number; 0 = none */
	uint32_t waiting_count;
	uint32_t starved; /* somebody found no room */
	uint32_t broken; /* the device broke the ring */
	uint32_t solo; /* user number; 0 = none. Written by the server alone */
	uint32_t inside; /* user number, while it works solo */
	uint32_t reserved_word;
	struct vf_drv_vq vq;
	uint64_t waiting[VF_BOARD_USERS_MAX / 64u + 1u]; /* a bit a user, by number */
	/* Figures, under the lock: */
	uint64_t published __attribute__((aligned(64)));
	uint64_t batches;
	uint64_t kicks;
	uint64_t irqs;
	uint64_t locks_contended;
	uint64_t reserved[3];
};

/* What a client must know of the device. */
struct vf_board_geometry {
	uint64_t capacity_bytes; /* follows a resize */
	uint64_t discard_max_bytes;
	uint64_t discard_granularity_bytes;
	uint64_t write_zeroes_max_bytes;
	uint64_t spin_ns; /* before a sleep; 0: sleep at once */
	uint32_t block_bytes;
	uint32_t physical_block_bytes;
	uint32_t io_min_bytes;
	uint32_t io_opt_bytes;
	uint32_t size_max_bytes; /* of one segment */
	uint32_t segments_max; /* of data */
	uint32_t bounce_bytes;
	uint32_t queue_count;
	uint32_t queue_size; /* descriptors */
	uint32_t slot_count; /* of a queue */
	uint32_t user_max;
	uint32_t route; /* enum vf_board_route */
	uint8_t packed;
	uint8_t event_idx;
	uint8_t in_order;
	uint8_t indirect;
	uint8_t read_only;
	uint8_t has_flush;
	char serial[21];
	uint8_t reserved[37];
};

struct vf_board {
	uint64_t magic;
	uint64_t address; /* of the board, in every process */
	uint64_t total_bytes;
	uint32_t closed; /* the device is gone */
	uint32_t generation; /* of the eventfds: raised by a reset */
	uint64_t resets;
	uint64_t replayed;
	struct vf_board_geometry geometry;
};

static inline uint32_t vf_board_bounce_stride(const struct vf_board_geometry *geometry)
{
	return geometry->bounce_bytes + VF_BOARD_BOUNCE_GAP_BYTES;
}

static inline uint32_t vf_board_table_stride(const struct vf_board_geometry *geometry)
{
	return (16u * (geometry->segments_max + 2u) + 63u) / 64u * 64u;
}

/* Where the parts of a queue are in this process. */
struct vf_board_parts {
	struct vf_board_queue *queue;
	struct vf_board_slot *slots;
	uint8_t *lines;
	uint8_t *tables;
	uint8_t *bounce;
	uint16_t *free_slots; /* a stack, under the lock */
	struct vf_drv_desc_state *state;
	uint8_t *desc; /* the ring's three areas */
	uint8_t *driver;
	uint8_t *device;
};

/* A process's own view of the board: computed once from the geometry, so that nothing in the board can mislead it. */
struct vf_board_view {
	struct vf_board *board;
	struct vf_board_geometry geometry; /* a copy */
	struct vf_board_user *users; /* user_max + 1: number 0 is nobody's */
	uint64_t *marks; /* of user u and queue q: mark_words at (u * queue_count + q) */
	uint32_t mark_words;
	uint64_t total_bytes;
	struct vf_board_parts parts[VF_BOARD_QUEUES_MAX];
	int kick_fds[VF_BOARD_QUEUES_MAX]; /* owned by the view's owner */
	int irq_fds[VF_BOARD_QUEUES_MAX];
	struct vf_drv_vq rings[VF_BOARD_QUEUES_MAX]; /* of the server: as they were made. Pointers and sizes are these */
};

static inline uint64_t *vf_board_marks(const struct vf_board_view *view, uint32_t user, uint32_t queue)
{
	return view->marks + ((uint64_t)user * view->geometry.queue_count + queue) * view->mark_words;
}

static inline uint8_t *vf_board_line(const struct vf_board_parts *parts, uint32_t slot)
{
	return parts->lines + (uint64_t)slot * VF_BOARD_LINE_BYTES;
}

static inline bool vf_board_geometry_good(const struct vf_board_geometry *g)
{
	return g->queue_count && g->queue_count <= VF_BOARD_QUEUES_MAX && g->queue_size >= 2 &&
	       g->queue_size <= VF_QUEUE_SIZE_MAX && !(g->queue_size & (g->queue_size - 1u)) && g->slot_count &&
	       g->slot_count <= VF_BOARD_SLOTS_MAX && g->slot_count <= g->queue_size && g->user_max &&
	       g->user_max <= VF_BOARD_USERS_MAX && g->segments_max && g->segments_max <= VF_BOARD_SEGMENTS_MAX &&
	       (g->indirect || g->segments_max + 2u <= g->queue_size) && g->bounce_bytes >= g->block_bytes &&
	       g->bounce_bytes <= VF_BOARD_BOUNCE_MAX_BYTES && g->block_bytes >= VF_SECTOR_BYTES &&
	       g->bounce_bytes % g->block_bytes == 0 && g->size_max_bytes >= g->bounce_bytes;
}

/* Give the next part of the board, `bytes` long and aligned to `align`. */
static inline uint8_t *vf_board_place(uint64_t *at, uint64_t bytes, uint64_t align)
{
	uint64_t start = (*at + align - 1u) / align * align;

	*at = start + bytes;
	return (uint8_t *)(uintptr_t)start;
}

/* Compute where everything is in the board at `board` (not read here), and how long it is. The geometry is good. */
static inline void vf_board_view_init(struct vf_board_view *view, struct vf_board *board,
				      const struct vf_board_geometry *geometry)
{
	const uint64_t page = 65536; /* the largest of any machine: a ring area on pages of its own */
	const struct vf_board_geometry *g = geometry;
	uint64_t at = (uint64_t)(uintptr_t)board + sizeof(*board);

	memset(view, 0, sizeof(*view));
	view->board = board;
	view->geometry = *g;
	view->mark_words = (g->slot_count + 63u) / 64u;
	view->users = (struct vf_board_user *)(void *)vf_board_place(&at, (g->user_max + 1u) * sizeof(struct vf_board_user), 64);
	view->marks = (uint64_t *)(void *)vf_board_place(
		&at, (uint64_t)(g->user_max + 1u) * g->queue_count * view->mark_words * 8u, 64);
	for (uint32_t i = 0; i < g->queue_count; i++) {
		struct vf_board_parts *p = &view->parts[i];
		p->queue = (struct vf_board_queue *)(void *)vf_board_place(&at, sizeof(struct vf_board_queue), 128);
		p->slots = (struct vf_board_slot *)(void *)vf_board_place(&at, g->slot_count * sizeof(struct vf_board_slot), 64);
		p->free_slots = (uint16_t *)(void *)vf_board_place(&at, g->slot_count * 2u, 64);
		p->state = (struct vf_drv_desc_state *)(void *)vf_board_place(
			&at, g->queue_size * sizeof(struct vf_drv_desc_state), 64);
		p->desc = vf_board_place(&at, 16u * g->queue_size, page);
		p->driver = vf_board_place(&at, 6u + 2u * g->queue_size, 4096);
		p->device = vf_board_place(&at, 6u + 8u * g->queue_size, 4096);
		p->lines = vf_board_place(&at, (uint64_t)g->slot_count * VF_BOARD_LINE_BYTES, 4096);
		p->tables = vf_board_place(&at, (uint64_t)g->slot_count * vf_board_table_stride(g), 4096);
		p->bounce = vf_board_place(&at, (uint64_t)g->slot_count * vf_board_bounce_stride(g), 4096);
		view->kick_fds[i] = view->irq_fds[i] = -1;
	}
	view->total_bytes = (at + VF_BOARD_TAIL_BYTES - (uint64_t)(uintptr_t)board + page - 1u) / page * page;
}

#endif
