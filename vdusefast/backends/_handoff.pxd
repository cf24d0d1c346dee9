"""Mirror of csrc/python/handoff.h and hang_watch.h."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from vdusefast.worker._csrc cimport vf_engine, vf_engine_ops, vf_mapping, vf_req

cdef extern from "python/handoff.h" nogil:
    enum:
        VF_STAGE_DATA
        VF_STAGE_FLUSH
        VF_STAGE_DONE
    struct vf_handoff_record:
        vf_req *req
        uint64_t zeroed_bytes
        uint64_t start_ns
        int32_t error
        uint32_t piece_count
        uint8_t stage
        uint64_t number
    struct vf_handoff:
        void *owner
        void (*hand_over)(void *) noexcept nogil
        void (*step)(void *) noexcept nogil
        void (*expire)(void *) noexcept nogil
        int (*sleep_in_loop)(void *, const int *, uint32_t, int) noexcept nogil
        void (*region)(void *, void *, size_t, const vf_mapping *) noexcept nogil
        int (*zero_pages)(void *, uintptr_t) noexcept nogil
        void (*shut)(void *) noexcept nogil
        vf_engine *engine
        vf_handoff_record *records
        uint32_t slot_count
        uint16_t *backlog
        uint32_t backlog_at
        uint32_t backlog_count
        uint32_t sleeping
        int wake_fd
        uint8_t stuck
        uint8_t has_loop
        uint64_t timeout_ns
        uint64_t looked_ns
        uint64_t stepped_ns
        uint64_t call
        uint32_t call_slot
    enum:
        VF_CALL_SUBMIT
    const vf_engine_ops vf_engine_python
    void vf_handoff_free(vf_handoff *)
    void vf_handoff_pop(vf_handoff *)
    bint vf_handoff_push(vf_handoff *, uint16_t)
    bint vf_handoff_is_done(const vf_handoff *)
    void vf_handoff_queue(vf_handoff *, uint16_t)
    void vf_handoff_call_begin(vf_handoff *, uint16_t, uint8_t)
    void vf_handoff_call_end(vf_handoff *)
    bint vf_handoff_is_late(const vf_handoff *, uint16_t, uint64_t)

cdef extern from "python/hang_watch.h" nogil:
    enum vf_hang_event:
        VF_HANG_NAMED
        VF_HANG_OVER
        VF_HANG_LATE
        VF_HANG_DEAF
    struct vf_hang:
        uint64_t number
        uint64_t age_ns
        uint64_t offset_bytes
        uint64_t length_bytes
        uint32_t other_count
        uint16_t slot
        uint8_t op
        uint8_t in_call
        uint8_t call_op
        uint8_t has_ended
    struct vf_hang_watch:
        vf_handoff *handoff
        void *owner
        void (*on_event)(void *, vf_hang_event, const vf_hang *) noexcept nogil
        uint8_t started
    int vf_hang_watch_start(vf_hang_watch *)
    void vf_hang_watch_stop(vf_hang_watch *)
