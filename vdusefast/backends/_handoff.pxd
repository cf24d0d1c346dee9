"""Mirror of csrc/python/handoff.h."""

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
    const vf_engine_ops vf_engine_python
    void vf_handoff_free(vf_handoff *)
    void vf_handoff_pop(vf_handoff *)
    bint vf_handoff_push(vf_handoff *, uint16_t)
    bint vf_handoff_is_done(const vf_handoff *)
