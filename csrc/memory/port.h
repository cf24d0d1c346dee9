/* SPDX-License-Identifier: Apache-2.0
 *
 * A worker's interface to its transport: fetch a region of the IOTLB, send an interrupt. One file per transport fills it
 * in: port_kernel.c, port_loopback.c.
 */
#ifndef VF_PORT_H
#define VF_PORT_H

#include <stdint.h>

/* struct vduse_iotlb_entry of linux/vduse.h. */
struct vf_vduse_iotlb_entry {
	uint64_t offset;
	uint64_t start;
	uint64_t last;
	uint8_t perm;
	uint8_t reserved[7];
};

/* struct vduse_iotlb_entry_v2: from API version 1 on. Address space 0 is the only one that a virtqueue of ours uses. */
struct vf_vduse_iotlb_entry_v2 {
	struct vf_vduse_iotlb_entry v1;
	uint32_t asid;
	uint32_t reserved[11];
};

_Static_assert(sizeof(struct vf_vduse_iotlb_entry) == 32, "linux/vduse.h");
_Static_assert(sizeof(struct vf_vduse_iotlb_entry_v2) == 80, "linux/vduse.h");

struct vf_port {
	/* The first region that overlaps [start, last] into *entry; returns a descriptor, which the caller closes, or -errno. */
	int (*iotlb_get_fd)(struct vf_port *port, uint64_t start, uint64_t last, struct vf_vduse_iotlb_entry *entry);
	/* 0 or -errno. */
	int (*inject_irq)(struct vf_port *port);
	int fd; /* borrowed */
	int irq_fd; /* borrowed */
	uint32_t vq_index;
	uint8_t fetched_whole; /* every page of the region fetched last exists: map it as such */
	int user_memory_fd; /* borrowed */
	uint64_t user_memory_bytes; /* the bytes of it that replace the kernel's bounce pages; 0 = none */
};

/* fd: a copy of the descriptor of /dev/vduse/NAME, which was created under api_version. */
void vf_port_kernel_init(struct vf_port *port, int fd, uint32_t api_version, uint32_t vq_index);

/* From now on the kernel copies data through user memory in place of its bounce pages: fetch the region [0, bytes - 1] as fd,
 * a memfd of that size whose pages exist and stay. 0 bytes: use the kernel's file again. */
void vf_port_kernel_use_memory(struct vf_port *port, int fd, uint64_t bytes);

void vf_port_loopback_init(struct vf_port *port, int fd, int irq_fd, uint32_t vq_index);

/* A port without a transport: every region is entered by hand, interrupts go to irq_fd if it is not negative. */
void vf_port_none_init(struct vf_port *port, int irq_fd);

#endif
