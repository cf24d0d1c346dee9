/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "csrc_unit.h"

#include <fcntl.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

static struct vf_iotlb tlb;
static struct vf_port port;

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
	CHECK(vf_iotlb_zero_pages(&tlb, (uintptr_t)&tlb) == -1);

	uint8_t bytes[32];
	CHECK(pwrite(fd, "0123456789abcdef", 16, 4096 - 16) == 16 && pwrite(fd, "ghijklmnopqrstuv", 16, 4096 + 8) == 16);
	CHECK(vf_iotlb_copy_from(&tlb, 0x1ff0, bytes, 32) == 0);
	CHECK(memcmp(bytes, "0123456789abcdefghijklmnopqrstuv", 32) == 0);
	CHECK(vf_iotlb_copy_from(&tlb, 0x20f0, bytes, 32) == -EFAULT);
	CHECK(vf_iotlb_copy_from(&tlb, UINT64_MAX - 3, bytes, 32) == -EFAULT);
	CHECK(vf_iotlb_zero_pages(&tlb, (uintptr_t)&tlb) == -1); /* not in a region */
	CHECK(vf_iotlb_zero_pages(&tlb, (uintptr_t)tlb.region[0].map + 100) == 0);
	CHECK(vf_iotlb_copy_from(&tlb, 0x1ff0, bytes, 16) == 0 && bytes[0] == 0);
	CHECK(vf_iotlb_drop(&tlb, 0x1fff, 0x2000) == 2 && tlb.region_count == 1);
	CHECK(vf_iotlb_zero_pages(&tlb, (uintptr_t)tlb.region[0].map + 1) == 0 && *(char *)tlb.region[0].map == 0);
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

void test_memory(void)
{
	test_iotlb_table();
	test_user_memory();
	test_iotlb_full();
	test_iotlb_evict();
	test_fetching_port();
}
