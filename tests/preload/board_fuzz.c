/* SPDX-License-Identifier: Apache-2.0
 *
 * A client writes anything anywhere in a board, also while the server or another client works in it: neither may reach
 * memory outside of the board, which has pages without access around it, or lose its way for ever.
 *
 * board_fuzz server|client SEED ROUNDS
 * Ends with 0, 2 when the board cannot be made, 3 for wrong use; else a signal or a sanitizer ends it.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "board/server.h"

#define AT ((uint8_t *)0x200000000000)
#define GUARD_BYTES (1ull << 30)
#define CALLS 40u
#define USER_MAX 70u

static struct vf_board_view view;
static uint32_t stopping;
static bool is_client;

static uint64_t number(uint64_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed;
}

static uint32_t value(uint64_t *seed)
{
	static const uint32_t liked[] = { 0, 1, 2, 3, 7, 63, 64, 127, 128, 255, 0x7fff, 0x8000, 0xffff, 0x40000000, 0x80000000, 0xffffffff };
	uint64_t chosen = number(seed);

	return chosen & 1u ? (uint32_t)(chosen >> 32) : liked[chosen >> 8 & 15u];
}

/* What a client relies on: pointers, sizes and kind of a ring. */
static bool is_relied_on(const uint8_t *at)
{
	for (uint32_t q = 0; q < view.geometry.queue_count; q++) {
		const struct vf_drv_vq *vq = &view.parts[q].queue->vq;
		const uint8_t *start = (const uint8_t *)vq, *cursors = (const uint8_t *)&vq->free_head;
		const uint8_t *packed = (const uint8_t *)&vq->packed.avail_pos;
		if (at + 4 > start && at < start + sizeof(*vq))
			return !(at >= cursors && at + 4 <= (const uint8_t *)&vq->event_idx) &&
			       !(view.geometry.packed && at >= packed && at + 4 <= packed + 8);
	}
	return false;
}

static void write_over(uint64_t *seed)
{
	uint32_t q = (uint32_t)(number(seed) % view.geometry.queue_count);
	const struct vf_board_parts *parts = &view.parts[q];
	/* Users and marks; queue, slots, free slots and state; the ring. */
	uint8_t *starts[] = { (uint8_t *)view.users, (uint8_t *)parts->queue, (uint8_t *)parts->queue, (uint8_t *)parts->state,
			      parts->desc };
	uint8_t *ends[] = { (uint8_t *)view.parts[0].queue, (uint8_t *)parts->slots, parts->desc, parts->desc, parts->lines };
	uint32_t part = (uint32_t)(number(seed) % 5u);
	uint8_t *at = starts[part] + number(seed) % (uint64_t)(ends[part] - starts[part]) / 4u * 4u;
	uint32_t word = value(seed);

	if (!is_client || !is_relied_on(at))
		vf_store_relaxed_u32((uint32_t *)(void *)at, word);
}

static void *write_on(void *argument)
{
	uint64_t seed = (uint64_t)(uintptr_t)argument;

	while (!vf_load_relaxed_u32(&stopping))
		write_over(&seed);
	return NULL;
}

static void call_server(uint64_t *seed)
{
	uint32_t user = value(seed) % (USER_MAX + 2u), q = (uint32_t)(number(seed) % view.geometry.queue_count);

	switch (number(seed) % 8u) {
	case 0:
		vf_server_home(&view, vf_server_new_user(&view, value(seed) & 1u));
		break;
	case 1:
		vf_server_end_user(&view, user);
		break;
	case 2:
		vf_server_holds_lock(&view, user);
		break;
	case 3:
		if (vf_server_lock(&view, q) == 0)
			vf_server_hold(&view, q, user, value(seed) & 1u);
		break;
	case 4:
		vf_server_seize(&view, q, user);
		break;
	case 5:
		vf_server_replay(&view);
		vf_server_resume(&view);
		break;
	default:
		vf_exchange_u32(&view.parts[q].queue->lock, VF_LOCK_FREE);
		vf_server_reap(&view);
	}
}

static void call_client(uint64_t *seed)
{
	uint32_t me = 1u + value(seed) % USER_MAX, q = (uint32_t)(number(seed) % view.geometry.queue_count), reaped;
	struct vf_board_queue *queue = view.parts[q].queue;
	struct vf_finished finished[VF_REAP_BATCH];

	switch (number(seed) % 8u) {
	case 0:
		vf_slot_free(&view, &view.parts[q], value(seed) % view.geometry.slot_count);
		break;
	case 1: {
		uint32_t count = value(seed) % (view.geometry.segments_max + 1u), slot = value(seed) % view.geometry.slot_count;
		view.parts[q].slots[slot].segment_count = count;
		vf_slot_enqueue(&view, q, slot, vf_queue_room(&view, queue, count));
		vf_queue_publish(queue);
		break;
	}
	case 2:
		vf_queue_join(queue, me);
		vf_queue_settle(queue);
		break;
	case 3:
		vf_queue_leave(&view, queue, me);
		break;
	case 4:
		vf_queue_wake_waiting(&view, queue, value(seed));
		break;
	case 5: {
		struct vf_drv_three three = { .header_bytes = 16, .data_bytes = 512 };
		if (!view.geometry.packed && !view.geometry.in_order && queue->vq.free_count >= 3u)
			vf_drv_split_add_tagged(&queue->vq, &three, value(seed) % view.geometry.slot_count);
		break;
	}
	case 6: {
		uint32_t cookie;
		if (view.geometry.packed || view.geometry.in_order)
			break;
		int head = vf_drv_split_peek_tagged(&queue->vq, &cookie);
		if (head >= 0)
			vf_drv_split_take_tagged(&queue->vq, (uint16_t)head);
		break;
	}
	default:
		vf_queue_reap(&view, q, me, finished, VF_REAP_BATCH, &reaped);
	}
}

static int run(uint64_t *seed)
{
	uint64_t kind = number(seed);
	struct vf_board_geometry geometry = {
		.capacity_bytes = 1u << 30, .block_bytes = 512, .size_max_bytes = 4096, .segments_max = kind & 1u ? 8 : 2,
		.bounce_bytes = 4096, .queue_count = 2, .queue_size = kind & 2u ? 8 : 128, .slot_count = kind & 2u ? 4 : 64,
		.user_max = USER_MAX, .event_idx = kind >> 3 & 1u, .indirect = kind >> 4 & 1u, .packed = kind >> 5 & 1u,
		.in_order = kind >> 6 & 1u, .route = kind >> 7 & 1u,
	};
	pthread_t other;
	bool beside = kind >> 8 & 1u;

	if (!vf_board_geometry_good(&geometry))
		return 0;
	uint64_t bytes = vf_server_bytes(&geometry, AT);
	void *around = mmap(AT - GUARD_BYTES, 2 * GUARD_BYTES + bytes, PROT_NONE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	void *board = mmap(AT, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (around == MAP_FAILED || board != AT || vf_server_create(&view, board, &geometry))
		return 2;
	for (uint32_t i = 0; i < 5; i++)
		vf_server_new_user(&view, i & 1u);
	vf_store_relaxed_u32(&stopping, 0);
	if (beside && pthread_create(&other, NULL, write_on, (void *)(uintptr_t)(number(seed) | 1u)))
		return 2;
	for (uint32_t i = 0; i < CALLS; i++) {
		for (uint32_t k = 0; k < 4; k++)
			write_over(seed);
		is_client ? call_client(seed) : call_server(seed);
	}
	vf_store_relaxed_u32(&stopping, 1);
	if (beside)
		pthread_join(other, NULL);
	return munmap(AT - GUARD_BYTES, 2 * GUARD_BYTES + bytes) ? 2 : 0;
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 3;
	uint64_t seed = strtoull(argv[2], NULL, 10) * 0x9e3779b97f4a7c15ull | 1u;
	is_client = strcmp(argv[1], "client") == 0;
	for (uint64_t round = strtoull(argv[3], NULL, 10); round; round--) {
		int rc = run(&seed);
		if (rc)
			return rc;
	}
	return 0;
}
