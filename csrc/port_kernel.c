/* SPDX-License-Identifier: Apache-2.0
 *
 * The port of a worker behind /dev/vduse/NAME, of which it holds a copy of the descriptor: regions by
 * VDUSE_IOTLB_GET_FD, interrupts by VDUSE_VQ_INJECT_IRQ. Both work from any process that has the descriptor.
 */
#include "port.h"

#include <errno.h>
#include <sys/ioctl.h>

#define VF_VDUSE_BASE 0x81
#define VF_VDUSE_IOTLB_GET_FD _IOWR(VF_VDUSE_BASE, 0x10, struct vf_vduse_iotlb_entry)
#define VF_VDUSE_VQ_INJECT_IRQ _IOW(VF_VDUSE_BASE, 0x17, uint32_t)
#define VF_VDUSE_IOTLB_GET_FD2 _IOWR(VF_VDUSE_BASE, 0x1b, struct vf_vduse_iotlb_entry_v2)

static int vf_port_kernel_get_fd(struct vf_port *port, uint64_t start, uint64_t last, struct vf_vduse_iotlb_entry *entry)
{
	*entry = (struct vf_vduse_iotlb_entry){ .start = start, .last = last };
	int fd = ioctl(port->fd, VF_VDUSE_IOTLB_GET_FD, entry);
	return fd >= 0 ? fd : -errno;
}

static int vf_port_kernel_get_fd2(struct vf_port *port, uint64_t start, uint64_t last, struct vf_vduse_iotlb_entry *entry)
{
	struct vf_vduse_iotlb_entry_v2 entry_v2 = { .v1 = { .start = start, .last = last } };
	int fd = ioctl(port->fd, VF_VDUSE_IOTLB_GET_FD2, &entry_v2);

	*entry = entry_v2.v1;
	return fd >= 0 ? fd : -errno;
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
	};
}
