/* SPDX-License-Identifier: Apache-2.0
 *
 * The parts of csrc that the fuzz harness does not reach, under the sanitizers: mapping, a fetching port, stores,
 * engines, creation and destruction. Exits 0, or aborts with the line of what is wrong.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "queue/queue.h"

#define CHECK(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                 \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

#define STORE_BYTES (4u << 20)

static struct vf_iotlb tlb;
static struct vf_port port;

void vf_fuzz_shared_read(const volatile void *address, size_t len_bytes)
{
	(void)address;
	(void)len_bytes;
}

static int memory_fd(size_t size)
{
	int fd = memfd_create("unit", MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
	return fd;
}

static void test_iotlb_table(void)
{
	int fd = memory_fd(8192);
	uint32_t run;

	vf_port_none_init(&port, -1);
	vf_iotlb_init(&tlb, &port);
	CHECK(vf_iotlb_map(&tlb, 0x1000, 0x1fff, VF_PERM_RW, fd, 0) == 0);
	CHECK(vf_iotlb_map(&tlb, 0x1800, 0x2fff, VF_PERM_RW, fd, 0) == -EEXIST);
	CHECK(vf_iotlb_map(&tlb, 5, 4, VF_PERM_RW, fd, 0) == -EINVAL);
	CHECK(vf_iotlb_map(&tlb, 0, 9, 0, fd, 0) == -EINVAL);
	CHECK(vf_iotlb_map(&tlb, 0x9000, 0x9fff, VF_PERM_RW, -1, 0) == -EBADF);
	CHECK(vf_iotlb_map(&tlb, 0, UINT64_MAX, VF_PERM_RO, fd, 0) < 0);
	CHECK(vf_iotlb_map(&tlb, 0x8000, 0x8fff, VF_PERM_RO, fd, UINT64_MAX) == -EOVERFLOW);
	CHECK(vf_iotlb_map(&tlb, 0x2000, 0x20ff, VF_PERM_RO, fd, 4096 + 8) == 0); /* an offset within a page */
	CHECK(vf_iotlb_map(&tlb, UINT64_MAX - 99, UINT64_MAX, VF_PERM_WO, fd, 0) == 0);
	CHECK(tlb.region_count == 3);
	CHECK(vf_iotlb_translate(&tlb, 0x1ff0, 64, VF_PERM_RO, &run) && run == 16);
	CHECK(vf_iotlb_translate(&tlb, 0x2000, 1, VF_PERM_WO, &run) == NULL);
	CHECK(vf_iotlb_translate(&tlb, UINT64_MAX, 1, VF_PERM_WO, &run) && run == 1);
	CHECK(vf_iotlb_translate(&tlb, UINT64_MAX, 1, VF_PERM_RO, &run) == NULL);
	CHECK(vf_iotlb_translate(&tlb, 0x3000, 1, VF_PERM_RO, &run) == NULL);
	CHECK(vf_iotlb_bury(&tlb, (uintptr_t)&tlb) == -1);

	uint8_t bytes[32];
	CHECK(pwrite(fd, "0123456789abcdef", 16, 4096 - 16) == 16 && pwrite(fd, "ghijklmnopqrstuv", 16, 4096 + 8) == 16);
	CHECK(vf_iotlb_copy_from(&tlb, 0x1ff0, bytes, 32) == 0);
	CHECK(memcmp(bytes, "0123456789abcdefghijklmnopqrstuv", 32) == 0);
	CHECK(vf_iotlb_copy_from(&tlb, 0x20f0, bytes, 32) == -EFAULT);
	CHECK(vf_iotlb_copy_from(&tlb, UINT64_MAX - 3, bytes, 32) == -EFAULT);
	CHECK(vf_iotlb_bury(&tlb, (uintptr_t)&tlb) == -1); /* not in a region */
	CHECK(vf_iotlb_bury(&tlb, (uintptr_t)tlb.region[0].map + 100) == 0);
	CHECK(vf_iotlb_copy_from(&tlb, 0x1ff0, bytes, 16) == 0 && bytes[0] == 0);
	CHECK(vf_iotlb_drop(&tlb, 0x1fff, 0x2000) == 2 && tlb.region_count == 1);
	CHECK(vf_iotlb_bury(&tlb, (uintptr_t)tlb.region[0].map + 1) == 0 && *(char *)tlb.region[0].map == 0);
	CHECK(vf_iotlb_drop(&tlb, 0, UINT64_MAX) == 1);
	close(fd);
}

/* /dev/vduse/NAME as port_kernel.c asks it: it knows one region, whose descriptor is a copy of kernel.fd. */
static struct {
	int fd;
	uint64_t last;
	uint32_t calls;
} kernel;

int ioctl(int fd, unsigned long request, ...)
{
	struct vf_vduse_iotlb_entry *entry;
	va_list words;

	(void)fd;
	(void)request;
	va_start(words, request);
	entry = va_arg(words, struct vf_vduse_iotlb_entry *); /* the first member of the newer structure, too */
	va_end(words);
	kernel.calls++;
	if (kernel.fd < 0) {
		errno = EINVAL;
		return -1;
	}
	*entry = (struct vf_vduse_iotlb_entry){ .last = kernel.last, .perm = VF_PERM_RW };
	return fcntl(kernel.fd, F_DUPFD_CLOEXEC, 0);
}

/* What the IOTLB has told of regions. */
static struct {
	uint8_t *va;
	size_t bytes;
	uint32_t mapped, dropped;
} told;

static void region_hook(void *context, void *va, size_t bytes, const struct vf_mapping *mapping)
{
	CHECK(context == &told);
	told.mapped += mapping != NULL;
	told.dropped += mapping == NULL;
	if (mapping) {
		told.va = va;
		told.bytes = bytes;
		return;
	}
	CHECK(va == told.va && bytes == told.bytes);
	told.va[0] = 0x21; /* it is still there */
}

static void test_user_memory(void)
{
	/* The kernel's own file is an anonymous inode, as an eventfd is, and that of a vhost client a file. */
	int anonymous = eventfd(0, EFD_CLOEXEC), client = memory_fd(8192), memory = memory_fd(8192);
	uint32_t run;
	uint8_t *va, last;

	for (uint32_t api = 0; api < 2u; api++) {
		CHECK(pwrite(client, "c", 1, 0) == 1 && pwrite(memory, "m", 1, 0) == 1);
		memset(&told, 0, sizeof(told));
		vf_port_kernel_init(&port, -1, api, 0);
		vf_iotlb_init(&tlb, &port);
		tlb.region_hook = region_hook;
		tlb.region_context = &told;
		kernel.fd = -1;
		CHECK(!vf_iotlb_find(&tlb, 0));
		kernel.fd = anonymous;
		kernel.last = 8191;
		CHECK(!vf_iotlb_find(&tlb, 0)); /* an eventfd cannot be mapped: nothing stands in for it yet */
		vf_port_kernel_use_memory(&port, memory, 8192);
		va = vf_iotlb_translate(&tlb, 0, 8192, VF_PERM_RW, &run);
		CHECK(va && *va == 'm' && run == 8192);
		CHECK(told.mapped == 1 && told.dropped == 0 && told.va == va && told.bytes == 8192);
		CHECK(vf_iotlb_drop(&tlb, 0, 0) == 1 && told.dropped == 1);
		CHECK(pread(memory, &last, 1, 0) == 1 && last == 0x21);
		kernel.last = 4095; /* another region than the whole of the bounce pages */
		CHECK(!vf_iotlb_find(&tlb, 0));
		kernel.last = 8191;
		kernel.fd = client;
		va = vf_iotlb_translate(&tlb, 0, 1, VF_PERM_RW, &run);
		CHECK(va && *va == 'c' && told.mapped == 2);
		CHECK(vf_iotlb_drop(&tlb, 0, 0) == 1 && told.dropped == 2);
		kernel.fd = anonymous;
		vf_port_kernel_use_memory(&port, -1, 8192); /* it cannot be copied */
		CHECK(!vf_iotlb_find(&tlb, 0));
		vf_port_kernel_use_memory(&port, memory, 0);
		CHECK(!vf_iotlb_find(&tlb, 0) && tlb.region_count == 0);
	}
	CHECK(kernel.calls == 14);
	close(memory);
	close(client);
	close(anonymous);
}

static void test_iotlb_full(void)
{
	static uint8_t byte;

	vf_iotlb_init(&tlb, &port);
	for (uint32_t i = 0; i < VF_IOTLB_CAPACITY; i++) /* from the top, so that every entry moves */
		CHECK(vf_iotlb_add(&tlb, 10u * (VF_IOTLB_CAPACITY - i), 10u * (VF_IOTLB_CAPACITY - i), VF_PERM_RO, &byte) == 0);
	CHECK(vf_iotlb_add(&tlb, 5, 5, VF_PERM_RO, &byte) == -ENOSPC);
	for (uint32_t i = 1; i <= VF_IOTLB_CAPACITY; i++)
		CHECK(vf_iotlb_find(&tlb, 10u * i) && !vf_iotlb_find(&tlb, 10u * i + 1u));
	CHECK(vf_iotlb_drop(&tlb, 0, UINT64_MAX) == VF_IOTLB_CAPACITY);
}

static void test_iotlb_evict(void)
{
	static uint8_t byte;
	const uint64_t rings[] = { 50, 990, 7777 };
	uint32_t left;

	vf_iotlb_init(&tlb, &port);
	for (uint64_t i = 1; i <= 100; i++)
		CHECK(vf_iotlb_add(&tlb, 10u * i, 10u * i + 9u, VF_PERM_RO, &byte) == 0);
	CHECK(vf_iotlb_evict(&tlb, rings, 3) == 50 && tlb.region_count == 50); /* all were in use: any of them */
	CHECK(vf_iotlb_find(&tlb, 50) && vf_iotlb_find(&tlb, 999));
	left = tlb.region_count;
	for (uint32_t i = 10; i < 30; i++) /* what is in use now stays */
		CHECK(vf_iotlb_find(&tlb, tlb.region[i].start));
	uint64_t busy[20];
	for (uint32_t i = 0; i < 20; i++)
		busy[i] = tlb.region[10 + i].start;
	CHECK(vf_iotlb_evict(&tlb, rings, 3) == left / 2u && tlb.region_count == left - left / 2u);
	for (uint32_t i = 0; i < 20; i++)
		CHECK(vf_iotlb_find(&tlb, busy[i]));
	CHECK(vf_iotlb_find(&tlb, 50) && vf_iotlb_find(&tlb, 990));
	for (uint32_t i = 0; i < 9; i++) /* whatever else goes, the rings do not */
		vf_iotlb_evict(&tlb, rings, 3);
	CHECK(tlb.region_count >= 2 && vf_iotlb_find(&tlb, 50) && vf_iotlb_find(&tlb, 990));
	CHECK(tlb.evict_count == 100u - tlb.region_count);
	vf_iotlb_obey_kernel(&tlb);
	CHECK(tlb.region_limit > 0 && tlb.region_limit <= VF_IOTLB_CAPACITY - VF_IOTLB_RESERVE);
	vf_iotlb_drop(&tlb, 0, UINT64_MAX);
	CHECK(vf_iotlb_evict(&tlb, rings, 3) == 0);
}

/* One answer of a bus, as transport/loopback.py sends it. */
static void answer(int fd, int err, uint64_t start, uint64_t last, int region_fd)
{
	struct {
		int32_t err;
		uint32_t pad;
		struct vf_vduse_iotlb_entry entry;
	} body = { .err = err, .entry = { .start = start, .last = last, .perm = VF_PERM_RW } };
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { { 0 } };
	struct iovec iov = { .iov_base = &body, .iov_len = sizeof(body) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (region_fd >= 0) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = sizeof(control.bytes);
		*CMSG_FIRSTHDR(&msg) = (struct cmsghdr){ CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS };
		memcpy(CMSG_DATA(CMSG_FIRSTHDR(&msg)), &region_fd, sizeof(int));
	}
	CHECK(sendmsg(fd, &msg, 0) == (ssize_t)sizeof(body));
}

static void test_fetching_port(void)
{
	int fd = memory_fd(4096), pair[2];

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
	vf_port_loopback_init(&port, pair[0], -1, 0);
	vf_iotlb_init(&tlb, &port);
	answer(pair[1], 0, 0x5000, 0x5fff, fd);
	CHECK(vf_iotlb_find(&tlb, 0x5800) && tlb.miss_count == 1 && tlb.region_count == 1);
	answer(pair[1], EINVAL, 0, 0, -1); /* there is none */
	CHECK(!vf_iotlb_find(&tlb, 0x6000));
	answer(pair[1], 0, 0x9000, 0x9fff, fd); /* not what was asked for */
	CHECK(!vf_iotlb_find(&tlb, 0x6000));
	answer(pair[1], 0, 0x5800, 0x6fff, fd); /* overlaps one that is there */
	CHECK(!vf_iotlb_find(&tlb, 0x6000));
	answer(pair[1], 0, 0x6000, 0x6fff, -1); /* without a descriptor */
	CHECK(!vf_iotlb_find(&tlb, 0x6000));
	answer(pair[1], EINVAL, 0x6000, 0x6fff, fd); /* an error with one */
	CHECK(!vf_iotlb_find(&tlb, 0x6000));
	CHECK(send(pair[1], "x", 1, 0) == 1);
	CHECK(!vf_iotlb_find(&tlb, 0x6000));
	close(pair[1]);
	CHECK(!vf_iotlb_find(&tlb, 0x6000) && tlb.region_count == 1);
	CHECK(vf_iotlb_drop(&tlb, 0, UINT64_MAX) == 1);
	close(pair[0]);
	close(fd);
}

static int store_do(struct vf_store *store, enum vf_op op, struct iovec *iov, uint32_t count, uint64_t at, uint64_t len)
{
	struct vf_req req = { .op = (uint8_t)op, .unmap = at & 1u, .iov = iov, .iov_count = count, .left_bytes = len };

	req.offset_bytes = at & ~1ull;
	return vf_store_do(store, &req);
}

static void test_store(enum vf_store_kind kind, uint32_t direct_align, uint32_t granule)
{
	struct vf_store store = { .fd = memory_fd(STORE_BYTES), .kind = kind, .size_bytes = STORE_BYTES };
	size_t len = (2u << 20) + 4096u; /* more than the bounce buffer twice */
	uint8_t *out = malloc(len + 1u), *in = malloc(len + 1u);

	CHECK(out && in);
	for (size_t i = 0; i < len; i++)
		out[i] = (uint8_t)(i * 7u + i / 4096u);
	CHECK(vf_store_open(&store) == 0);
	store.direct_align = direct_align; /* misaligned memory goes by way of the bounce buffer */
	store.granule = granule; /* and so do parts of blocks */
	store.emulates = granule > 512u;
	store.lock_fd = memory_fd(0);
	struct iovec from[3] = { { out, 5 }, { out + 5, 4091 }, { out + 4096, len - 4096 } };
	struct iovec to[2] = { { in + 1, 100 }, { in + 101, len - 100 } };
	CHECK(store_do(&store, VF_OP_WRITE, from, 3, 512, len) == 0);
	CHECK(store_do(&store, VF_OP_READ, to, 2, 512, len) == 0 && memcmp(out, in + 1, len) == 0);
	CHECK(store_do(&store, VF_OP_FLUSH, NULL, 0, 0, 0) == 0);
	CHECK(store_do(&store, VF_OP_DISCARD, NULL, 0, 512, 512) == 0);
	CHECK(store_do(&store, VF_OP_WRITE_ZEROES, NULL, 0, 1024, 512) == 0);
	CHECK(store_do(&store, VF_OP_WRITE_ZEROES, NULL, 0, 1536 | 1, 2u << 20) == 0);
	store.no_punch_hole = store.no_zero_range = 1;
	CHECK(store_do(&store, VF_OP_WRITE_ZEROES, NULL, 0, 1, 3u << 20) == 0);
	to[0] = (struct iovec){ in, len };
	CHECK(store_do(&store, VF_OP_READ, to, 1, 0, len) == 0);
	for (size_t i = 0; i < len; i++)
		CHECK(in[i] == 0);
	if (kind == VF_STORE_FILE) {
		to[0] = (struct iovec){ in, len };
		CHECK(store_do(&store, VF_OP_READ, to, 1, STORE_BYTES - 512, 1024) == -EIO); /* beyond the end */
	}
	CHECK(store_do(&store, VF_OP_GET_ID, NULL, 0, 0, 0) == -EINVAL);
	vf_store_close(&store);
	vf_store_close(&store);
	close(store.lock_fd);
	close(store.fd);
	free(out);
	free(in);
}

static void test_engine(const struct vf_engine_ops *ops)
{
	struct vf_engine engine;
	struct vf_store store = { .fd = memory_fd(65536), .kind = VF_STORE_FILE, .size_bytes = 65536 };
	uint8_t data[16][512];
	struct iovec iov[16];
	struct vf_req reqs[16], *done[16];
	uint32_t finished = 0;

	if (vf_engine_open(&engine, ops, &store, 8) != 0) { /* io_uring is forbidden here */
		close(store.fd);
		return;
	}
	memset(data, 0x5a, sizeof(data));
	for (uint32_t i = 0; i < 16u; i++) {
		iov[i] = (struct iovec){ data[i], 512 };
		reqs[i] = (struct vf_req){ .op = i % 3u ? VF_OP_WRITE : VF_OP_FLUSH, .iov = &iov[i], .iov_count = 1 };
		reqs[i].left_bytes = i % 3u ? 512u : 0u;
		reqs[i].offset_bytes = 512u * i;
		finished += (uint32_t)engine.ops->submit(&engine, &reqs[i]);
	}
	while (engine.inflight_count) {
		engine.ops->flush(&engine);
		uint32_t count = engine.ops->reap(&engine, done, 16);
		finished += count;
		if (!count)
			engine.ops->wait(&engine);
	}
	CHECK(finished == 16);
	for (uint32_t i = 0; i < 16u; i++)
		CHECK(reqs[i].result == 0 && reqs[i].left_bytes == 0);
	vf_engine_close(&engine);
	vf_engine_close(&engine);
	close(store.fd);
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

/* A driver as interrupt moderation sees it, in simulated time; the device itself takes none. */
struct sim_driver {
	uint32_t depth; /* requests in flight at most */
	uint64_t send_ns; /* CPU time of a request */
	uint64_t irq_ns; /* of an interrupt */
	uint64_t every_ns; /* a request comes so often whatever is done; 0 = as soon as it can */
};

struct sim_result {
	uint64_t irqs;
	uint64_t ns;
};

static struct sim_result simulate(struct vf_irq_coalesce *hold, const struct sim_driver *driver, uint64_t *clock_ns, uint32_t count)
{
	uint64_t start_ns = *clock_ns, now_ns = start_ns, irqs = 0;
	uint32_t owed = 0;

	for (uint32_t sent = 0; sent < count || owed;) {
		int told = 0;

		if (sent < count && owed < driver->depth && now_ns >= start_ns + sent * driver->every_ns) {
			sent++;
			owed++;
			now_ns += driver->send_ns;
			told = hold->limit_ns == 0 || vf_irq_coalesce_should_interrupt(hold, owed, now_ns);
		} else {
			now_ns += 100;
		}
		if (!told && hold->since_ns)
			told = vf_irq_coalesce_expired(hold, owed, now_ns);
		if (told) {
			hold->since_ns = 0;
			owed = 0;
			irqs++;
			now_ns += driver->irq_ns;
		}
	}
	*clock_ns = now_ns;
	return (struct sim_result){ .irqs = irqs, .ns = now_ns - start_ns };
}

static void test_irq_coalesce(void)
{
	static const struct sim_driver deep = { .depth = 32, .send_ns = 1000, .irq_ns = 5000 };
	static const struct sim_driver four = { .depth = 4, .send_ns = 1000, .irq_ns = 5000 };
	static const struct sim_driver single = { .depth = 1, .send_ns = 1000, .irq_ns = 5000 };
	static const struct sim_driver leisurely = { .depth = 32, .send_ns = 1000, .irq_ns = 5000, .every_ns = 40000 };
	struct vf_irq_coalesce hold = { .limit_ns = 200000 };
	struct vf_irq_coalesce none = { .limit_ns = 0 };
	uint64_t clock_ns = 1000000;
	struct sim_result result, plain;

	/* One request at a time: next to nothing is lost. */
	plain = simulate(&none, &single, &clock_ns, 100000);
	result = simulate(&hold, &single, &clock_ns, 100000);
	CHECK(result.irqs == 100000 && result.ns < plain.ns + plain.ns / 100u);

	/* A driver short of CPU: an interrupt for many, and twice the requests. */
	plain = simulate(&none, &deep, &clock_ns, 100000);
	result = simulate(&hold, &deep, &clock_ns, 100000);
	CHECK(plain.irqs == 100000 && result.irqs < 100000 / 8 && result.ns < plain.ns / 2u);
	plain = simulate(&none, &four, &clock_ns, 100000);
	result = simulate(&hold, &four, &clock_ns, 100000);
	CHECK(result.irqs < 100000 / 2 && result.ns < plain.ns * 3u / 4u);

	/* Requests that come no faster for it are told of one by one, whatever was learnt before. */
	simulate(&hold, &deep, &clock_ns, 10000);
	simulate(&hold, &leisurely, &clock_ns, 5000);
	result = simulate(&hold, &leisurely, &clock_ns, 100000);
	CHECK(result.irqs > 95000);

	/* Back to one at a time: the batch is given up within a few requests, and none waits longer than the limit. */
	simulate(&hold, &deep, &clock_ns, 10000);
	CHECK(hold.batch > 1);
	result = simulate(&hold, &single, &clock_ns, 100);
	CHECK(hold.batch <= 1 && result.ns < 100 * 6000 + 20 * 200000);
}

/* Pieces of a range end where what the store frees at a time does, and nothing is left out. */
static void test_pieces(void)
{
	static const struct { uint64_t unit, offset, start, len; } cases[] = {
		{ 0, 0, 512, 100u << 20 },
		{ 1u << 20, 0, 0, 100u << 20 },
		{ 1u << 20, 4096, 512, 100u << 20 },
		{ 192u << 10, 0, 12345u * 512, 77u << 20 }, /* no power of two */
		{ 64u << 20, 1u << 20, 512, 300u << 20 }, /* larger than a piece */
		{ 1u << 20, 512u << 10, 0, 1u << 20 },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct vf_pieces pieces = { .unit_bytes = cases[i].unit, .offset_bytes = cases[i].offset };
		struct vf_req req = { .op = VF_OP_DISCARD, .offset_bytes = cases[i].start, .left_bytes = cases[i].len };

		for (uint32_t count = 0; req.left_bytes; count++) {
			uint64_t bytes = vf_piece_bytes(&pieces, &req, VF_PIECE_MAX_BYTES);

			CHECK(bytes && bytes <= req.left_bytes && count < 100);
			CHECK(bytes <= VF_PIECE_MAX_BYTES || bytes <= cases[i].unit);
			req.offset_bytes += bytes;
			req.left_bytes -= bytes;
			CHECK(!req.left_bytes || !cases[i].unit ||
			      (req.offset_bytes - cases[i].offset) % cases[i].unit == 0);
		}
	}
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
	test_iotlb_table();
	test_user_memory();
	test_iotlb_full();
	test_iotlb_evict();
	test_fetching_port();
	test_store(VF_STORE_FILE, 0, 0);
	test_store(VF_STORE_FILE, 512, 512);
	test_store(VF_STORE_FILE, 4096, 4096);
	test_store(VF_STORE_FILE, 65536, 65536);
	test_store(VF_STORE_FILE, 0, 4096);
	test_store(VF_STORE_MEMORY, 0, 0);
	test_engine(&vf_engine_sync);
	test_engine(&vf_engine_uring);
	test_queue();
	test_irq_coalesce();
	test_pieces();
	test_stop();
	return 0;
}
