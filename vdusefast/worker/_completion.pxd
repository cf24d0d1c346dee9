"""The end of a request: its status byte, the used ring, publication, interrupts. No Python object in here."""

from libc.stdint cimport uint32_t, uint64_t
from vdusefast.worker._csrc cimport *
from vdusefast.worker._virtio_blk cimport *


cdef inline void queue_clear_suspects(vf_queue *q) noexcept nogil:
    """Forget the deaths of completed requests, in a packed ring, where nothing else clears their entries."""
    cdef uint32_t i
    for i in range(q.unpublished_count):
        if q.inflight_log[q.unpublished[i]].deaths:
            q.inflight_log[q.unpublished[i]].deaths = 0
            q.suspect_count -= 1


cdef inline uint64_t queue_publish_pushed(vf_queue *q) noexcept nogil:
    """Publish what was pushed, clear the log, count. Returns the time in nanoseconds."""
    cdef uint32_t i
    cdef uint64_t now_ns
    vf_vring_publish(&q.vring)
    vf_seed_pause(VF_SEED_REPEAT)
    # Only published requests may leave the log: after a crash here a request is replayed, and none is lost.
    if not q.vring.is_packed:
        for i in range(q.unpublished_count):
            vf_log_set(&q.inflight_log[q.unpublished[i]], 0)
    elif vf_unlikely(q.suspect_count):
        queue_clear_suspects(q)
    q.unpublished_count = 0
    vf_log_note(q.inflight, vf_vring_avail_state(&q.vring), vf_vring_used_state(&q.vring))
    q.counters.batches += 1
    now_ns = vf_now_ns()
    vf_queue_count(q, now_ns)
    return now_ns


cdef inline uint64_t queue_publish(vf_queue *q) noexcept nogil:
    """Do queue_publish_pushed() where no request is being carried out."""
    vf_log_work(q.inflight, 0)  # before its request is published
    return queue_publish_pushed(q)


cdef inline bint queue_may_publish(vf_queue *q) noexcept nogil:
    """Decide whether the pushed requests may be published now.

    A merged request is pushed only when it is reaped, so later requests may already be in the used ring. Publishing those
    first is unsafe: after a crash, recovery would replay the merged (older) write over the newer one.
    """
    return q.unpublished_count != 0 and not vf_merge_has_done(&q.engine)


cdef inline void queue_interrupt(vf_queue *q) noexcept nogil:
    """Interrupt the driver if it wants one for what was published since the last time, or if one is still due."""
    q.irq_coalesce.since_ns = 0
    if not vf_vring_irq_wanted(&q.vring) and not q.irq_due:
        q.counters.irqs_suppressed += 1
        return
    q.irq_due = q.port.inject_irq(&q.port) != 0
    if not q.irq_due:
        q.counters.irqs += 1


cdef inline bint queue_should_interrupt(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Decide after a publication whether to interrupt now, or to wait for more completions."""
    return (
        q.irq_coalesce.limit_ns == 0
        or q.irq_due
        or vf_irq_coalesce_should_interrupt(&q.irq_coalesce, vf_vring_irq_owed(&q.vring), now_ns)
        or vf_irq_coalesce_expired(&q.irq_coalesce, vf_vring_irq_owed(&q.vring), now_ns)
    )


cdef inline void queue_interrupt_if_due(vf_queue *q, uint64_t now_ns) noexcept nogil:
    if queue_should_interrupt(q, now_ns):
        queue_interrupt(q)


cdef inline void queue_complete(vf_queue *q, vf_req *req) noexcept nogil:
    """Write the status, push the chain, free the slot, count."""
    cdef uint32_t written_bytes = req.stored_bytes
    if vf_likely(req.status != NULL):
        blk_write_status(req, req.blk_status)
        # used.len promises that so many bytes were written from the first writable one on (VIRTIO 1.3, 2.7.8.2): after a
        # gap, as after an error, the status does not count.
        written_bytes += written_bytes + 1 == req.writable_bytes
    vf_vring_push(&q.vring, req.head, req.id, req.slot_count, written_bytes, written_bytes == req.writable_bytes)
    if vf_unlikely(req.blk_status != VF_BLK_S_OK):
        q.counters.op[req.op].errors += 1
    vf_queue_tally(q, req, req.data_bytes if vf_likely(req.blk_status == VF_BLK_S_OK) else 0)
    q.unpublished[q.unpublished_count] = req.head
    q.unpublished_count += 1
    if req.held:
        vf_queue_free(q, req)


cdef inline void queue_enqueue(vf_queue *q, vf_req *req) noexcept nogil:
    """Queue req for completion in order, unless it is queued already."""
    cdef uint32_t at = q.fifo_head + q.fifo_count
    if req.queued:
        return
    req.queued = True
    vf_queue_hold(q, req)
    q.fifo[at - q.slot_count if at >= q.slot_count else at] = req
    q.fifo_count += 1


cdef inline void queue_finish(vf_queue *q, vf_req *req) noexcept nogil:
    """Complete req. In an ordered ring: when its turn comes, together with the finished requests after it."""
    if vf_likely(q.fifo_count == 0):
        queue_complete(q, req)
        return
    queue_enqueue(q, req)
    req.finished = True
    while q.fifo_count and q.fifo[q.fifo_head].finished:
        queue_complete(q, q.fifo[q.fifo_head])
        q.fifo_head = q.fifo_head + 1 if q.fifo_head + 1 < q.slot_count else 0
        q.fifo_count -= 1


cdef inline void queue_keep(vf_queue *q, vf_req *req) noexcept nogil:
    """Keep the slot of req, which is in flight now, and its turn if the ring is ordered."""
    vf_queue_hold(q, req)
    if q.vring.ordered:
        queue_enqueue(q, req)


cdef inline void queue_complete_fast(vf_queue *q, vf_req *req, bint packed) noexcept nogil:
    """Do queue_complete() for a plain request that was carried out without an error and never held."""
    cdef uint32_t written_bytes = <uint32_t> req.writable_bytes
    blk_write_status(req, VF_BLK_S_OK)
    if req.op == VF_OP_READ and vf_unlikely(req.left_bytes != 0):
        written_bytes = <uint32_t> (req.data_bytes - req.left_bytes)  # the null engine moves nothing
    if packed:
        vf_packed_push(&q.vring.packed, req.id, 3, written_bytes, written_bytes == req.writable_bytes)
    else:
        vf_split_push(&q.vring.split, req.head, written_bytes, written_bytes == req.writable_bytes)
    vf_queue_tally(q, req, req.data_bytes)
    q.unpublished[q.unpublished_count] = req.head
    q.unpublished_count += 1


cdef inline void queue_call_begin(vf_queue *q) noexcept nogil:
    """Mark a call of the engine, which may wait. Engines that merge mark their calls themselves, closer to the waiting."""
    if q.engine.merge == NULL:
        vf_call_begin(&q.publisher)


cdef inline void queue_call_end(vf_queue *q) noexcept nogil:
    if q.engine.merge == NULL:
        vf_call_end(&q.publisher)
