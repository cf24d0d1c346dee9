/* SPDX-License-Identifier: Apache-2.0
 *
 * A block request between its parsing and its completion, and the virtio-blk layouts (VIRTIO 1.3, 5.2.6).
 */
#ifndef VF_REQUEST_H
#define VF_REQUEST_H

#include <stdint.h>
#include <sys/uio.h>

#include "counters.h"

#define VF_SECTOR_BYTES 512u
#define VF_BLK_ID_BYTES 20u
#define VF_BLK_HEADER_BYTES 16u
#define VF_RANGE_MAX 32u /* segments of a discard or write zeroes request */
#define VF_IOV_MAX 1024u /* of one request; the kernel's limit of one system call */

#define VF_BLK_T_IN 0u
#define VF_BLK_T_OUT 1u
#define VF_BLK_T_FLUSH 4u
#define VF_BLK_T_GET_ID 8u
#define VF_BLK_T_DISCARD 11u
#define VF_BLK_T_WRITE_ZEROES 13u

#define VF_BLK_S_OK 0u
#define VF_BLK_S_IOERR 1u
#define VF_BLK_S_UNSUPP 2u

#define VF_BLK_WRITE_ZEROES_F_UNMAP 1u

struct vf_blk_header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

/* struct virtio_blk_discard_write_zeroes */
struct vf_blk_range {
	uint64_t sector;
	uint32_t num_sectors;
	uint32_t flags;
};

_Static_assert(sizeof(struct vf_blk_header) == VF_BLK_HEADER_BYTES, "VIRTIO 1.3, 5.2.6");
_Static_assert(sizeof(struct vf_blk_range) == 16, "VIRTIO 1.3, 5.2.6");

struct vf_req {
	/* All of these begin as 0, most of them for good: next to each other, which takes two stores. */
	uint8_t op; /* enum vf_op */
	uint8_t unmap; /* write zeroes: deallocating is welcome */
	uint8_t blk_status;
	uint8_t retry_count; /* of transfers that came back empty-handed */
	uint8_t held; /* it has its slot until it is given back: it was in flight */
	uint8_t queued; /* it waits for its turn to be given back: struct vf_queue.fifo */
	uint8_t finished; /* while it does: its turn is all that it waits for */
	uint8_t reserved;
	int32_t result; /* 0 or -errno, once finished */
	uint32_t range_count;
	uint32_t range_at; /* the one the cursor stands for */
	uint32_t stored_bytes; /* put into device-writable memory, from its start, without the status */

	/* What the engine works on: a cursor that moves as bytes do. */
	uint32_t iov_count;
	uint32_t slot_count; /* head, id and slot_count are those of the chain: struct vf_chain */
	uint16_t head;
	uint16_t id;
	uint16_t slot; /* of the table of requests */
	struct iovec *iov;
	uint64_t offset_bytes;
	uint64_t left_bytes;

	/* What the completion needs. */
	uint8_t *status; /* NULL: the chain has no byte for it */
	uint64_t start_ns;
	uint64_t data_bytes; /* asked for; left_bytes at the start */
	uint64_t writable_bytes; /* of the chain, with the status */
	struct iovec *iov_base; /* this slot's VF arrays, set once */
	struct vf_blk_range *ranges;
};

#endif
