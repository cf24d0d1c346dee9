/* SPDX-License-Identifier: Apache-2.0 *
 * The parts of csrc that the fuzz harness does not reach, under the sanitizers: mapping, a fetching port, stores,
 * engines, creation and destruction. Exits 0, or aborts with the line of what is wrong.
 */
#define _GNU_SOURCE
#include "csrc_unit.h"

#include <signal.h>
#include <sys/eventfd.h>

void vf_fuzz_shared_read(const volatile void *address, size_t len_bytes)
{
	(void)address;
	(void)len_bytes;
}

static void test_queue(void)
{
	struct vf_blk_device device = { .capacity_sectors = 8, .block_sectors = 1, .seg_max = VF_SEG_MAX_LIMIT };
	const uint32_t sizes[] = { 2, 256, VF_QUEUE_SIZE_MAX };

	for (uint32_t i = 0; i < 3u; i++) {
		uint32_t stride = vf_shm_layout().stride_bytes;
		void *block = aligned_alloc(4096, stride);

		memset(block, 0, stride);
		struct vf_queue *q = vf_queue_create(&device, sizes[i], block);
		CHECK(q && q->free_count == q->slot_count && q->slot_count <= VF_SLOT_MAX);
		struct vf_store store = { .fd = -1, .kind = VF_STORE_NULL, .size_bytes = 4096 };
		CHECK(vf_engine_open(&q->engine, &vf_engine_null, &store, q->slot_count) == 0);
		CHECK(vf_queue_guard(q) == 0);
		int fd = memory_fd(8192);
		CHECK(vf_iotlb_map(&q->tlb, 0, 8191, VF_PERM_RW, fd, 0) == 0);
		CHECK(ftruncate(fd, 0) == 0);
		uint32_t run;
		uint8_t *gone = vf_iotlb_translate(&q->tlb, 4100, 1, VF_PERM_RO, &run);
		CHECK(*(volatile uint8_t *)gone == 0 && q->counters->memory_faults == 1);
		vf_queue_destroy(q);
		close(fd);
		free(block);
	}
	device.seg_max++;
	CHECK(!vf_queue_create(&device, 16, NULL) && errno == EINVAL);
	device.seg_max = 1;
	CHECK(!vf_queue_create(&device, 1, NULL) && !vf_queue_create(&device, VF_QUEUE_SIZE_MAX + 1u, NULL));
	device.block_sectors = 0;
	CHECK(!vf_queue_create(&device, 16, NULL));
	vf_queue_destroy(NULL);
}

static void test_stop(void)
{
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	uint64_t count = 0;

	CHECK(vf_stop_install(fd) == 0 && !*vf_stop_flag());
	CHECK(raise(SIGTERM) == 0 && *vf_stop_flag());
	CHECK(read(fd, &count, sizeof(count)) == sizeof(count) && count == 1);
	close(fd);
}

int main(void)
{
	test_memory();
	test_stores();
	test_pieces();
	test_queue();
	test_irq_coalesce();
	test_stop();
	return 0;
}
