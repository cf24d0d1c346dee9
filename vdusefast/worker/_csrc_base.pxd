"""As _csrc.pxd, of the headers below the engines: shared memory, counters, the in-flight log, virtio-blk."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "base/barrier.h" nogil:
    bint vf_likely(bint)
    bint vf_unlikely(bint)
    uint32_t vf_load_acquire_u32(const uint32_t *)
    bint vf_exchange_if_u32(uint32_t *, uint32_t, uint32_t)
    uint32_t vf_load_relaxed_u32(const uint32_t *)
    uint32_t vf_peek_u32(const uint32_t *)
    void vf_store_relaxed_u8(uint8_t *, uint8_t)
    void vf_store_relaxed_u32(uint32_t *, uint32_t)
    void vf_store_relaxed_u64(uint64_t *, uint64_t)
    void vf_store_release_u32(uint32_t *, uint32_t)
    void vf_fence_full()
    void vf_fence_compiler()
    void vf_copy_from_shared(void *, const void *, size_t)
    void vf_copy_to_shared(void *, const void *, size_t)
    void vf_cpu_relax()

cdef extern from "base/counters.h" nogil:
    enum:
        VF_SHM_VERSION
        VF_HIST_SUB_BITS
        VF_HIST_MAX_BITS
        VF_HIST_BUCKET_COUNT
        VF_OP_READ
        VF_OP_WRITE
        VF_OP_FLUSH
        VF_OP_DISCARD
        VF_OP_WRITE_ZEROES
        VF_OP_GET_ID
        VF_OP_OTHER
        VF_OP_COUNT
        VF_QUEUE_STOPPED
        VF_QUEUE_RUNNING
        VF_QUEUE_QUIESCING
        VF_QUEUE_FAILED
    struct vf_shm_header
    struct vf_shm_ctl:
        uint32_t ctl_seq
    struct vf_shm_status:
        uint32_t state
        uint32_t pid
        int32_t cpu
        uint32_t fail_reason
        uint32_t last_avail_idx
        uint32_t last_used_idx
        uint32_t inflight_count
    struct vf_op_counters:
        uint64_t requests
        uint64_t bytes
        uint64_t errors
    struct vf_counters:
        uint64_t requests
        uint64_t batches
        uint64_t kicks
        uint64_t irqs
        uint64_t irqs_suppressed
        uint64_t spins
        uint64_t sleeps
        uint64_t relooks
        uint64_t iotlb_misses
        uint64_t bad_requests
        uint64_t unsupported
        uint64_t host_errors
        uint64_t host_enospc
        uint64_t host_eio
        uint64_t last_host_errno
        uint64_t ring_errors
        uint64_t memory_faults
        uint64_t invalidations
        vf_op_counters op[7]
    struct vf_hist:
        uint64_t bucket[7][1152]
    uint32_t vf_hist_bucket(uint64_t ns)

cdef extern from "ring/inflight.h" nogil:
    enum:
        VF_LOG_DEATHS_MAX
        VF_LOG_HOPELESS
        VF_LOG_VOID
        VF_LOG_SPLIT
        VF_LOG_PACKED
        VF_LOG_SPLIT_IN_ORDER
    struct vf_inflight_header:
        uint32_t state
        uint32_t last_used_idx
        uint32_t working
    struct vf_inflight_entry:
        uint64_t order
        uint32_t deaths
    void vf_log_set(vf_inflight_entry *, uint64_t)
    void vf_log_take(vf_inflight_entry *, uint64_t)
    void vf_log_note(vf_inflight_header *, uint16_t, uint16_t)
    void vf_log_work(vf_inflight_header *, uint32_t)
    void vf_log_begin(vf_inflight_header *, vf_inflight_entry *, uint32_t, int, uint16_t, uint16_t)

cdef extern from "base/seed_fault.h" nogil:
    enum:
        VF_SEED_FAULT
        VF_SEED_FORGET
        VF_SEED_WRITE_EARLY
        VF_SEED_REPEAT
    void vf_seed_pause(int)
    bint vf_seed_forgets(uint64_t)
    bint vf_seed_answers_early(uint32_t)
    bint vf_seed_repeats()
    void vf_seed_die(uint32_t, uint64_t)

cdef extern from "base/virtio_blk.h" nogil:
    enum:
        VF_SECTOR_BYTES
        VF_BLK_F_FLUSH
        VF_BLK_F_DISCARD
        VF_BLK_F_WRITE_ZEROES
        VF_BLK_ID_BYTES
        VF_BLK_HEADER_BYTES
        VF_BLK_T_IN
        VF_BLK_T_OUT
        VF_BLK_T_FLUSH
        VF_BLK_T_GET_ID
        VF_BLK_T_DISCARD
        VF_BLK_T_WRITE_ZEROES
        VF_BLK_S_OK
        VF_BLK_S_IOERR
        VF_BLK_S_UNSUPP
        VF_BLK_WRITE_ZEROES_F_UNMAP
    struct vf_blk_header:
        uint32_t type
        uint32_t reserved
        uint64_t sector
    struct vf_blk_range:
        uint64_t sector
        uint32_t num_sectors
        uint32_t flags
    bint vf_has_feature(uint64_t, unsigned int)
