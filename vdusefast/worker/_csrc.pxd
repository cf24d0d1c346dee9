"""Mirror of the headers in csrc, limited to the names that the Cython code uses."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from vdusefast.worker._csrc_base cimport *

cdef extern from "engine/publisher.h" nogil:
    struct vf_publisher:
        uint32_t tick
        uint32_t slow_ticks
    int vf_publisher_start(vf_publisher *, int (*)(void *) noexcept nogil, void *)
    void vf_publisher_note_round(vf_publisher *)
    void vf_call_begin(vf_publisher *)
    void vf_call_end(vf_publisher *)

cdef extern from "engine/request.h" nogil:
    struct vf_req:
        uint8_t op
        uint8_t unmap
        uint8_t blk_status
        uint8_t retry_count
        uint16_t head
        uint16_t slot
        uint16_t id
        uint8_t held
        uint8_t queued
        uint8_t finished
        uint8_t refused
        uint32_t slot_count
        uint32_t iov_count
        int32_t result
        iovec *iov
        uint64_t offset_bytes
        uint64_t left_bytes
        uint8_t *status
        uint64_t start_ns
        uint64_t data_bytes
        uint64_t writable_bytes
        uint32_t range_count
        uint32_t range_at
        uint32_t stored_bytes
        iovec *iov_base
        vf_blk_range *ranges

cdef extern from "engine/store_map.h" nogil:
    struct vf_store_map:
        uint8_t *base

cdef extern from "engine/pieces.h" nogil:
    struct vf_pieces:
        uint64_t unit_bytes
        uint64_t offset_bytes

cdef extern from "engine/store.h" nogil:
    enum vf_store_kind:
        VF_STORE_FILE
        VF_STORE_BLOCKDEV
        VF_STORE_MEMORY
        VF_STORE_NULL
        VF_STORE_PLUGIN
    enum vf_store_cache:
        VF_CACHE_WRITEBACK
        VF_CACHE_WRITETHROUGH
        VF_CACHE_NONE
        VF_CACHE_UNSAFE
    struct vf_store:
        int fd
        vf_store_kind kind
        vf_store_cache cache
        int witness_fd
        uint32_t direct_align
        uint32_t granule
        uint8_t emulates
        int lock_fd
        uint64_t size_bytes
        int write_flags
        int hold_fds[2]
        uint32_t hold_count
        uint8_t sqpoll
        uint8_t merge
        vf_pieces pieces
        vf_publisher *publisher
        uint8_t map_reads
        vf_store_map read_map
    void vf_store_resize(vf_store *, uint64_t)
    void vf_store_unlock_memory(const vf_store *)

cdef extern from "engine/engine.h" nogil:
    struct vf_engine
    struct vf_mapping
    struct vf_merge:
        uint32_t done_count
    const uint32_t VF_ENGINE_ABI
    const char *VF_ENGINE_CAPSULE
    const uint32_t VF_READABLE_EVENTS
    struct vf_engine_ops:
        const char *name
        int (*open)(vf_engine *, uint32_t) noexcept nogil
        int (*submit)(vf_engine *, vf_req *) noexcept nogil
        void (*flush)(vf_engine *) noexcept nogil
        uint32_t (*reap)(vf_engine *, vf_req **, uint32_t) noexcept nogil
        void (*wait)(vf_engine *) noexcept nogil
        int (*sleep)(vf_engine *, const int *, uint32_t, int) noexcept nogil
        void (*close)(vf_engine *) noexcept nogil
        void (*region)(vf_engine *, void *, size_t, const vf_mapping *) noexcept nogil
        int (*zero_pages)(vf_engine *, uintptr_t) noexcept nogil
        uint32_t publish_batch
        uint8_t blocks
        uint8_t instant
        uint8_t stores
    struct vf_engine:
        const vf_engine_ops *ops
        vf_store store
        vf_merge *merge
        uint32_t inflight_count
        uint32_t readable
        uint8_t replaying
        uint8_t marks_replays
        uint8_t always
        void *state
        void *context
    struct vf_engine_plugin:
        uint32_t abi
        uint32_t engine_bytes
        uint32_t req_bytes
        const vf_engine_ops *ops
        void *context
    const vf_engine_ops *vf_engine_find(const char *)
    const vf_engine_ops vf_engine_uring
    void vf_uring_fixed(const vf_engine *, uint64_t *, int *)
    const vf_engine_ops vf_engine_null
    int vf_engine_open(vf_engine *, const vf_engine_ops *, const vf_store *, uint32_t)
    int vf_engine_open_plugin(vf_engine *, const vf_engine_plugin *, const vf_store *, uint32_t)

cdef extern from "engine/merge.h" nogil:
    bint vf_merge_has_done(const vf_engine *)
    uint32_t vf_merge_reap(vf_engine *, vf_req **, uint32_t)

cdef extern from "engine/faulty.h" nogil:
    enum:
        VF_FAULT_MAX
        VF_FAULT_PATH_BYTES
    struct vf_fault:
        uint32_t ops
        int32_t err
        uint64_t delay_ns
        uint64_t start
        uint64_t last
        uint64_t skip
        uint64_t every
        uint64_t limit
        uint32_t chance
        char path[256]
    struct vf_faulty
    vf_faulty *vf_faulty_new(const vf_fault *, uint32_t, uint64_t, uint32_t)
    vf_engine *vf_faulty_inner(vf_faulty *)
    void vf_faulty_attach(vf_engine *, vf_faulty *)
    void vf_faulty_free(vf_faulty *)

cdef extern from "memory/port.h" nogil:
    struct vf_port:
        int (*inject_irq)(vf_port *) noexcept nogil
    void vf_port_kernel_init(vf_port *, int, uint32_t, uint32_t)
    void vf_port_kernel_use_memory(vf_port *, int, uint64_t)
    void vf_port_loopback_init(vf_port *, int, int, uint32_t)
    void vf_port_none_init(vf_port *, int)

cdef extern from "memory/iotlb.h" nogil:
    struct vf_mapping:
        int fd
        int prot
        uint64_t offset_bytes
    enum:
        VF_PERM_RO
        VF_PERM_WO
        VF_PERM_RW
    struct vf_iotlb_region:
        uint64_t start
        uint64_t last
        uint32_t perm
    struct vf_iotlb:
        uint8_t has_windows
        uint32_t region_count
        uint32_t region_limit
        uint64_t miss_count
        vf_iotlb_region region[1024]
    int vf_iotlb_map(vf_iotlb *, uint64_t, uint64_t, uint32_t, int, uint64_t)
    uint32_t vf_iotlb_drop(vf_iotlb *, uint64_t, uint64_t)
    void *vf_iotlb_translate(vf_iotlb *, uint64_t, uint32_t, uint32_t, uint32_t *)
    int vf_iotlb_copy_from(vf_iotlb *, uint64_t, void *, size_t)

cdef extern from "ring/vring_format.h" nogil:
    enum:
        VF_QUEUE_SIZE_MAX
        VF_RING_OK
        VF_RING_AVAIL_OVERRUN
        VF_RING_HEAD_RANGE
        VF_RING_NEXT_RANGE
        VF_RING_CHAIN_TOO_LONG
        VF_RING_INDIRECT_NOT_OFFERED
        VF_RING_INDIRECT_NESTED
        VF_RING_INDIRECT_NEXT
        VF_RING_INDIRECT_SIZE
        VF_RING_INDIRECT_UNMAPPED
        VF_RING_HEAD_BUSY
        VF_RING_UNMAPPED
        VF_RING_MISALIGNED
        VF_RING_MEMORY_GONE
        VF_RING_LOG
        VF_RING_LOG_FOREIGN
        VF_RING_POISON
        VF_RING_EMPTY
    struct vf_segment:
        uint64_t iova
        uint32_t len
        uint32_t writable
    struct vf_chain:
        uint16_t head
        uint16_t id
        uint32_t slot_count
        uint32_t segment_count
        vf_segment *segments
        uint64_t readable_bytes
        uint64_t writable_bytes
        vf_segment *last_writable
        uint8_t disorder
    uint64_t vf_segment_shape(const vf_segment *)
    void vf_chain_measure(vf_chain *)
    struct vf_split:
        uint16_t last_avail_idx
    struct vf_packed:
        pass
    struct vf_vring:
        vf_split split
        vf_packed packed
        uint32_t size
        uint8_t is_packed
        uint8_t ordered
        uint8_t mapped
    int vf_split_walk(vf_split *, vf_iotlb *, uint16_t, vf_chain *)
    void vf_split_unpop(vf_split *)
    void vf_split_push(vf_split *, uint16_t, uint32_t, bint)
    void vf_packed_took(vf_packed *, uint32_t)
    void vf_packed_push(vf_packed *, uint16_t, uint32_t, uint32_t, bint)
    int vf_vring_setup(vf_vring *, uint64_t, uint32_t, uint64_t, uint64_t, uint64_t, vf_inflight_header *,
                       vf_inflight_entry *)
    int vf_vring_map(vf_vring *, vf_iotlb *)
    int vf_vring_start(vf_vring *, uint16_t)
    int vf_vring_log_format(const vf_vring *)
    int vf_vring_available(vf_vring *)
    int vf_vring_pop(vf_vring *, vf_iotlb *, vf_chain *)
    void vf_vring_prefetch(const vf_vring *, const vf_iotlb *, uint32_t)
    void vf_vring_push(vf_vring *, uint16_t, uint16_t, uint32_t, uint32_t, bint)
    void vf_vring_publish(vf_vring *)
    int vf_vring_irq_wanted(vf_vring *)
    uint32_t vf_vring_irq_owed(const vf_vring *)
    void vf_vring_kick_disable(vf_vring *)
    int vf_vring_kick_enable(vf_vring *)
    uint16_t vf_vring_avail_state(const vf_vring *)
    uint16_t vf_vring_used_state(const vf_vring *)

cdef extern from "ring/takeover.h" nogil:
    void vf_seed_disorder(vf_inflight_entry *, uint32_t)
    void vf_takeover_begin(vf_vring *, vf_inflight_header *, vf_inflight_entry *, uint16_t)
    int vf_takeover(vf_vring *, vf_inflight_header *, vf_inflight_entry *, uint16_t, bint)
    int vf_takeover_is_idle(const vf_vring *)

cdef extern from "queue/irq_coalesce.h" nogil:
    struct vf_irq_coalesce:
        uint64_t limit_ns
        uint64_t since_ns
    int vf_irq_coalesce_should_interrupt(vf_irq_coalesce *, uint32_t, uint64_t)
    int vf_irq_coalesce_expired(vf_irq_coalesce *, uint32_t, uint64_t)

cdef extern from "queue/queue.h" nogil:
    enum:
        VF_BATCH_MAX
        VF_SLOT_MAX
    struct vf_blk_device:
        uint64_t capacity_sectors
        uint32_t block_sectors
        uint32_t seg_max
        uint32_t size_max_bytes
        uint32_t discard_max_sectors
        uint32_t discard_max_seg
        uint32_t write_zeroes_max_sectors
        uint32_t write_zeroes_max_seg
        uint8_t ignores_discards
        uint8_t keeps_zeroes
        uint8_t read_only
        uint8_t discard
        uint8_t write_zeroes
        char serial[20]
    struct vf_poison:
        uint32_t count
        uint32_t deaths
        uint16_t head
        uint8_t op
        uint64_t offset_bytes
    struct vf_queue:
        vf_vring vring
        vf_chain chain
        vf_engine engine
        vf_port port
        vf_blk_device device
        vf_req *reqs
        uint16_t *free_slots
        uint32_t free_count
        uint32_t slot_count
        uint32_t iov_max
        uint32_t request_bytes_max
        uint64_t inflight_bytes
        uint16_t *unpublished
        uint32_t unpublished_count
        vf_req *next_req
        vf_req **fifo
        uint32_t fifo_head
        uint32_t fifo_count
        uint32_t suspect_count
        vf_irq_coalesce irq_coalesce
        uint8_t irq_due
        vf_publisher publisher
        vf_shm_ctl *ctl
        vf_shm_status *shm_status
        vf_counters *counters
        vf_hist *hist
        vf_inflight_header *inflight
        vf_inflight_entry *inflight_log
        uint64_t next_order
        vf_poison poison
        uint32_t queue_size
        uint32_t ctl_seen
        uint64_t faults_seen
        uint32_t ring_error
        vf_iotlb tlb
        vf_req *done[64]
    struct vf_shm_layout:
        uint32_t header_bytes
        uint32_t counters_offset
        uint32_t hist_offset
        uint32_t inflight_offset
        uint32_t stride_bytes
    vf_shm_layout vf_shm_layout_of "vf_shm_layout"()
    uint32_t vf_shm_block_bytes(uint32_t)
    int vf_queue_fit(vf_queue *, uint32_t)
    vf_queue *vf_queue_create(const vf_blk_device *, uint32_t, void *)
    void vf_queue_use_header(vf_queue *, vf_shm_header *)
    void vf_queue_destroy(vf_queue *)
    int vf_queue_guard(vf_queue *)
    int vf_stop_install(int)
    int vf_die_with_parent(int)
    const volatile int *vf_stop_flag()
    const uint32_t VF_BIG_BYTES
    void vf_queue_limit(vf_queue *, uint64_t)
    void vf_queue_evict(vf_queue *)
    bint vf_queue_has_room(const vf_queue *)
    uint32_t vf_queue_room(const vf_queue *)
    uint64_t vf_req_transfer_bytes(const vf_req *)
    void vf_queue_hold(vf_queue *, vf_req *)
    void vf_queue_free(vf_queue *, vf_req *)
    void vf_queue_count(vf_queue *, uint64_t)
    void vf_queue_tally(vf_queue *, const vf_req *, uint64_t)
    uint64_t vf_now_ns()

cdef extern from "base/reclaim.h" nogil:
    int vf_io_flusher_set()
    int vf_memory_lock()
    int vf_memory_lock_used()

cdef extern from "queue/flush.h" nogil:
    int vf_flush_begin(vf_queue *)
    int vf_flush_end(vf_queue *, int)

cdef extern from "queue/fast_path.h" nogil:
    void vf_fast_path_aim(vf_iotlb *, uint64_t, uint64_t)
    uint64_t vf_fast_path_shape(const vf_segment *)
    bint vf_fast_path_fill(vf_queue *, vf_req *, uint64_t, uint64_t, uint64_t, uint64_t)
    int vf_fast_path_parse_split(vf_queue *, vf_req *)
    int vf_fast_path_parse_packed(vf_queue *, vf_req *)
