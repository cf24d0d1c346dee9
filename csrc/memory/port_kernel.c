/* SPDX-License-Identifier: Apache-2.0
 *
 * The port of a worker behind /dev/vduse/NAME, of which it holds a copy of the descriptor: regions by
 * VDUSE_IOTLB_GET_FD, interrupts by VDUSE_VQ_INJECT_IRQ. Both work from any process that has the descriptor.
 */
#include "memory/port.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define VF_VDUSE_BASE 0x81
#define VF_VDUSE_IOTLB_GET_FD _IOWR(VF_VDUSE_BASE, 0x10, struct vf_vduse_iotlb_entry)
#define VF_VDUSE_VQ_INJECT_IRQ _IOW(VF_VDUSE_BASE, 0x17, uint32_t)
#define VF_VDUSE_IOTLB_GET_FD2 _IOWR(VF_VDUSE_BASE, 0x1b, struct vf_vduse_iotlb_entry_v2)

/*
 * The descriptor for the region in *entry; consumes fd. After user memory has replaced the bounce pages, the kernel still
 * returns its own file for the region, which no longer shows any pages. A client of vhost-vdpa may map a file of its own to
 * the same addresses. That file has a type, while the kernel's is an anonymous inode without one.
 */
static int vf_port_kernel_stand_in(struct vf_port *port, struct vf_vduse_iotlb_entry *entry, int fd)
{
	struct stat status;

	port->fetched_whole = 0;
	if (!port->user_memory_bytes || entry->start != 0 || entry->last != port->user_memory_bytes - 1u)
		return fd;
	if (fstat(fd, &status) || (status.st_mode & S_IFMT))
		return fd;
	close(fd);
	fd = fcntl(port->user_memory_fd, F_DUPFD_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	entry->offset = 0;
	port->fetched_whole = 1;
	return fd;
}

static int vf_port_kernel_get_fd(struct vf_port *port, uint64_t start, uint64_t last, struct vf_vduse_iotlb_entry *entry)
{
	*entry = (struct vf_vduse_iotlb_entry){ .start = start, .last = last };
	int fd = ioctl(port->fd, VF_VDUSE_IOTLB_GET_FD, entry);

	return fd >= 0 ? vf_port_kernel_stand_in(port, entry, fd) : -errno;
}

static int vf_port_kernel_get_fd2(struct vf_port *port, uint64_t start, uint64_t last, struct vf_vduse_iotlb_entry *entry)
{
	struct vf_vduse_iotlb_entry_v2 entry_v2 = { .v1 = { .start = start, .last = last } };
	int fd = ioctl(port->fd, VF_VDUSE_IOTLB_GET_FD2, &entry_v2);

	if (fd < 0)
		return -errno;
	*entry = entry_v2.v1;
	return vf_port_kernel_stand_in(port, entry, fd);
}

static int vf_port_kernel_irq(struct vf_port *port)
{
	return ioctl(port->fd, VF_VDUSE_VQ_INJECT_IRQ, &port->vq_index) < 0 ? -errno : 0;
}

void vf_port_kernel_init(struct vf_port *port, int fd, uint32_t api_version, uint32_t vq_index)
{
	*port = (struct vf_port){
		.iotlb_get_fd = api_version ? vf_port_kernel_get_fd2 : vf_port_kernel_get_fd,
		.inject_irq = vf_port_kernel_irq,
		.fd = fd,
		.irq_fd = -1,
		.vq_index = vq_index,
		.user_memory_fd = -1,
	};
}

void vf_port_kernel_use_memory(struct vf_port *port, int fd, uint64_t bytes)
{
	port->user_memory_fd = fd;
	port->user_memory_bytes = bytes;
}
