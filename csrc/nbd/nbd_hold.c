/* SPDX-License-Identifier: Apache-2.0
 *
 * A worker that is killed leaves requests with the server, which may carry them out after the next worker has repeated them
 * and the driver has written something newer there. So the socket has to outlive the worker: it waits in a message that
 * nobody has read, in a datagram socket that is connected to itself and that the supervisor keeps open. The next worker
 * takes it, shuts its sending half, and connects once the server has closed the other end.
 */
#define _GNU_SOURCE
#include "engine_nbd.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define VF_NBD_HELD_MAX 8u /* messages, should there ever be more than the one */

union vf_nbd_control {
	struct cmsghdr header;
	char bytes[CMSG_SPACE(sizeof(int))];
};

int vf_nbd_hold_take(int hold_fd)
{
	int found = -1;

	for (uint32_t i = 0; hold_fd >= 0 && i < VF_NBD_HELD_MAX; i++) {
		union vf_nbd_control control;
		char byte;
		struct iovec iov = { &byte, sizeof(byte) };
		struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
					  .msg_controllen = sizeof(control.bytes) };
		const struct cmsghdr *header;

		if (recvmsg(hold_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) < 0)
			break;
		header = CMSG_FIRSTHDR(&message);
		if (!header || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
			continue;
		if (found >= 0)
			close(found);
		memcpy(&found, CMSG_DATA(header), sizeof(found));
	}
	return found;
}

void vf_nbd_hold(int hold_fd, int fd)
{
	union vf_nbd_control control = { .bytes = { 0 } };
	char byte = 0;
	struct iovec iov = { &byte, sizeof(byte) };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
				  .msg_controllen = sizeof(control.bytes) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	int before;
	ssize_t sent;

	if (hold_fd < 0)
		return;
	before = vf_nbd_hold_take(hold_fd);
	if (before >= 0)
		close(before);
	if (fd < 0)
		return;
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	sent = sendmsg(hold_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	(void)sent; /* it has room for one; without it, it is as with a supervisor that does not hold */
}
