"""The loop of a worker: rounds of pop, submit, reap and publish; waiting; draining. No Python object in here."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport read

from vdusefast.worker._completion cimport *
from vdusefast.worker._csrc cimport *
from vdusefast.worker._virtio_blk cimport *

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)
    enum:
        POLLIN

cdef enum:  # the descriptors of a sleep, as bits in this order
    WATCH_KICK = 1
    WATCH_CTL = 2

cdef enum:
    RUN_CONTROL = 1  # the supervisor has sent something
    RUN_FAILED = 2  # the ring is bad; vf_queue.ring_error says how
    RUN_STOP = 3  # SIGTERM or SIGINT
    RUN_UNMAPPED = 4  # the driver's map has changed and lacks the rings: check again later

cdef enum:
    PREFETCH_COUNT = 16
    ROUND_OVER = 2  # besides VF_RING_EMPTY: a request was popped, and the round should end after it
    IRQ_DELAY_NS = 50000  # a sleeping driver waits at most so long, plus one request, for the rest of a round
    IRQ_RETRY_MS = 1
    RELOOK_MS = 100  # a kick can be lost with a dead worker, so the ring is polled at least this often
    SPIN_CLOCK_MASK = 31  # the clock is read once in so many turns of the spin
    SPIN_FAILS_MAX = 3  # spins in vain before spinning becomes rare
    SPIN_RARE_MAX = 8  # at least one idle period in 2^8 spins

# The history of spins for one cause of waiting.
cdef struct loop_lesson:
    uint32_t fail_streak
    uint32_t period_count

# The current idle period. Waits for storage and for the driver differ in length, so each has its own history.
cdef struct loop_idle:
    uint64_t since_ns  # 0: not idle
    uint32_t turns
    bint spinning
    loop_lesson *lesson
    loop_lesson of_driver
    loop_lesson of_storage

# The current round.
cdef struct loop_round:
    uint64_t begin_ns  # when its requests begin
    uint32_t moved  # requests popped or finished
    uint32_t publish_batch  # completions that may wait for each other
    uint32_t tick  # of the publisher, when this round published last
    bint blocks  # the engine may wait for storage
    bint irq_pending  # completions were published without an interrupt

# The descriptors that the loop sleeps on, and its other time limits.
cdef struct loop_waits:
    int fds[3]  # in the order of the bits WATCH_*; the third one only wakes
    uint64_t poll_ns  # longest spin
    uint64_t irq_delay_ns  # longest wait of an interrupt for more completions


cdef inline void queue_submit(vf_queue *q, vf_req *req) noexcept nogil:
    """Submit req to the engine, range after range; finish it unless it is in flight."""
    vf_seed_die(req.op, req.offset_bytes)
    if vf_seed_answers_early(req.op):
        queue_finish(q, req)
        queue_publish(q)
        vf_seed_pause(VF_SEED_WRITE_EARLY)
        q.engine.ops.submit(&q.engine, req)
        return
    while q.engine.ops.submit(&q.engine, req):
        if not blk_next(q, req):
            queue_finish(q, req)
            return
    queue_keep(q, req)


cdef inline uint32_t queue_reap(vf_queue *q) noexcept nogil:
    """Reap the requests that the engine has finished. Returns their number."""
    cdef uint32_t i, count
    queue_call_begin(q)
    count = q.engine.ops.reap(&q.engine, q.done, VF_BATCH_MAX)
    queue_call_end(q)
    for i in range(count):
        if blk_next(q, q.done[i]):
            queue_submit(q, q.done[i])
        else:
            queue_finish(q, q.done[i])
    return count


cdef inline void queue_flush(vf_queue *q) noexcept nogil:
    """Let the engine start the submitted requests."""
    if q.engine.ops.flush != NULL:
        queue_call_begin(q)
        q.engine.ops.flush(&q.engine)
        queue_call_end(q)


cdef inline int queue_publish_during_call(void *context) noexcept nogil:
    """Publish in the loop's place, in the thread of publisher.h, while the loop waits in a call: see vf_publisher_publish.

    Merged requests that are carried out are reaped here, before the rest of their engine's batch. That is safe, because
    the loop waits in a call of the store (queue_call_begin), during which these lists do not change.
    """
    cdef vf_queue *q = <vf_queue *> context
    cdef vf_req *done[64]
    cdef uint32_t i, count
    while vf_merge_has_done(&q.engine):
        count = vf_merge_reap(&q.engine, done, 64)
        for i in range(count):
            blk_next(q, done[i])  # a transfer, which has no other range
            queue_finish(q, done[i])
    if queue_may_publish(q):
        queue_publish_pushed(q)
    if q.irq_due or vf_vring_irq_owed(&q.vring):
        queue_interrupt(q)
    return not q.irq_due


cdef inline vf_req *queue_slot(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Return a slot for the request in q.chain; there is a free one. Most requests end before vf_queue_hold() claims it."""
    cdef vf_req *req = q.next_req
    req.head = q.chain.head
    req.id = q.chain.id
    req.slot_count = q.chain.slot_count
    req.start_ns = now_ns
    return req


cdef inline int queue_begin(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Start the request in q.chain, which is in the log. There is a free slot. 0, or ROUND_OVER."""
    cdef vf_req *req = queue_slot(q, now_ns)
    cdef int what
    vf_log_work(q.inflight, <uint32_t> req.head + 1)
    what = blk_parse(q, req)
    if what == BLK_SUBMIT and vf_unlikely(req.op == VF_OP_FLUSH):
        what = blk_begin_flush(q, req)
    if vf_likely(what == BLK_SUBMIT):
        queue_submit(q, req)
    else:
        queue_finish(q, req)
    return ROUND_OVER if vf_unlikely(vf_req_transfer_bytes(req) > VF_BIG_BYTES or not vf_queue_has_room(q)) else 0


cdef inline void queue_refuse(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Complete the request in q.chain, which has killed workers, with an error; the store does not see it."""
    cdef vf_req *req = queue_slot(q, now_ns)
    q.poison.count += 1
    q.poison.deaths = q.inflight_log[req.head].deaths
    q.poison.head = req.head
    vf_log_work(q.inflight, <uint32_t> req.head + 1)
    if blk_parse(q, req) == BLK_SUBMIT:
        blk_fail(q, req, VF_BLK_S_IOERR)
    q.poison.op = req.op
    q.poison.offset_bytes = req.offset_bytes
    queue_finish(q, req)


cdef inline int queue_log_head(vf_queue *q, uint16_t head) noexcept nogil:
    """Enter a head popped from a split ring into the log. 0, or -VF_RING_HEAD_BUSY."""
    if vf_unlikely(q.inflight_log[head].order != 0):
        return -VF_RING_HEAD_BUSY
    q.next_order += 1
    if vf_seed_forgets(q.next_order):
        vf_seed_pause(VF_SEED_FORGET)
    else:
        vf_log_take(&q.inflight_log[head], q.next_order)
    return 0


cdef inline int queue_pop_any(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Pop one chain of any shape and start its request. 0, ROUND_OVER, VF_RING_EMPTY, or -enum vf_ring_error."""
    cdef int err = vf_vring_pop(&q.vring, &q.tlb, &q.chain)
    if vf_unlikely(err):
        return err
    if not q.vring.is_packed:
        err = queue_log_head(q, q.chain.head)
        if vf_unlikely(err):
            vf_split_unpop(&q.vring.split)
            return err
    elif vf_unlikely(q.suspect_count) and q.inflight_log[q.chain.head].deaths >= VF_LOG_DEATHS_MAX:
        queue_refuse(q, now_ns)
        return 0
    return queue_begin(q, now_ns)


cdef inline void queue_begin_fast(vf_queue *q, vf_req *req, uint64_t now_ns, bint packed) noexcept nogil:
    """Do queue_begin() for a request of the fast path, which is parsed already."""
    req.start_ns = now_ns
    vf_log_work(q.inflight, <uint32_t> req.head + 1)
    if VF_SEED_FAULT or vf_unlikely(q.fifo_count):
        queue_submit(q, req)
    elif vf_unlikely(not q.engine.ops.submit(&q.engine, req)):
        queue_keep(q, req)
    elif vf_likely(req.result == 0):
        queue_complete_fast(q, req, packed)
    else:
        blk_next(q, req)
        queue_complete(q, req)


cdef inline int queue_pop(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Pop the next chain and begin its request, by the fast path if it fits. Returns as queue_pop_any()."""
    cdef vf_req *req = q.next_req
    cdef int plain
    if vf_unlikely(not q.tlb.has_windows):
        return queue_pop_any(q, now_ns)
    if not q.vring.is_packed:
        if vf_unlikely(not vf_fast_path_parse_split(q, req)):
            return queue_pop_any(q, now_ns)
        if vf_unlikely(queue_log_head(q, req.head)):
            return -VF_RING_HEAD_BUSY
        q.vring.split.last_avail_idx += 1
        queue_begin_fast(q, req, now_ns, False)
        return 0
    if vf_unlikely(q.suspect_count):
        return queue_pop_any(q, now_ns)  # which looks for them
    plain = vf_fast_path_parse_packed(q, req)
    if plain < 0:
        return VF_RING_EMPTY
    if vf_unlikely(plain == 0):
        return queue_pop_any(q, now_ns)
    vf_packed_took(&q.vring.packed, 3)
    queue_begin_fast(q, req, now_ns, True)
    return 0


cdef inline uint32_t queue_reap_all(vf_queue *q) noexcept nogil:
    """Reap, and publish before the next requests are submitted, so that the driver can prepare more in the meantime.
    Returns the number of requests.
    """
    cdef uint32_t moved = queue_reap(q)
    while vf_unlikely(vf_merge_has_done(&q.engine)):  # more than a batch: they are a previous worker's
        moved += queue_reap(q)
    if moved and q.unpublished_count:
        queue_interrupt_if_due(q, queue_publish(q))
    return moved


cdef inline uint32_t queue_round_limit(vf_queue *q, uint32_t available) noexcept nogil:
    """Return how many of the available requests this round may pop."""
    cdef uint32_t limit = available
    if q.vring.is_packed or available > VF_BATCH_MAX:  # a packed ring does not tell their number
        limit = VF_BATCH_MAX
    if vf_unlikely(limit > q.free_count):
        limit = q.free_count
    if q.engine.inflight_count:
        if vf_unlikely(limit > vf_queue_room(q)):
            limit = vf_queue_room(q)
    elif vf_unlikely(q.tlb.region_count > q.tlb.region_limit):
        vf_queue_evict(q)  # nobody uses a region now
    return limit


cdef inline void queue_round_begin(vf_queue *q, loop_round *this) noexcept nogil:
    """Note when the round's requests begin, and how many completions may be published together."""
    this.begin_ns = vf_now_ns()
    vf_publisher_note_round(&q.publisher)
    this.publish_batch = q.engine.ops.publish_batch
    this.blocks = q.engine.ops.blocks
    this.tick = 0
    if this.blocks:
        this.tick = vf_peek_u32(&q.publisher.tick)
        if vf_unlikely(vf_peek_u32(&q.publisher.slow_ticks)):
            this.publish_batch = 1


cdef inline int queue_publish_early(vf_queue *q, loop_round *this) noexcept nogil:
    """Publish after a request if the batch is full or storage is slow. 0, or ROUND_OVER.

    A spinning driver sees the completions at once. A sleeping one is woken once for many, unless that takes long: on a CPU
    shared with it, each wake-up would end our time slice.
    """
    cdef uint64_t now_ns
    if q.unpublished_count >= this.publish_batch and queue_may_publish(q):
        now_ns = queue_publish(q)
        this.irq_pending = True
        if vf_unlikely(vf_load_relaxed_u32(&q.ctl.ctl_seq) != q.ctl_seen):
            return ROUND_OVER  # the supervisor waits for us
    elif vf_likely(not this.blocks):
        return 0
    elif vf_unlikely(vf_peek_u32(&q.publisher.tick) != this.tick) and queue_may_publish(q):
        # No single request was slow enough for the publisher thread, but together they are.
        this.tick = vf_peek_u32(&q.publisher.tick)
        now_ns = queue_publish(q)
        this.irq_pending = True
    elif vf_likely(not this.irq_pending):
        return 0
    else:
        now_ns = vf_now_ns()
    if now_ns - this.begin_ns > IRQ_DELAY_NS:
        queue_interrupt(q)
        this.irq_pending = False
    return 0


cdef inline int queue_pop_batch(vf_queue *q, loop_round *this, uint32_t limit) noexcept nogil:
    """Pop and begin at most `limit` requests, counted in `moved`. 0, or -enum vf_ring_error."""
    cdef uint32_t i
    cdef uint32_t prefetched = 0
    cdef int err = 0
    queue_round_begin(q, this)
    for i in range(limit):
        if i == prefetched:
            prefetched = limit if limit - i < PREFETCH_COUNT else i + PREFETCH_COUNT
            vf_vring_prefetch(&q.vring, &q.tlb, prefetched - i)
        err = queue_pop(q, this.begin_ns)
        if vf_unlikely(err or q.counters.memory_faults != q.faults_seen):
            break
        err = queue_publish_early(q, this)
        if vf_unlikely(err):
            break
    else:
        i = limit  # of a loop that ran to its end, Python's counter is one less
    this.moved += i + (err == ROUND_OVER)  # which was popped
    vf_log_work(q.inflight, 0)  # a death from here on is not this request's: it is in flight in the engine
    return err if vf_unlikely(err < 0) else 0


cdef inline int queue_round(vf_queue *q) noexcept nogil:
    """Reap, pop and publish once. Returns the number of requests popped or finished, or -enum vf_ring_error."""
    cdef loop_round this
    cdef int err = 0
    cdef int available
    this.moved = queue_reap_all(q) if q.engine.inflight_count else 0
    this.irq_pending = q.irq_coalesce.since_ns != 0
    available = vf_vring_available(&q.vring)
    if available > 0:
        err = queue_pop_batch(q, &this, queue_round_limit(q, <uint32_t> available))
    elif vf_unlikely(available < 0):
        err = available
    queue_flush(q)
    if queue_may_publish(q):
        queue_interrupt_if_due(q, queue_publish(q))
    elif this.irq_pending and this.moved:
        queue_interrupt_if_due(q, vf_now_ns())
    elif vf_unlikely(q.irq_due):
        queue_interrupt(q)
    if vf_unlikely(q.counters.memory_faults != q.faults_seen):
        err = -VF_RING_MEMORY_GONE
    return err if vf_unlikely(err) else <int> this.moved


cdef inline void queue_drain(vf_queue *q) noexcept nogil:
    """Drain: finish and publish all requests in flight; waits for storage."""
    while q.engine.inflight_count:
        q.engine.ops.flush(&q.engine)
        if queue_reap(q) == 0:
            q.engine.ops.wait(&q.engine)
        if queue_may_publish(q):
            queue_publish(q)
            queue_interrupt(q)


cdef inline void queue_set_state(vf_queue *q, uint32_t state) noexcept nogil:
    q.shm_status.last_avail_idx = vf_vring_avail_state(&q.vring)
    q.shm_status.last_used_idx = vf_vring_used_state(&q.vring)
    q.shm_status.inflight_count = q.engine.inflight_count
    q.counters.iotlb_misses = q.tlb.miss_count
    vf_store_relaxed_u32(&q.shm_status.state, state)


cdef inline void queue_fail(vf_queue *q, int err) noexcept nogil:
    """Fail the ring: requests in flight end, and nothing more is popped."""
    q.ring_error = <uint32_t> -err
    q.counters.ring_errors += 1
    q.faults_seen = q.counters.memory_faults
    queue_drain(q)
    q.shm_status.fail_reason = q.ring_error
    queue_set_state(q, VF_QUEUE_FAILED)


cdef inline bint loop_may_spin(loop_lesson *lesson) noexcept nogil:
    """Decide at the start of an idle period whether to spin. Spins in vain (slow storage, shared CPU) make it rarer."""
    cdef uint32_t rarity
    lesson.period_count += 1
    if lesson.fail_streak < SPIN_FAILS_MAX:
        return True
    rarity = lesson.fail_streak - SPIN_FAILS_MAX + 1
    if rarity > SPIN_RARE_MAX:
        rarity = SPIN_RARE_MAX
    return (lesson.period_count & ((1u << rarity) - 1)) == 0


cdef inline bint loop_spin(vf_queue *q, loop_idle *idle, uint64_t poll_ns) noexcept nogil:
    """Do one turn of an idle loop. True: check the ring again at once. False: sleep."""
    cdef uint64_t now_ns
    if idle.since_ns == 0:
        idle.since_ns = vf_now_ns()
        idle.turns = 0
        idle.lesson = &idle.of_storage if q.engine.inflight_count else &idle.of_driver
        q.shm_status.inflight_count = q.engine.inflight_count  # readers of the shared pages see what we wait for
        idle.spinning = poll_ns != 0 and loop_may_spin(idle.lesson)
    if not idle.spinning:
        return False
    vf_cpu_relax()
    idle.turns += 1
    if idle.turns & SPIN_CLOCK_MASK:
        return True
    now_ns = vf_now_ns()
    if q.irq_coalesce.since_ns and vf_irq_coalesce_expired(&q.irq_coalesce, vf_vring_irq_owed(&q.vring), now_ns):
        queue_interrupt(q)
        idle.since_ns = 0  # only now does the driver learn of the completions
        return True
    if q.irq_coalesce.since_ns or now_ns - idle.since_ns < poll_ns:
        return True
    idle.spinning = False
    idle.lesson.fail_streak += 1
    return False


cdef inline void loop_hear(vf_queue *q, uint32_t readable, int kick_fd) noexcept nogil:
    """Note the descriptors that became readable: bits WATCH_*."""
    cdef uint64_t kicks = 0
    if readable & WATCH_KICK and read(kick_fd, &kicks, sizeof(kicks)) == sizeof(kicks):
        q.counters.kicks += kicks
    if readable & (WATCH_CTL | VF_READABLE_EVENTS):
        # A message, an event of the store, or the end of the supervisor: Python handles each.
        q.ctl_seen = vf_load_relaxed_u32(&q.ctl.ctl_seq) - 1


cdef inline bint loop_sleep(vf_queue *q, const int *fds) noexcept nogil:
    """Ask for a kick, check the ring once more, sleep. True when the timer ended the sleep."""
    cdef pollfd polled[3]
    cdef uint32_t readable = 0
    cdef int i, ready
    cdef int timeout_ms = IRQ_RETRY_MS if q.irq_due else RELOOK_MS
    # With every slot in use, kicks do not matter: only storage can free a slot.
    if vf_queue_has_room(q) and vf_vring_kick_enable(&q.vring):
        return False
    queue_set_state(q, VF_QUEUE_RUNNING)
    q.counters.sleeps += 1
    if q.engine.inflight_count or q.engine.always:
        return q.engine.ops.sleep(&q.engine, fds, 3, timeout_ms)
    for i in range(3):
        polled[i] = pollfd(fds[i], POLLIN, 0)
    ready = poll(polled, 3, timeout_ms)
    if ready > 0:
        for i in range(3):
            readable |= (polled[i].revents != 0) << i
        loop_hear(q, readable, fds[0])
    return ready == 0


cdef inline int queue_run(vf_queue *q, const loop_waits *waits) noexcept nogil:
    """Serve until Python has to act. Returns RUN_*."""
    cdef loop_idle idle
    cdef bint timed_out = False
    cdef int reason = 0
    cdef int moved

    memset(&idle, 0, sizeof(idle))
    vf_vring_kick_disable(&q.vring)
    # Only a spinning loop returns in time to an interrupt that is delayed.
    q.irq_coalesce.limit_ns = waits.irq_delay_ns if waits.poll_ns else 0
    while True:
        if vf_unlikely(vf_load_relaxed_u32(&q.ctl.ctl_seq) != q.ctl_seen):
            reason = RUN_CONTROL
            break
        if vf_unlikely(vf_stop_flag()[0]):
            reason = RUN_STOP
            break
        moved = queue_round(q)
        if vf_unlikely(moved < 0):
            queue_fail(q, moved)
            reason = RUN_FAILED
            break
        if vf_unlikely(q.engine.readable):
            loop_hear(q, q.engine.readable, waits.fds[0])
            q.engine.readable = 0
        if moved:
            if idle.since_ns:
                if idle.spinning:
                    q.counters.spins += 1
                    idle.lesson.fail_streak = 0
                elif timed_out:
                    q.counters.relooks += 1
                idle.since_ns = 0
                timed_out = False
            continue
        if loop_spin(q, &idle, waits.poll_ns):
            continue
        if q.irq_coalesce.since_ns:
            queue_interrupt(q)
        timed_out = loop_sleep(q, waits.fds)
        vf_vring_kick_disable(&q.vring)
    if q.irq_coalesce.since_ns:
        queue_interrupt(q)
    q.irq_coalesce.limit_ns = 0
    return reason
