# Mirror of the parts of csrc/driver/ that _driver.pyx uses.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "base/counters.h" nogil:
    enum:
        VF_HIST_BUCKET_COUNT

cdef extern from "driver/crc32c.h" nogil:
    void vf_crc32c_init()
    uint32_t vf_crc32c(uint32_t crc, const void *data, size_t len_bytes)
    uint32_t vf_crc32c_soft(uint32_t crc, const uint8_t *data, size_t len_bytes)

cdef extern from "driver/driver_verify.h" nogil:
    struct vf_block_expect:
        uint64_t offset_bytes
        uint32_t generation
        uint32_t seed
    struct vf_drv_fault:
        uint32_t kind
        uint32_t op
        uint64_t offset_bytes
        uint64_t expected
        uint64_t found
        uint64_t where
    void vf_block_fill(void *block, uint32_t len_bytes, const vf_block_expect *expect)
    int vf_block_check(const void *block, uint32_t len_bytes, const vf_block_expect *want, vf_drv_fault *out)
    void vf_fill_words(void *at, uint64_t key, uint64_t word_count)

cdef extern from "driver/driver_seq.h" nogil:
    struct vf_drv_seq:
        uint64_t seed
    void vf_drv_seq_init(vf_drv_seq *seq, uint32_t order, uint64_t count, uint64_t seed)
    uint64_t vf_drv_seq_next(vf_drv_seq *seq)

cdef extern from "driver/driver_ring.h" nogil:
    struct vf_drv_segment:
        uint64_t iova
        uint32_t len_bytes
        uint32_t writable
    struct vf_drv_desc_state:
        pass
    struct vf_drv_used:
        uint32_t cookie
        uint32_t written_bytes
        uint16_t head
    struct vf_drv_vq:
        uint16_t size
        uint16_t free_count
        uint16_t avail_idx
        uint16_t last_used_idx
    uint16_t vf_drv_vq_inflight(const vf_drv_vq *vq)

cdef extern from "driver/driver_vq.h" nogil:
    struct vf_drv_vq_params:
        void *desc
        void *driver
        void *device
        vf_drv_desc_state *state
        uint32_t size
        uint32_t start
        bint packed
        bint event_idx
        bint in_order
    int vf_drv_vq_init(vf_drv_vq *vq, const vf_drv_vq_params *params)
    int vf_drv_vq_add(vf_drv_vq *vq, const vf_drv_segment *segments, uint32_t count, uint32_t cookie)
    int vf_drv_vq_add_indirect(vf_drv_vq *vq, void *table, uint64_t table_iova, const vf_drv_segment *segments,
                               uint32_t count, uint32_t cookie)
    int vf_drv_vq_publish(vf_drv_vq *vq)
    bint vf_drv_vq_has_used(const vf_drv_vq *vq)
    int vf_drv_vq_reap(vf_drv_vq *vq, vf_drv_used *out, uint32_t max_count)
    void vf_drv_vq_disable_irq(vf_drv_vq *vq)
    uint32_t vf_drv_vq_position(const vf_drv_vq *vq)

cdef extern from "driver/driver_job.h" nogil:
    enum:
        VF_DRV_OP_COUNT
        VF_DRV_SEGMENTS_MAX
        VF_DRV_DATA_SEGMENTS_MAX
        VF_DRV_SLOT_BYTES
        VF_BLOCK_UNKNOWN
        VF_PHASE_CHECK
        VF_PHASE_DONE
    struct vf_drv_stats:
        uint64_t ios
        uint64_t bytes
        uint64_t lat_sum_ns
        uint64_t lat_min_ns
        uint64_t lat_max_ns
        uint64_t *hist
    struct vf_drv_slot:
        pass
    struct vf_drv_job:
        uint32_t id
        uint32_t kind
        uint32_t verify
        uint32_t seed
        uint64_t offset_bytes
        uint64_t block_count
        uint64_t io_limit
        uint32_t block_bytes
        uint32_t depth
        uint32_t read_share
        uint32_t fsync_every
        uint32_t size_max_bytes
        uint32_t segment_count
        uint64_t ramp_ns
        uint64_t runtime_ns
        bint check_after
        bint indirect
        bint moves_no_data
        bint overlap
        uint8_t *slot_va
        uint64_t slot_iova
        uint8_t *data_va
        uint64_t data_iova
        uint64_t data_stride_bytes
        uint8_t *table_va
        uint64_t table_iova
        uint64_t table_stride_bytes
        vf_drv_slot *slots
        uint32_t *free_slots
        uint32_t *blocks
        const uint8_t *pattern
        vf_drv_seq order
        vf_drv_seq read_order
        uint64_t start_ns
        uint64_t measure_ns
        uint64_t end_ns
        uint64_t check_start_ns
        uint64_t check_end_ns
        uint32_t phase
        uint32_t next_queue
        vf_drv_stats *stats
        uint64_t request_errors
        uint64_t verify_errors
        uint64_t verified
        uint32_t fault_count
        vf_drv_fault *faults

cdef extern from "driver/driver_loop.h" nogil:
    enum:
        VF_DRV_QUEUES_MAX
    struct vf_drv_queue:
        vf_drv_vq vq
        uint32_t index
        int kick_fd
        int irq_fd
        uint64_t kicks
        uint64_t irqs
        uint64_t published
        uint64_t batches
        uint64_t gap_max_ns
    struct vf_drv_thread:
        vf_drv_queue **queues
        vf_drv_job **jobs
        uint32_t queue_count
        uint32_t job_count
        uint32_t stop
        uint64_t spin_ns
        uint64_t stall_ns
        uint32_t failed_queue
        uint64_t sleeps
        uint64_t spins
    void vf_drv_queue_kick(vf_drv_queue *queue)
    void vf_drv_queue_publish(vf_drv_queue *queue)
    void vf_drv_queues_sleep(vf_drv_queue **queues, uint32_t count, int timeout_ms)
    int vf_drv_thread_run(vf_drv_thread *thread)

cdef extern from "base/barrier.h" nogil:
    void vf_store_relaxed_u32(uint32_t *p, uint32_t v)
    uint64_t vf_load_relaxed_u64(const uint64_t *p)
    void vf_store_relaxed_u64(uint64_t *p, uint64_t v)
