"""The worker's parsing code under names that a C harness can call; the same .pxd sources as vdusefast/worker/_datapath.pyx.

Nothing here touches a Python object, so that the interpreter is never initialised.
"""

from vdusefast.worker._virtio_blk cimport *
from vdusefast.worker._csrc cimport *
from vdusefast.worker._loop cimport *
from vdusefast.worker._recover cimport *


cdef public int fuzz_queue_round(vf_queue *q) noexcept nogil:
    return queue_round(q)


cdef public int fuzz_queue_begin(vf_queue *q, uint16_t state) noexcept nogil:
    return queue_begin_log(q, state)


cdef public int fuzz_queue_adopt(vf_queue *q, uint16_t state) noexcept nogil:
    return queue_adopt(q, state)


cdef public int fuzz_queue_redo(vf_queue *q, uint32_t count) noexcept nogil:
    return queue_redo(q, count)


cdef public void fuzz_queue_drain(vf_queue *q) noexcept nogil:
    queue_drain(q)


cdef public void fuzz_queue_fail(vf_queue *q, int err) noexcept nogil:
    queue_fail(q, err)
