"""Recovery: a worker continues after a dead one, and replays its requests in flight. No Python object in here."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from vdusefast.worker._csrc cimport *
from vdusefast.worker._loop cimport *


cdef inline void queue_align_order(vf_queue *q) noexcept nogil:
    """Make the next head's order equal its avail index modulo 2^16, as the log of an IN_ORDER ring requires."""
    q.next_order = ((q.next_order >> 16) + 1 << 16) + vf_vring_avail_state(&q.vring) - 1


cdef inline int queue_begin_log(vf_queue *q, uint16_t state) noexcept nogil:
    """Start a mapped ring at `state`, with an empty log. 0, or -enum vf_ring_error."""
    cdef int err = vf_vring_start(&q.vring, state)
    if err:
        return err
    vf_log_begin(q.inflight, q.inflight_log, q.vring.size, vf_vring_log_format(&q.vring),
                 vf_vring_avail_state(&q.vring), vf_vring_used_state(&q.vring))
    q.suspect_count = 0
    queue_align_order(q)
    return 0


cdef inline int queue_blame(vf_queue *q) noexcept nogil:
    """Count the previous worker's death against the request that it was processing. 0, or -VF_RING_POISON."""
    cdef uint32_t working = q.inflight.working
    cdef vf_inflight_entry *entry
    vf_log_work(q.inflight, 0)  # first: a death that is not counted is better than one counted twice
    if working == 0:
        return 0
    entry = &q.inflight_log[working - 1]
    if q.vring.is_packed or entry.order:
        entry.deaths += 1
        if entry.deaths >= VF_LOG_HOPELESS:
            return -VF_RING_POISON
    return 0


cdef inline int queue_adopt(vf_queue *q, uint16_t state) noexcept nogil:
    """Adopt a mapped ring from a dead worker: set its cursors from the ring and the in-flight log.

    state: the start position of the ring, for one from which nothing was popped. Returns the number of requests in the log
    to replay, or -enum vf_ring_error.
    """
    cdef uint32_t i
    cdef int count = vf_takeover(&q.vring, q.inflight, q.inflight_log, state, not vf_seed_repeats())
    if count < 0:
        return count
    if <uint32_t> count > q.slot_count:
        return -VF_RING_LOG
    if queue_blame(q):
        return -VF_RING_POISON
    queue_align_order(q)
    q.suspect_count = 0
    if q.vring.is_packed:
        for i in range(q.vring.size):
            q.suspect_count += q.inflight_log[i].deaths != 0
    return count


cdef inline int queue_redo_logged(vf_queue *q, uint32_t count) noexcept nogil:
    """Replay the `count` requests of a split ring's log, in the order in which they were popped."""
    cdef uint32_t i, next_head, done
    cdef uint32_t size = q.vring.size
    cdef uint64_t last_order = 0
    cdef uint64_t next_order
    cdef uint64_t now_ns = vf_now_ns()
    cdef int err = 0
    for i in range(size):
        if q.inflight_log[i].order > q.next_order:
            q.next_order = q.inflight_log[i].order
    vf_seed_disorder(q.inflight_log, size)
    cdef uint64_t end_order = q.next_order
    for done in range(count):
        next_order = end_order + 1
        next_head = size
        for i in range(size):
            if last_order < q.inflight_log[i].order < next_order:
                next_order = q.inflight_log[i].order
                next_head = i
        if next_head == size:
            err = -VF_RING_LOG  # two entries with one order
            break
        last_order = next_order
        err = vf_split_walk(&q.vring.split, &q.tlb, <uint16_t> next_head, &q.chain)
        if err:
            break
        if vf_unlikely(q.inflight_log[next_head].deaths >= VF_LOG_DEATHS_MAX):
            queue_refuse(q, now_ns)
        else:
            queue_begin(q, now_ns)
        if q.unpublished_count >= q.engine.ops.publish_batch and queue_may_publish(q):
            queue_publish(q)
    queue_align_order(q)
    return err


cdef inline int queue_redo_suspects(vf_queue *q) noexcept nogil:
    """Serve a packed ring until the requests that killed workers are popped again, so that their fate is known."""
    cdef uint32_t rounds
    cdef int moved
    for rounds in range(q.vring.size):
        if q.suspect_count == 0:
            break
        moved = queue_round(q)
        if moved <= 0:
            return moved
    return 0


cdef inline int queue_redo_ring(vf_queue *q) noexcept nogil:
    """Pop all chains of a packed ring, among them those that were in flight. Only for an engine that never waits."""
    cdef uint32_t rounds
    cdef int moved
    for rounds in range(q.vring.size):
        moved = queue_round(q)
        if moved <= 0:
            return moved
    return 0


cdef inline int queue_redo(vf_queue *q, uint32_t count) noexcept nogil:
    """Replay the requests that queue_adopt() has found in flight. 0, or -enum vf_ring_error."""
    cdef int err
    memset(&q.poison, 0, sizeof(q.poison))
    q.engine.replaying = 1
    err = queue_redo_suspects(q) if q.vring.is_packed else queue_redo_logged(q, count)
    if q.vring.is_packed and q.engine.marks_replays and err == 0:
        err = queue_redo_ring(q)
    q.engine.replaying = 0
    queue_flush(q)
    if queue_may_publish(q):
        queue_publish(q)
    vf_log_work(q.inflight, 0)
    queue_interrupt(q)  # the previous worker may have published without an interrupt
    if q.counters.memory_faults != q.faults_seen:
        err = -VF_RING_MEMORY_GONE
    return err
