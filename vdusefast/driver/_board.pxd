# Mirror of the parts of csrc/board/ that _board.pyx uses.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "board/board.h" nogil:
    const uint64_t VF_BOARD_MAGIC
    enum:
        VF_BOARD_USERS_MAX
        VF_BOARD_SLOTS_MAX
        VF_BOARD_SEGMENTS_MAX
        VF_BOARD_BOUNCE_MAX_BYTES
        VF_BOARD_QUEUES_MAX
        VF_LOCK_FREE
        VF_LOCK_SERVER
        VF_LOCK_WAITERS
    struct vf_board_geometry:
        uint64_t capacity_bytes
        uint64_t discard_max_bytes
        uint64_t discard_granularity_bytes
        uint64_t write_zeroes_max_bytes
        uint64_t spin_ns
        uint32_t block_bytes
        uint32_t physical_block_bytes
        uint32_t io_min_bytes
        uint32_t io_opt_bytes
        uint32_t size_max_bytes
        uint32_t segments_max
        uint32_t bounce_bytes
        uint32_t queue_count
        uint32_t queue_size
        uint32_t slot_count
        uint32_t user_max
        uint32_t route
        uint8_t packed
        uint8_t event_idx
        uint8_t in_order
        uint8_t indirect
        uint8_t read_only
        uint8_t has_flush
        char *serial
    struct vf_board_queue:
        uint32_t inside
        uint32_t lock
        uint32_t broken
        uint64_t published
        uint64_t batches
        uint64_t kicks
        uint64_t irqs
        uint64_t locks_contended
    struct vf_board_parts:
        vf_board_queue *queue
        uint8_t *desc
        uint8_t *driver
        uint8_t *device
    struct vf_board:
        uint32_t closed
        uint64_t resets
        uint64_t replayed
        vf_board_geometry geometry
    struct vf_board_view:
        vf_board *board
        vf_board_geometry geometry
        vf_board_parts *parts
        int *kick_fds
        int *irq_fds

cdef extern from "board/server.h" nogil:
    int vf_server_create(vf_board_view *view, void *address, const vf_board_geometry *geometry)
    uint64_t vf_server_bytes(const vf_board_geometry *geometry, void *address)
    uint32_t vf_server_new_user(vf_board_view *view, bint joined)
    uint32_t vf_server_end_user(vf_board_view *view, uint32_t number)
    bint vf_server_holds_lock(const vf_board_view *view, uint32_t number)
    void vf_server_reap(vf_board_view *view)
    uint32_t vf_server_lock(vf_board_view *view, uint32_t queue)
    bint vf_server_seize(vf_board_view *view, uint32_t queue, uint32_t number)
    void vf_server_hold(vf_board_view *view, uint32_t queue, uint32_t number, bint solo)
    int vf_server_replay(vf_board_view *view)
    void vf_server_resume(vf_board_view *view)
    void vf_server_close(vf_board_view *view)
    uint32_t vf_server_home(const vf_board_view *view, uint32_t number)

cdef extern from "base/barrier.h" nogil:
    void vf_store_relaxed_u64(uint64_t *p, uint64_t v)
    uint64_t vf_load_relaxed_u64(const uint64_t *p)
    uint32_t vf_load_relaxed_u32(const uint32_t *p)
