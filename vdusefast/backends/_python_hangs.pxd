"""Lines about calls of a class that do not return. They are written without the interpreter's lock, which the class may hold."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdio cimport snprintf
from posix.unistd cimport write

from vdusefast.worker._csrc cimport *
from vdusefast.backends._handoff cimport VF_CALL_SUBMIT, vf_hang

cdef enum:
    LINE_BYTES = 1024

cdef struct py_title:
    const char *uri
    uint32_t queue_slots  # slots of each queue, if this process serves several; else 0
    double timeout_s  # 0: none
    bint batched


cdef inline const char *method_of(uint8_t op) noexcept nogil:
    if op == VF_CALL_SUBMIT:
        return b"submit"
    if op == VF_OP_READ:
        return b"pread"
    if op == VF_OP_WRITE:
        return b"pwrite"
    if op == VF_OP_FLUSH:
        return b"flush"
    return b"discard" if op == VF_OP_DISCARD else b"write_zeroes"


cdef inline const char *request_of(uint8_t op) noexcept nogil:
    if op == VF_OP_READ:
        return b"read"
    if op == VF_OP_WRITE:
        return b"write"
    if op == VF_OP_FLUSH:
        return b"flush"
    return b"discard" if op == VF_OP_DISCARD else b"write of zeroes"


cdef inline void say_line(const py_title *title, uint16_t slot, const char *text) noexcept nogil:
    """Write a line to standard error, whose reader never waits."""
    cdef char line[LINE_BYTES]
    cdef char queue[32]
    cdef int length
    queue[0] = 0
    if title.queue_slots:
        snprintf(queue, sizeof(queue), b"queue %u: ", <unsigned> (slot // title.queue_slots))
    length = snprintf(line, LINE_BYTES, b"%s%.500s: %s\n", <const char *> queue, title.uri, text)
    if length < 0 or write(2, line, min(length, <int> LINE_BYTES - 1)) < 0:
        pass  # the class has closed standard error


cdef inline void say_hang(const py_title *title, const vf_hang *hang) noexcept nogil:
    """Say what hangs, for how long, and what to do."""
    cdef char subject[80]
    cdef char request[120]
    cdef char others[40]
    cdef char remedy[120]
    cdef char text[400]
    cdef unsigned long long seconds = (hang.age_ns + 500000000) // 1000000000
    if hang.in_call:
        snprintf(subject, sizeof(subject), b"%s has not returned for %llu s", method_of(hang.call_op), seconds)
    else:
        snprintf(subject, sizeof(subject), b"%s has not completed a request for %llu s",
                 method_of(VF_CALL_SUBMIT if title.batched else hang.op), seconds)
    if hang.has_ended:
        snprintf(request, sizeof(request), b", after its requests were completed")
    else:
        snprintf(request, sizeof(request), b": a %s of %llu bytes at byte %llu", request_of(hang.op),
                 <unsigned long long> hang.length_bytes, <unsigned long long> hang.offset_bytes)
    others[0] = 0
    if hang.other_count:
        snprintf(others, sizeof(others), b"; %u more wait", <unsigned> hang.other_count)
    if title.timeout_s > 0:
        snprintf(remedy, sizeof(remedy), b"requests fail after %g s (backend.timeout_s)", title.timeout_s)
    else:
        snprintf(remedy, sizeof(remedy), b"set backend.timeout_s, and such a request fails after that time")
    snprintf(text, sizeof(text), b"%s%s%s; %s", <const char *> subject, <const char *> request, <const char *> others,
             <const char *> remedy)
    say_line(title, hang.slot, text)


cdef inline void say_over(const py_title *title, const vf_hang *hang) noexcept nogil:
    cdef char text[80]
    cdef unsigned long long seconds = (hang.age_ns + 500000000) // 1000000000
    snprintf(text, sizeof(text), b"it continues after %llu s", seconds)
    say_line(title, hang.slot, text)
