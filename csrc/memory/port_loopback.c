/* SPDX-License-Identifier: Apache-2.0
 *
 * The port of the loopback transport: regions over a SOCK_SEQPACKET pair to the bus, interrupts by eventfd.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "memory/port.h"

struct vf_bus_query {
	uint64_t start;
	uint64_t last;
};

struct vf_bus_answer {
	int32_t err; /* 0 or a positive errno */
	uint32_t reserved;
	struct vf_vduse_iotlb_entry entry;
};

static int vf_bus_receive(int fd, struct vf_bus_answer *answer)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = { .iov_base = answer, .iov_len = sizeof(*answer) };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes),
	};
	ssize_t n;

	do
		n = recvmsg(fd, &msg, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;

	int region_fd = -1;
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
	if (cmsg && cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS &&
	    cmsg->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(&region_fd, CMSG_DATA(cmsg), sizeof(int));
	if (n != (ssize_t)sizeof(*answer) || answer->err != 0 || region_fd < 0) {
		int err = n == (ssize_t)sizeof(*answer) && answer->err > 0 ? -answer->err : -EPROTO;
		if (region_fd >= 0)
			close(region_fd);
		return err;
	}
	return region_fd;
}

static int vf_port_loopback_get_fd(struct vf_port *port, uint64_t start, uint64_t last,
				   struct vf_vduse_iotlb_entry *entry)
{
	struct vf_bus_query query = { .start = start, .last = last };
	struct vf_bus_answer answer;
	struct pollfd pfd = { .fd = port->fd, .events = POLLIN };
	int ready;

	/* Without a time limit, as VDUSE_IOTLB_GET_FD: a bus that is slow must not make requests fail. A worker that waits for one
	 * that never answers is killed once its queue is to stop (quiesce_s). */
	if (send(port->fd, &query, sizeof(query), MSG_NOSIGNAL) != (ssize_t)sizeof(query))
		return -EIO;
	do
		ready = poll(&pfd, 1, -1);
	while (ready < 0 && errno == EINTR);
	if (ready < 0)
		return -errno;
	int fd = vf_bus_receive(port->fd, &answer);
	if (fd >= 0)
		*entry = answer.entry;
	return fd;
}

static int vf_port_eventfd_irq(struct vf_port *port)
{
	uint64_t one = 1;

	/* EAGAIN means that the counter is full: an interrupt is pending anyway. */
	if (port->irq_fd >= 0 && write(port->irq_fd, &one, sizeof(one)) < 0 && errno != EAGAIN)
		return -errno;
	return 0;
}

static int vf_port_none_get_fd(struct vf_port *port, uint64_t start, uint64_t last, struct vf_vduse_iotlb_entry *entry)
{
	(void)port;
	(void)start;
	(void)last;
	(void)entry;
	return -EINVAL;
}

void vf_port_loopback_init(struct vf_port *port, int fd, int irq_fd, uint32_t vq_index)
{
	*port = (struct vf_port){
		.iotlb_get_fd = vf_port_loopback_get_fd,
		.inject_irq = vf_port_eventfd_irq,
		.fd = fd,
		.irq_fd = irq_fd,
		.vq_index = vq_index,
	};
}

void vf_port_none_init(struct vf_port *port, int irq_fd)
{
	*port = (struct vf_port){
		.iotlb_get_fd = vf_port_none_get_fd,
		.inject_irq = vf_port_eventfd_irq,
		.fd = -1,
		.irq_fd = irq_fd,
	};
}
