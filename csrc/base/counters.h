/* SPDX-License-Identifier: Apache-2.0
 *
 * The shared pages of a device: one file, mapped by the supervisor (to read, and to ring the control word) and by each
 * worker (to write its own queue's block). vdusefast/state/shared_pages.py holds the same layout as NumPy dtypes; a test compares them.
 *
 * The header takes a page of its own, and each queue's block whole pages: a worker maps its block apart (page.h).
 *
 * Every field has one writer, but for vf_shm_header.flush_failure, is naturally aligned and is read without locks: a reader sees
 * each counter whole, and two counters may be one batch apart.
 */
#ifndef VF_COUNTERS_H
#define VF_COUNTERS_H

#include <stdint.h>

#define VF_SHM_MAGIC "VDUSFAST"
#define VF_SHM_VERSION 3u

/* Log-linear histogram: values below 2^5 ns have a bucket each, every further power of two has 2^5. */
#define VF_HIST_SUB_BITS 5u
#define VF_HIST_SUB_COUNT (1u << VF_HIST_SUB_BITS)
#define VF_HIST_MAX_BITS 40u /* 2^40 ns = 18 minutes; longer ones count in the last bucket */
#define VF_HIST_BUCKET_COUNT ((VF_HIST_MAX_BITS - VF_HIST_SUB_BITS + 1u) * VF_HIST_SUB_COUNT)

enum vf_op {
	VF_OP_READ,
	VF_OP_WRITE,
	VF_OP_FLUSH,
	VF_OP_DISCARD,
	VF_OP_WRITE_ZEROES,
	VF_OP_GET_ID,
	VF_OP_OTHER, /* unsupported types and requests too malformed to have one */
	VF_OP_COUNT,
};

enum vf_queue_state {
	VF_QUEUE_STOPPED,
	VF_QUEUE_RUNNING,
	VF_QUEUE_QUIESCING,
	VF_QUEUE_FAILED,
};

struct vf_shm_header {
	char magic[8];
	uint32_t version;
	uint32_t header_bytes;
	uint32_t queue_count;
	uint32_t queue_size; /* as offered to the driver */
	uint32_t queue_stride_bytes;
	uint32_t counters_offset; /* from the start of a queue's block, as the next two */
	uint32_t hist_offset;
	uint32_t inflight_offset;
	uint32_t hist_bucket_count;
	uint32_t op_count;
	uint64_t created_ns; /* CLOCK_REALTIME */
	char name[64];
	/* Why every flush fails: errno in the low 16 bits, since when in seconds of CLOCK_REALTIME above. 0 = none. Set once by
	 * the queue that meets the first failure, cleared by the supervisor for an operator. See flush.h. */
	uint64_t flush_failure;
};

/* One queue's block starts with this line, which only the supervisor writes. */
struct vf_shm_ctl {
	uint32_t ctl_seq; /* one more for each control message sent */
	uint32_t reserved[15];
};

/* The worker writes this line at each change of state. */
struct vf_shm_status {
	uint32_t state; /* enum vf_queue_state */
	uint32_t pid;
	int32_t cpu; /* pinned to; -1 = not pinned */
	uint32_t fail_reason; /* enum vf_ring_error, 0 = none */
	uint32_t last_avail_idx;
	uint32_t last_used_idx;
	uint32_t inflight_count;
	uint32_t flushing; /* flushes submitted to the store and without a result */
	uint32_t reserved[8];
};

struct vf_op_counters {
	uint64_t requests;
	uint64_t bytes; /* of data moved; for discard and write zeroes, of the ranges */
	uint64_t errors;
};

struct vf_counters {
	uint64_t requests; /* completed, of any kind */
	uint64_t batches; /* times the used index was published */
	uint64_t kicks; /* sum of the kick eventfd: how often the driver kicked */
	uint64_t irqs; /* interrupts sent */
	uint64_t irqs_suppressed; /* publications for which the driver wanted none */
	uint64_t spins; /* idle periods that ended in a request while spinning */
	uint64_t sleeps; /* idle periods that went to sleep */
	uint64_t relooks; /* sleeps ended by the timer that found work: kicks that were lost */
	uint64_t iotlb_misses; /* regions fetched through the transport */
	uint64_t bad_requests; /* completed with IOERR because of the driver */
	uint64_t unsupported; /* completed with UNSUPP */
	uint64_t host_errors; /* completed with IOERR because of the store */
	uint64_t host_enospc; /* of these: ENOSPC, EDQUOT */
	uint64_t host_eio; /* of these: EIO */
	uint64_t last_host_errno;
	uint64_t ring_errors; /* times the ring was found bad */
	uint64_t memory_faults; /* vanished pages of mapped memory (SIGBUS) */
	uint64_t invalidations;
	struct vf_op_counters op[VF_OP_COUNT];
};

struct vf_hist {
	uint64_t bucket[VF_OP_COUNT][VF_HIST_BUCKET_COUNT];
};

/* The bucket that counts `ns`. The shift is below 64 because value has its top bit at VF_HIST_SUB_BITS or above. */
static inline uint32_t vf_hist_bucket(uint64_t ns)
{
	if (ns < VF_HIST_SUB_COUNT)
		return (uint32_t)ns;
	if (ns >= (1ull << VF_HIST_MAX_BITS))
		return VF_HIST_BUCKET_COUNT - 1u;
	uint32_t msb = 63u - (uint32_t)__builtin_clzll(ns);
	uint32_t shift = msb - VF_HIST_SUB_BITS;
	return (shift + 1u) * VF_HIST_SUB_COUNT + (uint32_t)((ns >> shift) - VF_HIST_SUB_COUNT);
}

#endif
