/* SPDX-License-Identifier: Apache-2.0
 *
 * A client against the server of a board, as two threads: the server must own a lock when vf_server_lock() says so, and a
 * client that spins on a ring must be able to read it while the server makes it again. A client that is alone on its queue
 * does without the lock, until the server takes the queue.
 *
 * board_race lock|rings|solo SECONDS
 * Ends with 0, 1 when the server had a lock that it did not own, or both worked at once, 2 when the board cannot be made, 3 for
 * wrong use, 4 when the kernel has no membarrier().
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "base/membarrier.h"
#include "board/server.h"

#ifdef __SANITIZE_THREAD__
#define AT ((void *)0x7e8000000000) /* where it lets a program have memory */
#else
#define AT ((void *)0x200000000000)
#endif
#define BURST 1000u

static struct vf_board_view view;
static uint32_t stopping;

static void *lock_and_unlock(void *argument)
{
	struct vf_board_queue *queue = view.parts[0].queue;

	(void)argument;
	while (!vf_load_relaxed_u32(&stopping)) {
		if (vf_lock_try(queue, 7))
			vf_unlock(queue);
		vf_cpu_relax();
	}
	return NULL;
}

static uint32_t user; /* alone on the queue */
static uint64_t work; /* counted by both; a lost update shows that they had the queue at once */
static uint64_t solo_times;

static void *work_solo(void *argument)
{
	struct vf_board_queue *queue = view.parts[0].queue;
	uint64_t done = 0;

	(void)argument;
	while (!vf_load_relaxed_u32(&stopping)) {
		if (!vf_queue_try(queue, user))
			continue;
		solo_times += queue->inside == user;
		work++;
		done++;
		vf_queue_unlock(queue, user);
	}
	return (void *)(uintptr_t)done;
}

static uint64_t run_beside_solo(uint64_t end_ns)
{
	struct vf_board_queue *queue = view.parts[0].queue;
	uint64_t done = 0;

	do {
		while (vf_server_lock(&view, 0))
			vf_cpu_relax();
		work++;
		done++;
		vf_unlock(queue);
		vf_server_reap(&view); /* has the user work solo again */
		for (uint32_t i = 0; i < BURST; i++)
			vf_cpu_relax();
	} while (vf_now_ns() < end_ns);
	return done;
}

static void *look_at_the_ring(void *argument)
{
	struct vf_drv_vq *vq = &view.parts[0].queue->vq;
	uint64_t seen = 0;

	(void)argument;
	while (!vf_load_relaxed_u32(&stopping)) {
		seen += vf_drv_vq_has_used(vq);
		vf_fence_compiler();
	}
	return (void *)(uintptr_t)seen;
}

static uint64_t run_locks(uint64_t end_ns)
{
	uint64_t wrong = 0;

	do
		for (uint32_t i = 0; i < BURST; i++) {
			if (vf_server_lock(&view, 0))
				continue;
			if ((vf_load_relaxed_u32(&view.parts[0].queue->lock) & ~VF_LOCK_WAITERS) == VF_LOCK_SERVER)
				vf_unlock(view.parts[0].queue);
			else
				wrong++;
		}
	while (vf_now_ns() < end_ns);
	return wrong;
}

static uint64_t run_rings(uint64_t end_ns)
{
	do
		for (uint32_t i = 0; i < BURST; i++)
			vf_server_start_rings(&view);
	while (vf_now_ns() < end_ns);
	return 0;
}

int main(int argc, char **argv)
{
	struct vf_board_geometry geometry = {
		.capacity_bytes = 1u << 30, .block_bytes = 512, .size_max_bytes = 131072, .segments_max = 32,
		.bounce_bytes = 131072, .queue_count = 1, .queue_size = 256, .slot_count = 128, .user_max = 16,
		.event_idx = 1, .indirect = 1,
	};
	pthread_t client;

	if (argc != 3)
		return 3;
	bool locks = strcmp(argv[1], "lock") == 0, solo = strcmp(argv[1], "solo") == 0;
	uint64_t bytes = vf_server_bytes(&geometry, AT);
	void *board = mmap(AT, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (board != AT || vf_server_create(&view, board, &geometry))
		return 2;
	if (solo) {
		if (!vf_membarrier_join())
			return 4;
		user = vf_server_new_user(&view, true);
	}
	if (pthread_create(&client, NULL, solo ? work_solo : locks ? lock_and_unlock : look_at_the_ring, NULL))
		return 2;
	uint64_t end_ns = vf_now_ns() + (uint64_t)(atof(argv[2]) * 1e9);
	uint64_t wrong = solo ? run_beside_solo(end_ns) : locks ? run_locks(end_ns) : run_rings(end_ns);
	void *done;
	vf_store_relaxed_u32(&stopping, 1);
	pthread_join(client, &done);
	if (solo)
		wrong = work - wrong - (uint64_t)(uintptr_t)done + (solo_times == 0);
	printf("%llu\n", (unsigned long long)wrong);
	return wrong != 0;
}
