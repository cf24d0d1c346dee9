/* SPDX-License-Identifier: Apache-2.0
 *
 * One benchmark job: it chooses the next request, puts it on a vq as Linux's virtio-blk does (header, data, status), and
 * accounts for a finished one in the figures and the verification. One thread owns a job.
 */
#ifndef VF_DRIVER_JOB_H
#define VF_DRIVER_JOB_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/barrier.h"
#include "base/counters.h"
#include "base/virtio_blk.h"
#include "driver/driver_seq.h"
#include "driver/driver_verify.h"
#include "driver/driver_vq.h"

#define VF_DRV_DATA_SEGMENTS_MAX 256u
#define VF_DRV_SEGMENTS_MAX (VF_DRV_DATA_SEGMENTS_MAX + 2u)
#define VF_DRV_FAULTS_KEPT 16u
#define VF_DRV_SLOT_BYTES 64u /* header at 0, discard range at 16, status at 32: one cache line a request */

#define VF_DRV_STATUS_UNSET 0xffu

enum vf_drv_op {
	VF_DRV_READ,
	VF_DRV_WRITE,
	VF_DRV_TRIM,
	VF_DRV_SYNC,
	VF_DRV_CHECK, /* reads of the verification phase */
	VF_DRV_OP_COUNT,
};

enum vf_drv_kind {
	VF_KIND_READ,
	VF_KIND_WRITE,
	VF_KIND_MIXED,
	VF_KIND_TRIM,
};

enum vf_drv_phase {
	VF_PHASE_RUN,
	VF_PHASE_CHECK,
	VF_PHASE_DONE,
};

/* The driver's knowledge of a block: 0 never written (or trimmed), else the generation of the last acknowledged write. */
#define VF_BLOCK_UNKNOWN 0x7fffffffu /* a write failed half-way, or another job trimmed it: it may contain anything */
#define VF_BLOCK_BUSY 0x80000000u /* a request to this block is in flight */

#define VF_DRV_PAIR_SHARE 4u /* of a job with `overlap`: one write in so many is followed by another to its block */
#define VF_DRV_NEIGHBOUR_SHARE 4u /* and one in so many begins where the previous one has ended, so that they may be merged */

struct vf_drv_stats {
	uint64_t ios;
	uint64_t bytes;
	uint64_t lat_sum_ns;
	uint64_t lat_min_ns;
	uint64_t lat_max_ns;
	uint64_t hist[VF_HIST_BUCKET_COUNT];
};

struct vf_drv_slot {
	uint64_t submit_ns;
	uint64_t block;
	uint32_t generation;
	uint32_t op;
	bool superseded; /* another write to the same block was put on the ring after this one */
};

struct vf_drv_job {
	/* the parameters; set once */
	uint32_t id; /* place in its thread's list */
	uint32_t kind;
	uint32_t verify;
	uint32_t seed;
	uint64_t offset_bytes;
	uint64_t block_count;
	uint64_t io_limit; /* requests in all; 0 = until the time is up */
	uint32_t block_bytes;
	uint32_t depth;
	uint32_t read_share; /* of 2^32, for VF_KIND_MIXED */
	uint32_t fsync_every; /* FLUSH after so many writes; 0 = never */
	uint32_t size_max_bytes; /* of one data descriptor */
	uint32_t segment_count; /* descriptors of a request, header and status included */
	uint64_t ramp_ns;
	uint64_t runtime_ns; /* 0 = no limit */
	bool check_after; /* read back and verify what was written */
	bool indirect;
	bool moves_no_data; /* a null store: reads report that nothing was written */
	bool overlap; /* some writes are followed by another to the same block at once: the device must keep their order */
	/* request memory; borrowed */
	uint8_t *slot_va;
	uint64_t slot_iova;
	uint8_t *data_va;
	uint64_t data_iova;
	uint64_t data_stride_bytes;
	uint8_t *table_va;
	uint64_t table_iova;
	uint64_t table_stride_bytes;
	/* private tables; borrowed */
	struct vf_drv_slot *slots;
	uint32_t *free_slots; /* a stack: the buffer used next is the one just finished */
	uint32_t *blocks; /* block_count entries when verifying, else null */
	const uint8_t *pattern; /* one block, for VF_VERIFY_PATTERN */
	/* state */
	struct vf_drv_seq order;
	struct vf_drv_seq read_order; /* of a verifying mix: otherwise no read would hit a written block in the first pass */
	uint64_t random;
	uint64_t start_ns;
	uint64_t measure_ns; /* start of measuring: after the ramp */
	uint64_t end_ns;
	uint64_t check_start_ns;
	uint64_t check_end_ns;
	uint64_t issued;
	uint64_t check_cursor;
	uint64_t held_block;
	uint64_t last_block; /* of a write */
	uint32_t free_count;
	uint32_t phase;
	uint32_t generation;
	uint32_t writes_until_fsync;
	uint32_t next_queue;
	uint32_t held_op;
	uint32_t pair_slot; /* of the first write of a pair */
	bool pair_due; /* its second one is to be issued next */
	bool held; /* a request waits for an earlier one to the same block */
	bool fsync_due;
	bool issue_done;
	bool ramping;
	/* results */
	struct vf_drv_stats stats[VF_DRV_OP_COUNT];
	uint64_t request_errors;
	uint64_t verify_errors;
	uint64_t verified; /* blocks compared, at once and in the verification phase */
	uint32_t fault_count; /* kept ones */
	struct vf_drv_fault faults[VF_DRV_FAULTS_KEPT];
};

/* Begin a run. Blocks written by earlier runs of the job are still known, and read back with those of this run. */
static inline void vf_drv_job_start(struct vf_drv_job *job, uint64_t now_ns)
{
	for (uint32_t i = 0; i < job->depth; i++)
		job->free_slots[i] = job->depth - 1u - i;
	job->free_count = job->depth;
	job->writes_until_fsync = job->fsync_every;
	job->issued = job->check_cursor = 0;
	job->fault_count = 0; /* the kept ones are of this run; the counters continue */
	job->held = job->fsync_due = job->pair_due = job->issue_done = false;
	if (!job->random)
		job->random = vf_mix64(job->order.seed + 0x9e37u) | 1;
	job->start_ns = job->measure_ns = job->end_ns = now_ns;
	job->ramping = job->ramp_ns != 0;
	job->phase = VF_PHASE_RUN;
	for (uint32_t op = 0; op < VF_DRV_OP_COUNT; op++)
		if (!job->stats[op].ios)
			job->stats[op].lat_min_ns = UINT64_MAX;
}

static inline uint32_t vf_drv_job_inflight(const struct vf_drv_job *job)
{
	return job->depth - job->free_count;
}

static inline void vf_drv_job_fault(struct vf_drv_job *job, const struct vf_drv_fault *fault)
{
	if (fault->kind == VF_FAULT_STATUS || fault->kind == VF_FAULT_USED_LEN)
		job->request_errors++;
	else
		job->verify_errors++;
	if (job->fault_count < VF_DRV_FAULTS_KEPT)
		job->faults[job->fault_count++] = *fault;
}

/* The next block to read back: one whose content is known. Returns 0 when there is none left. */
static inline int vf_drv_job_choose_check(struct vf_drv_job *job, uint32_t *op, uint64_t *block)
{
	while (job->check_cursor < job->block_count) {
		uint64_t at = job->check_cursor++;
		if (job->blocks[at] && job->blocks[at] != VF_BLOCK_UNKNOWN) {
			*op = VF_DRV_CHECK;
			*block = at;
			return 1;
		}
	}
	job->issue_done = true;
	return 0;
}

static inline uint32_t vf_drv_job_choose_op(struct vf_drv_job *job)
{
	switch (job->kind) {
	case VF_KIND_READ:
		return VF_DRV_READ;
	case VF_KIND_WRITE:
		return VF_DRV_WRITE;
	case VF_KIND_TRIM:
		return VF_DRV_TRIM;
	default:
		return (uint32_t)(vf_random64(&job->random) >> 32) < job->read_share ? VF_DRV_READ : VF_DRV_WRITE;
	}
}

/* Whether the next write of a job with `overlap` is to the block after that of the last one. */
static inline bool vf_drv_job_goes_on(struct vf_drv_job *job)
{
	return job->overlap && job->last_block + 1u < job->block_count &&
	       vf_random64(&job->random) >> 32 < UINT32_MAX / VF_DRV_NEIGHBOUR_SHARE;
}

/* Decide on the next request. Returns 1, or 0 when there is none to issue now. */
static inline int vf_drv_job_choose(struct vf_drv_job *job, uint32_t *op, uint64_t *block)
{
	if (job->phase == VF_PHASE_CHECK)
		return vf_drv_job_choose_check(job, op, block);
	if (job->pair_due) {
		*op = VF_DRV_WRITE;
		*block = job->slots[job->pair_slot].block;
		job->issued++;
		return 1;
	}
	if (job->fsync_due) {
		job->fsync_due = false;
		*op = VF_DRV_SYNC;
		*block = 0;
		return 1;
	}
	if (job->held) {
		*op = job->held_op;
		*block = job->held_block;
	} else {
		if (job->io_limit && job->issued == job->io_limit) {
			job->issue_done = true;
			return 0;
		}
		*op = vf_drv_job_choose_op(job);
		bool apart = job->verify && job->kind == VF_KIND_MIXED && *op == VF_DRV_READ;
		if (*op == VF_DRV_WRITE && vf_drv_job_goes_on(job))
			*block = job->last_block + 1u;
		else
			*block = vf_drv_seq_next(apart ? &job->read_order : &job->order);
		job->issued++;
	}
	/* Two requests to one block may be served in any order, so its content would be unknown. */
	job->held = job->blocks && (job->blocks[*block] & VF_BLOCK_BUSY);
	if (job->held) {
		job->held_op = *op;
		job->held_block = *block;
		return 0;
	}
	return 1;
}

static inline uint64_t vf_drv_job_offset(const struct vf_drv_job *job, uint64_t block)
{
	return job->offset_bytes + block * job->block_bytes;
}

/* Fill the data of a write, and note in the table of blocks that a request is on its way. */
static inline void vf_drv_job_prepare(struct vf_drv_job *job, struct vf_drv_slot *slot, uint8_t *data)
{
	if (!job->blocks || slot->op == VF_DRV_SYNC)
		return;
	uint32_t *known = &job->blocks[slot->block];
	if (slot->op == VF_DRV_WRITE) {
		/* 2^31 - 2 generations, then from 1 again: never 0 or UNKNOWN. */
		job->generation = job->generation + 1u < VF_BLOCK_UNKNOWN ? job->generation + 1u : 1u;
		slot->generation = job->generation;
		if (job->verify == VF_VERIFY_CRC32C) {
			struct vf_block_expect is = { vf_drv_job_offset(job, slot->block), slot->generation, job->seed };
			vf_block_fill(data, job->block_bytes, &is);
		} else {
			memcpy(data, job->pattern, job->block_bytes);
		}
	} else {
		slot->generation = *known;
		/* Data of an earlier request in the buffer must not pass for the data read. */
		if (slot->op != VF_DRV_TRIM && job->verify == VF_VERIFY_PATTERN)
			for (uint32_t i = 0; i < job->block_bytes; i++)
				data[i] = (uint8_t)~job->pattern[i];
		else if (slot->op != VF_DRV_TRIM)
			memset(data, 0xa5, job->block_bytes);
	}
	*known |= VF_BLOCK_BUSY;
}

/* The rare shapes: no data, ranges, data in several segments, an indirect table. */
static inline void vf_drv_job_enqueue_any(struct vf_drv_job *job, struct vf_drv_vq *vq, uint32_t index, uint64_t line_iova,
					  uint64_t sector)
{
	const struct vf_drv_slot *slot = &job->slots[index];
	uint8_t *line = job->slot_va + (uint64_t)index * VF_DRV_SLOT_BYTES;
	uint32_t cookie = job->id << 16 | index;
	struct vf_drv_segment segments[VF_DRV_SEGMENTS_MAX];
	uint32_t count = 0;

	segments[count++] = (struct vf_drv_segment){ line_iova, sizeof(struct vf_blk_header), 0 };
	if (slot->op == VF_DRV_TRIM) {
		*(struct vf_blk_range *)(line + 16) = (struct vf_blk_range){ sector, job->block_bytes / VF_SECTOR_BYTES, 0 };
		segments[count++] = (struct vf_drv_segment){ line_iova + 16, sizeof(struct vf_blk_range), 0 };
	} else if (slot->op != VF_DRV_SYNC) {
		uint64_t iova = job->data_iova + index * job->data_stride_bytes;
		uint32_t left = job->block_bytes, writable = slot->op != VF_DRV_WRITE;
		while (left > job->size_max_bytes) {
			segments[count++] = (struct vf_drv_segment){ iova, job->size_max_bytes, writable };
			iova += job->size_max_bytes;
			left -= job->size_max_bytes;
		}
		segments[count++] = (struct vf_drv_segment){ iova, left, writable };
	}
	segments[count++] = (struct vf_drv_segment){ line_iova + 32, 1, 1 };
	if (job->indirect) {
		uint64_t at = index * job->table_stride_bytes;
		vf_drv_vq_add_indirect(vq, job->table_va + at, job->table_iova + at, segments, count, cookie);
	} else {
		vf_drv_vq_add(vq, segments, count, cookie);
	}
}

/* Put header, data and status on the vq. The caller has checked that there is room. */
static inline void vf_drv_job_enqueue(struct vf_drv_job *job, struct vf_drv_vq *vq, uint32_t index)
{
	static const uint32_t types[VF_DRV_OP_COUNT] = { VF_BLK_T_IN, VF_BLK_T_OUT, VF_BLK_T_DISCARD, VF_BLK_T_FLUSH, VF_BLK_T_IN };
	const struct vf_drv_slot *slot = &job->slots[index];
	uint8_t *line = job->slot_va + (uint64_t)index * VF_DRV_SLOT_BYTES;
	uint64_t line_iova = job->slot_iova + (uint64_t)index * VF_DRV_SLOT_BYTES;
	uint64_t sector = vf_drv_job_offset(job, slot->block) / VF_SECTOR_BYTES;
	bool plain = slot->op != VF_DRV_TRIM && slot->op != VF_DRV_SYNC; /* the others' header names no sector */

	*(struct vf_blk_header *)line = (struct vf_blk_header){ types[slot->op], 0, plain ? sector : 0 };
	vf_store_relaxed_u8(line + 32, VF_DRV_STATUS_UNSET);
	if (vf_likely(plain && !job->indirect && job->block_bytes <= job->size_max_bytes)) {
		struct vf_drv_three three = {
			.header_iova = line_iova,
			.data_iova = job->data_iova + index * job->data_stride_bytes,
			.status_iova = line_iova + 32,
			.header_bytes = sizeof(struct vf_blk_header),
			.data_bytes = job->block_bytes,
			.data_flags = slot->op != VF_DRV_WRITE ? VF_DESC_F_WRITE : 0,
		};
		vf_drv_vq_add_three(vq, &three, job->id << 16 | index);
	} else {
		vf_drv_job_enqueue_any(job, vq, index, line_iova, sector);
	}
}

/* Note that slot `index` got a write: either it is the second of a pair, whose first then says nothing about the block any
 * more, or it may become the first of one. */
static inline void vf_drv_job_pair(struct vf_drv_job *job, uint32_t index)
{
	if (job->pair_due)
		job->slots[job->pair_slot].superseded = true;
	job->pair_due = !job->pair_due && job->overlap && vf_random64(&job->random) >> 32 < UINT32_MAX / VF_DRV_PAIR_SHARE;
	job->pair_slot = index;
}

/* Issue one request on `vq`. Returns 1, or 0 when there is none to issue now. */
static inline int vf_drv_job_submit(struct vf_drv_job *job, struct vf_drv_vq *vq, uint64_t now_ns)
{
	uint32_t op;
	uint64_t block;
	if (!vf_drv_job_choose(job, &op, &block))
		return 0;
	uint32_t index = job->free_slots[--job->free_count];
	struct vf_drv_slot *slot = &job->slots[index];
	slot->submit_ns = now_ns;
	slot->block = block;
	slot->op = op;
	slot->superseded = false;
	if (op == VF_DRV_WRITE) {
		job->last_block = block;
		vf_drv_job_pair(job, index);
	}
	vf_drv_job_prepare(job, slot, job->data_va + index * job->data_stride_bytes);
	vf_drv_job_enqueue(job, vq, index);
	if (op == VF_DRV_WRITE && job->fsync_every && --job->writes_until_fsync == 0) {
		job->writes_until_fsync = job->fsync_every;
		job->fsync_due = true;
	}
	return 1;
}

/* Compare the data read with the table of blocks. */
static inline void vf_drv_job_verify(struct vf_drv_job *job, const struct vf_drv_slot *slot, const uint8_t *data)
{
	bool from_earlier = job->kind == VF_KIND_READ;
	if (slot->generation == VF_BLOCK_UNKNOWN || (slot->generation == 0 && !from_earlier))
		return;
	struct vf_drv_fault fault = { .op = slot->op, .offset_bytes = vf_drv_job_offset(job, slot->block) };
	int rc;
	job->verified++;
	if (job->verify == VF_VERIFY_CRC32C) {
		struct vf_block_expect want = { fault.offset_bytes, slot->generation, job->seed };
		rc = vf_block_check(data, job->block_bytes, &want, &fault);
	} else {
		rc = vf_pattern_check(data, job->pattern, job->block_bytes, &fault);
	}
	if (rc)
		vf_drv_job_fault(job, &fault);
}

/* Returns true when status byte and used.len are right; records the fault otherwise. */
static inline bool vf_drv_job_answered_well(struct vf_drv_job *job, const struct vf_drv_slot *slot, uint32_t status,
					    uint32_t written_bytes)
{
	bool reads = slot->op == VF_DRV_READ || slot->op == VF_DRV_CHECK;
	uint32_t expected = reads ? job->block_bytes + 1u : 1u;
	if (vf_likely(status == 0 && (written_bytes == expected || (written_bytes == 0 && job->moves_no_data))))
		return true;
	struct vf_drv_fault fault = { .op = slot->op, .offset_bytes = vf_drv_job_offset(job, slot->block) };
	if (status)
		vf_fault_set(&fault, VF_FAULT_STATUS, 0, status);
	else
		vf_fault_set(&fault, VF_FAULT_USED_LEN, expected, written_bytes);
	vf_drv_job_fault(job, &fault);
	return false;
}

static inline void vf_drv_stats_add(struct vf_drv_stats *stats, uint64_t lat_ns, uint32_t bytes)
{
	stats->ios++;
	stats->bytes += bytes;
	stats->lat_sum_ns += lat_ns;
	if (lat_ns < stats->lat_min_ns)
		stats->lat_min_ns = lat_ns;
	if (lat_ns > stats->lat_max_ns)
		stats->lat_max_ns = lat_ns;
	stats->hist[vf_hist_bucket(lat_ns)]++;
}

static inline void vf_drv_job_prefetch(const struct vf_drv_job *job, uint32_t index)
{
	__builtin_prefetch(job->slot_va + (uint64_t)index * VF_DRV_SLOT_BYTES, 1);
}

/* Account for a finished request and free its slot. */
static inline void vf_drv_job_complete(struct vf_drv_job *job, uint32_t index, uint32_t written_bytes, uint64_t now_ns)
{
	struct vf_drv_slot *slot = &job->slots[index];
	uint32_t status = job->slot_va[(uint64_t)index * VF_DRV_SLOT_BYTES + 32];
	bool good = vf_drv_job_answered_well(job, slot, status, written_bytes);
	uint32_t bytes = slot->op == VF_DRV_SYNC ? 0 : job->block_bytes;
	if (good)
		vf_drv_stats_add(&job->stats[slot->op], now_ns - slot->submit_ns, bytes);
	if (job->pair_due && job->pair_slot == index)
		job->pair_due = false;
	if (job->blocks && slot->op != VF_DRV_SYNC && !slot->superseded) {
		uint32_t known = slot->generation;
		if (slot->op == VF_DRV_TRIM)
			known = good ? 0 : VF_BLOCK_UNKNOWN;
		else if (slot->op == VF_DRV_WRITE)
			known = good ? slot->generation : VF_BLOCK_UNKNOWN;
		else if (good)
			vf_drv_job_verify(job, slot, job->data_va + index * job->data_stride_bytes);
		job->blocks[slot->block] = known;
	}
	job->free_slots[job->free_count++] = index;
}

/* Reset the counters of the ramp. */
static inline void vf_drv_job_end_ramp(struct vf_drv_job *job, uint64_t now_ns)
{
	for (uint32_t op = 0; op < VF_DRV_OP_COUNT; op++) {
		memset(&job->stats[op], 0, sizeof(job->stats[op]));
		job->stats[op].lat_min_ns = UINT64_MAX;
	}
	job->measure_ns = now_ns;
	job->ramping = false;
}

/* Go to the next phase when it is time: ramp, end of the run, verification, done. */
static inline void vf_drv_job_advance(struct vf_drv_job *job, uint64_t now_ns, bool stopping)
{
	if (job->ramping && now_ns - job->start_ns >= job->ramp_ns)
		vf_drv_job_end_ramp(job, now_ns);
	if (stopping)
		job->issue_done = true;
	if (job->phase == VF_PHASE_RUN && job->runtime_ns && now_ns - job->start_ns >= job->ramp_ns + job->runtime_ns)
		job->issue_done = true;
	if (!job->issue_done || vf_drv_job_inflight(job))
		return;
	if (job->phase == VF_PHASE_RUN) {
		job->end_ns = job->check_start_ns = job->check_end_ns = now_ns;
		job->phase = job->check_after && job->blocks && !stopping ? VF_PHASE_CHECK : VF_PHASE_DONE;
		job->issue_done = job->phase == VF_PHASE_DONE;
		job->held = job->fsync_due = false;
	} else if (job->phase == VF_PHASE_CHECK) {
		job->check_end_ns = now_ns;
		job->phase = VF_PHASE_DONE;
	}
}

#endif
