/* SPDX-License-Identifier: Apache-2.0
 *
 * A block request between its parsing and its completion.
 */
#ifndef VF_REQUEST_H
#define VF_REQUEST_H

#include <stdint.h>
#include <sys/uio.h>

#include "base/counters.h"
#include "base/virtio_blk.h"

#define VF_DATA_BYTES_MAX (UINT32_MAX - VF_SECTOR_BYTES) /* with the status it must fit into a used element's 32-bit length */
#define VF_RANGE_MAX 32u /* segments of a discard or write zeroes request */
#define VF_IOV_MAX 1024u /* of one request; the kernel's limit of one system call */

struct vf_req {
	/* All of these begin as 0, most of them for good: next to each other, which takes two stores. */
	uint8_t op; /* enum vf_op */
	uint8_t unmap; /* write zeroes: deallocating is welcome */
	uint8_t blk_status;
	uint8_t retry_count; /* of transfers that came back empty-handed */
	uint8_t held; /* it has its slot until it is completed: it was in flight */
	uint8_t queued; /* it waits for its turn in the order of completion: struct vf_queue.fifo */
	uint8_t finished; /* while it does: its turn is all that it waits for */
	uint8_t refused; /* by the ring: it is carried out by hand */
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
	uint64_t piece_bytes; /* of a range in a ring: the piece that is in flight */
};

#endif
