/* SPDX-License-Identifier: Apache-2.0
 *
 * The NBD engine, and a socket that fails as one that the kernel has given up: nbd_doubt URI, linked with --wrap=recvmsg.
 * A write that was under way is not sent again and fails after reconnect_s; a read is, at once; what follows is served.
 */
#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>

#include "nbd/internal.h"

#define BLOCK 512u
#define RECONNECT_NS 1000000000u

static struct vf_engine engine;
static int fails;

ssize_t __real_recvmsg(int fd, struct msghdr *message, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags);

ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags)
{
	if (!fails)
		return __real_recvmsg(fd, message, flags);
	fails = 0;
	errno = ETIMEDOUT;
	return -1;
}

static void turn(struct vf_nbd *nbd, uint32_t *left)
{
	struct vf_nbd_event event;
	struct vf_req *done[4];

	engine.ops->flush(&engine);
	*left -= engine.ops->reap(&engine, done, 4);
	engine.ops->sleep(&engine, NULL, 0, 20);
	while (vf_nbd_event_take(&nbd->events, &event))
		printf("%s\n", event.text);
}

int main(int argc, char **argv)
{
	struct vf_nbd_config config = { .uri = argv[1], .block_size_bytes = BLOCK, .size_bytes = 1u << 20,
					.reconnect_ns = RECONNECT_NS, .hold_fd = -1, .notes_fd = -1 };
	static uint8_t memory[2][BLOCK];
	struct iovec iovs[2] = { { memory[0], BLOCK }, { memory[1], BLOCK } };
	struct vf_req write = { .op = VF_OP_WRITE, .slot = 0, .iov = &iovs[0], .iov_count = 1, .left_bytes = BLOCK };
	struct vf_req read = { .op = VF_OP_READ, .slot = 1, .iov = &iovs[1], .iov_count = 1, .left_bytes = BLOCK };
	struct vf_req next = { .op = VF_OP_WRITE, .slot = 2, .iov = &iovs[0], .iov_count = 1, .offset_bytes = 4096,
			       .left_bytes = BLOCK };
	uint32_t left = 2;
	uint64_t began_ns;
	struct vf_nbd *nbd = argc == 2 ? vf_nbd_create(&config) : NULL;

	if (!nbd)
		return 2;
	engine = (struct vf_engine){ .store = { .fd = -1, .kind = VF_STORE_PLUGIN, .size_bytes = 1u << 20 } };
	engine.context = nbd;
	engine.ops = nbd->plugin.ops;
	if (engine.ops->open(&engine, 4))
		return 2;
	write.result = read.result = next.result = 1;
	engine.ops->submit(&engine, &write);
	engine.ops->submit(&engine, &read);
	while (nbd->link.state != VF_NBD_UP)
		turn(nbd, &left);
	turn(nbd, &left);
	fails = 1;
	began_ns = vf_now_ns();
	while (left == 2)
		turn(nbd, &left);
	printf("read: %d, write: %d\n", read.result, write.result);
	if (read.result != 0 || write.result != 1)
		return 1;
	left++;
	engine.ops->submit(&engine, &next);
	while (left == 2)
		turn(nbd, &left);
	printf("next: %d, write: %d\n", next.result, write.result);
	if (next.result != 0 || write.result != 1)
		return 1;
	while (left)
		turn(nbd, &left);
	printf("write: %d\n", write.result);
	if (write.result != -EIO || vf_now_ns() - began_ns < RECONNECT_NS)
		return 1;
	engine.ops->close(&engine);
	vf_nbd_destroy(nbd);
	return 0;
}
