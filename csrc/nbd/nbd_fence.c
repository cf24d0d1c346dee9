/* SPDX-License-Identifier: Apache-2.0
 *
 * The fence between a connection and the next one. A server may carry out an old command after we have sent it again, and after
 * the driver has written newer data there. The server closes its end of a connection after it has finished the connection's
 * commands. So no modifying command is sent again before we have seen that end.
 *
 * For that the socket must outlive the process that made it. It waits in an unread message of a datagram socket, which is
 * connected to itself, and which the supervisor and its keeper have open. The next worker shuts down its sending half, and waits
 * for the end without a limit. A note in a file tells whether there is such a socket. If it is lost, or the kernel ends the
 * connection without having seen the server's end, then modifying requests without a known result are in doubt: they are kept
 * for reconnect_s and then fail.
 */
#define _GNU_SOURCE
#include "nbd/internal.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/barrier.h"
#include "base/seed_fault.h"

#define VF_NBD_NAMED_MAX 4u /* requests that the log names one by one */

/* The byte at the place of a queue in the file of notes; keeper.py writes it as well. */
enum vf_nbd_note {
	VF_NBD_NOTE_NONE, /* no note was written: as VF_NBD_NOTE_DOUBT */
	VF_NBD_NOTE_ENDED, /* the ends of all connections have been seen */
	VF_NBD_NOTE_OPEN, /* an end is not seen yet, and that socket is kept */
	VF_NBD_NOTE_DOUBT, /* an end was not seen, and cannot be seen any more */
};

union vf_nbd_control {
	struct cmsghdr header;
	char bytes[CMSG_SPACE(sizeof(int))];
};

/* Receive the kept socket, or with MSG_PEEK a copy of it. Returns a descriptor, now owned, or -1. */
static int vf_nbd_hold_take(int hold_fd, int flags)
{
	union vf_nbd_control control;
	char byte;
	struct iovec iov = { &byte, sizeof(byte) };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
				  .msg_controllen = sizeof(control.bytes) };
	const struct cmsghdr *header;
	int fd = -1;

	if (hold_fd < 0 || recvmsg(hold_fd, &message, flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC) < 0)
		return -1;
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(header), sizeof(fd));
	return fd;
}

static void vf_nbd_hold_clear(int hold_fd)
{
	int fd = vf_nbd_hold_take(hold_fd, 0);

	if (fd >= 0)
		close(fd);
}

static int vf_nbd_hold_put(int hold_fd, int fd)
{
	union vf_nbd_control control = { .bytes = { 0 } };
	char byte = 0;
	struct iovec iov = { &byte, sizeof(byte) };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
				  .msg_controllen = sizeof(control.bytes) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	return sendmsg(hold_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -1 : 0;
}

/* Write the note. 0, or -1: it could not be written. Without a hold for sockets there are no notes either. */
static int vf_nbd_note_write(const struct vf_nbd *nbd, enum vf_nbd_note note)
{
	const uint8_t byte = (uint8_t)note;

	if (nbd->config.notes_fd < 0)
		return 0;
	return pwrite(nbd->config.notes_fd, &byte, sizeof(byte), nbd->config.notes_offset) == (ssize_t)sizeof(byte) ? 0 : -1;
}

static enum vf_nbd_note vf_nbd_note_read(const struct vf_nbd *nbd)
{
	uint8_t byte = VF_NBD_NOTE_NONE;

	if (nbd->config.notes_fd < 0)
		return VF_NBD_NOTE_ENDED;
	if (pread(nbd->config.notes_fd, &byte, sizeof(byte), nbd->config.notes_offset) != (ssize_t)sizeof(byte))
		return VF_NBD_NOTE_NONE;
	return byte <= VF_NBD_NOTE_DOUBT ? (enum vf_nbd_note)byte : VF_NBD_NOTE_NONE;
}

int vf_nbd_fence_open(struct vf_nbd *nbd, uint64_t now_ns)
{
	struct vf_nbd_link *link = &nbd->link;
	enum vf_nbd_note note = vf_nbd_note_read(nbd);

	if (vf_seed_has_no_fence()) {
		vf_nbd_hold_clear(nbd->config.hold_fd);
		note = VF_NBD_NOTE_ENDED;
	}
	link->fd = vf_nbd_hold_take(nbd->config.hold_fd, MSG_PEEK);
	link->doubt = link->fd < 0 ? note != VF_NBD_NOTE_ENDED : note == VF_NBD_NOTE_DOUBT;
	link->doubt_ns = now_ns + nbd->config.reconnect_ns;
	return link->fd >= 0;
}

int vf_nbd_fence_begin(struct vf_nbd *nbd)
{
	/* In this order: a socket without its note is still found. */
	if (nbd->config.hold_fd >= 0 && vf_nbd_hold_put(nbd->config.hold_fd, nbd->link.fd))
		return -1;
	return vf_nbd_note_write(nbd, nbd->link.doubt ? VF_NBD_NOTE_DOUBT : VF_NBD_NOTE_OPEN);
}

void vf_nbd_fence_end(struct vf_nbd *nbd)
{
	/* If it is not written, the next worker is in doubt without need. */
	(void)vf_nbd_note_write(nbd, nbd->link.doubt ? VF_NBD_NOTE_DOUBT : VF_NBD_NOTE_ENDED);
	vf_nbd_hold_clear(nbd->config.hold_fd);
}

int vf_nbd_ends_in_order(int err)
{
	switch (err) {
	case 0:
	case ECONNRESET: /* the kernel of the server has closed it, which it does after the server */
	case EPIPE: /* as that */
	case EFAULT: /* these are trouble on our side: the socket tells how it ends */
	case ENOMEM:
	case ENOBUFS:
		return 1;
	default:
		return 0;
	}
}

int vf_nbd_socket_err(int fd, int *is_closed)
{
	struct pollfd polled = { .fd = fd };
	struct tcp_info info;
	socklen_t len = sizeof(info);
	int err = 0;

	*is_closed = 0;
	if (poll(&polled, 1, 0) <= 0 || !(polled.revents & (POLLERR | POLLHUP)))
		return 0;
	/* Of its own fields the first is enough. A Unix socket has none, and no way to be given up. */
	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0)
		*is_closed = info.tcpi_state == TCP_CLOSE;
	len = sizeof(err);
	return getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) ? 0 : err;
}

void vf_nbd_withhold(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, enum vf_nbd_fate fate)
{
	if (cmd->fate == VF_NBD_FREE)
		nbd->link.withheld_count++;
	cmd->fate = (uint8_t)fate;
}

void vf_nbd_fence_doubt(struct vf_nbd *nbd, uint64_t now_ns)
{
	struct vf_nbd_link *link = &nbd->link;

	link->doubt = 1;
	link->doubt_ns = now_ns + nbd->config.reconnect_ns;
	vf_nbd_fence_end(nbd);
	vf_nbd_log(&nbd->events, "%s: it is unknown whether the server still works on writes of the old connection: they are "
		   "kept for %llu s and fail then; other requests continue", nbd->uri,
		   (unsigned long long)(nbd->config.reconnect_ns / 1000000000u));
}

void vf_nbd_fence_fail(struct vf_nbd *nbd, enum vf_nbd_fate fate)
{
	static const char *const names[] = {
		[VF_OP_WRITE] = "a write", [VF_OP_DISCARD] = "a discard", [VF_OP_WRITE_ZEROES] = "a write of zeroes",
	};
	uint32_t named = 0;

	for (uint32_t i = 0; i < nbd->slot_count && nbd->link.withheld_count; i++) {
		struct vf_nbd_cmd *cmd = &nbd->cmds[i];

		if (!cmd->req || cmd->fate != fate)
			continue;
		if (fate == VF_NBD_WITHHELD && named++ < VF_NBD_NAMED_MAX)
			vf_nbd_log(&nbd->events, "%s: %s of %llu bytes at %llu ends with an error: it is unknown whether the server "
				   "has carried it out, or will", nbd->uri, names[cmd->req->op],
				   (unsigned long long)cmd->req->left_bytes, (unsigned long long)cmd->req->offset_bytes);
		vf_nbd_finish(nbd, cmd, fate == VF_NBD_DOOMED ? -ETIMEDOUT : -EIO);
	}
	if (named > VF_NBD_NAMED_MAX)
		vf_nbd_log(&nbd->events, "%s: so do %u more", nbd->uri, named - VF_NBD_NAMED_MAX);
}

void vf_nbd_fence_look(struct vf_nbd *nbd, uint64_t now_ns)
{
	struct vf_nbd_link *link = &nbd->link;

	if (now_ns < link->doubt_ns)
		return;
	vf_nbd_fence_fail(nbd, VF_NBD_WITHHELD);
	/* Requests of earlier workers come before new ones. */
	if (!link->has_new)
		return;
	link->doubt = 0;
	if (link->state != VF_NBD_ENDING)
		(void)vf_nbd_note_write(nbd, link->state == VF_NBD_UP ? VF_NBD_NOTE_OPEN : VF_NBD_NOTE_ENDED);
}
