"""The loop of a worker: rounds of pop, submit, reap and publish; waiting; draining. No Python object in here."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport read

from vdusefast._blk cimport *
from vdusefast._csrc cimport *

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
    RUN_UNMAPPED = 4  # the driver's map has changed and lacks the rings: look again later

cdef enum:
    PREFETCH_COUNT = 16
    IRQ_DELAY_NS = 50000  # a sleeping driver waits so long, and for one request more, for the rest of a round
    IRQ_RETRY_MS = 1
    RELOOK_MS = 100  # a kick can be lost with a worker that died; the ring is looked at this often anyway
    SPIN_CLOCK_MASK = 31  # the clock is read once in so many turns of the spin
    SPIN_FAILS_MAX = 3  # spins in vain before spinning becomes rare
    SPIN_RARE_MAX = 8  # at the rarest one idle period in 2^8

# What waiting for one thing has taught.
cdef struct loop_lesson:
    uint32_t fail_streak
    uint32_t period_count

# The idle period that is going on. Storage and drivers keep us waiting for different times: each has its lesson.
cdef struct loop_idle:
    uint64_t since_ns  # 0: not idle
    uint32_t turns
    bint spinning
    loop_lesson *lesson
    loop_lesson of_driver
    loop_lesson of_storage


cdef inline void queue_clear_suspects(vf_queue *q) noexcept nogil:
    """Forget the deaths of requests that were given back: of a packed ring, where nothing else clears their entries."""
    cdef uint32_t i
    for i in range(q.unpublished_count):
        if q.inflight_log[q.unpublished[i]].deaths:
            q.inflight_log[q.unpublished[i]].deaths = 0
            q.suspect_count -= 1


cdef inline uint64_t queue_publish(vf_queue *q) noexcept nogil:
    """Show the driver what was pushed, clear the log, count. Returns the time in nanoseconds."""
    cdef uint32_t i
    cdef uint64_t now_ns
    vf_log_work(q.inflight, 0)  # before its request is shown
    vf_vring_publish(&q.vring)
    vf_seed_pause(VF_SEED_REPEAT)
    # Only what the driver can see may leave the log: a crash here repeats a request, and never forgets one.
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


cdef inline bint queue_may_publish(vf_queue *q) noexcept nogil:
    """Decide whether what was pushed may be shown now.

    A request that was held back to be merged, and carried out since, is pushed when it is reaped, behind later ones. To show
    these before it would have the next worker repeat it behind them, should this one die: an older write over a newer one.
    """
    return q.unpublished_count != 0 and not vf_merge_has_done(&q.engine)


cdef inline void queue_interrupt(vf_queue *q) noexcept nogil:
    """Interrupt the driver if it wants that for what was published since the last time, or is still due one."""
    q.irq_hold.since_ns = 0
    if not vf_vring_irq_wanted(&q.vring) and not q.irq_due:
        q.counters.irqs_suppressed += 1
        return
    q.irq_due = q.port.inject_irq(&q.port) != 0
    if not q.irq_due:
        q.counters.irqs += 1


cdef inline void queue_tell(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """After a publication: interrupt, or hold the interrupt for more completions."""
    if (
        q.irq_hold.limit_ns == 0
        or q.irq_due
        or vf_irq_hold_tell(&q.irq_hold, vf_vring_irq_owed(&q.vring), now_ns)
        or vf_irq_hold_expired(&q.irq_hold, vf_vring_irq_owed(&q.vring), now_ns)
    ):
        queue_interrupt(q)


cdef inline void queue_give_back(vf_queue *q, vf_req *req) noexcept nogil:
    """Write the status, give the chain and the slot back, count."""
    cdef uint32_t written_bytes = req.stored_bytes
    if vf_likely(req.status != NULL):
        vf_store_relaxed_u8(req.status, req.blk_status)
        # used.len promises that so many bytes were written from the first writable one on (VIRTIO 1.3, 2.7.8.2): behind a
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
    """Have req wait for its turn to be given back, unless it does already."""
    cdef uint32_t at = q.fifo_head + q.fifo_count
    if req.queued:
        return
    req.queued = True
    vf_queue_hold(q, req)
    q.fifo[at - q.slot_count if at >= q.slot_count else at] = req
    q.fifo_count += 1


cdef inline void queue_finish(vf_queue *q, vf_req *req) noexcept nogil:
    """Give req back; where that has an order, when its turn comes, together with those that wait for it."""
    if vf_likely(q.fifo_count == 0):
        queue_give_back(q, req)
        return
    queue_enqueue(q, req)
    req.finished = True
    while q.fifo_count and q.fifo[q.fifo_head].finished:
        queue_give_back(q, q.fifo[q.fifo_head])
        q.fifo_head = q.fifo_head + 1 if q.fifo_head + 1 < q.slot_count else 0
        q.fifo_count -= 1


cdef inline void queue_keep(vf_queue *q, vf_req *req) noexcept nogil:
    """Have req, which is in flight now, keep its slot, and its turn where there is an order."""
    vf_queue_hold(q, req)
    if q.vring.ordered:
        queue_enqueue(q, req)


cdef inline void queue_give_plain(vf_queue *q, vf_req *req, bint packed) noexcept nogil:
    """Do queue_give_back() for a plain request that was carried out without an error and never held."""
    cdef uint32_t written_bytes = <uint32_t> req.writable_bytes
    vf_store_relaxed_u8(req.status, VF_BLK_S_OK)
    if req.op == VF_OP_READ and vf_unlikely(req.left_bytes != 0):
        written_bytes = <uint32_t> (req.data_bytes - req.left_bytes)  # the null engine moves nothing
    if packed:
        vf_packed_push(&q.vring.packed, req.id, 3, written_bytes, written_bytes == req.writable_bytes)
    else:
        vf_split_push(&q.vring.split, req.head, written_bytes, written_bytes == req.writable_bytes)
    vf_queue_tally(q, req, req.data_bytes)
    q.unpublished[q.unpublished_count] = req.head
    q.unpublished_count += 1


cdef inline void queue_submit(vf_queue *q, vf_req *req) noexcept nogil:
    """Give req, range after range, to the engine; finish it unless it is in flight."""
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
    """Take what the engine has finished. The number of requests."""
    cdef uint32_t i
    cdef uint32_t count = q.engine.ops.reap(&q.engine, q.done, VF_BATCH_MAX)
    for i in range(count):
        if blk_next(q, q.done[i]):
            queue_submit(q, q.done[i])
        else:
            queue_finish(q, q.done[i])
    return count


cdef inline vf_req *queue_slot(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """A slot for the request in q.chain; there is a free one. It is taken by vf_queue_hold(), and most are done before that."""
    cdef vf_req *req = q.next_req
    req.head = q.chain.head
    req.id = q.chain.id
    req.slot_count = q.chain.slot_count
    req.start_ns = now_ns
    return req


cdef inline void queue_begin(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Start the request in q.chain, which is in the log. There is a free slot."""
    cdef vf_req *req = queue_slot(q, now_ns)
    vf_log_work(q.inflight, <uint32_t> req.head + 1)
    if vf_likely(blk_parse(q, req) == BLK_SUBMIT):
        queue_submit(q, req)
    else:
        queue_finish(q, req)


cdef inline void queue_refuse(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Answer the request in q.chain, which workers have died of, with an error; the store does not see it."""
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


cdef inline int queue_log(vf_queue *q, uint16_t head) noexcept nogil:
    """Enter a head that a split ring has given into the log. 0, or -VF_RING_HEAD_BUSY."""
    if vf_unlikely(q.inflight_log[head].order != 0):
        return -VF_RING_HEAD_BUSY
    q.next_order += 1
    if vf_seed_forgets(q.next_order):
        vf_seed_pause(VF_SEED_FORGET)
    else:
        vf_log_take(&q.inflight_log[head], q.next_order)
    return 0


cdef inline int queue_take_any(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Pop one chain of any shape and start its request. 0, VF_RING_EMPTY, or -enum vf_ring_error."""
    cdef int err = vf_vring_pop(&q.vring, &q.tlb, &q.chain)
    if vf_unlikely(err):
        return err
    if not q.vring.is_packed:
        err = queue_log(q, q.chain.head)
        if vf_unlikely(err):
            vf_split_unpop(&q.vring.split)
            return err
    elif vf_unlikely(q.suspect_count) and q.inflight_log[q.chain.head].deaths >= VF_LOG_DEATHS_MAX:
        queue_refuse(q, now_ns)
        return 0
    queue_begin(q, now_ns)
    return 0


cdef inline void queue_begin_plain(vf_queue *q, vf_req *req, uint64_t now_ns, bint packed) noexcept nogil:
    """Do queue_begin() for a plain request, which is parsed."""
    req.start_ns = now_ns
    vf_log_work(q.inflight, <uint32_t> req.head + 1)
    if VF_SEED_FAULT or vf_unlikely(q.fifo_count):
        queue_submit(q, req)
    elif vf_unlikely(not q.engine.ops.submit(&q.engine, req)):
        queue_keep(q, req)
    elif vf_likely(req.result == 0):
        queue_give_plain(q, req, packed)
    else:
        blk_next(q, req)
        queue_give_back(q, req)


cdef inline int queue_take(vf_queue *q, uint64_t now_ns) noexcept nogil:
    """Take the next chain and start its request: by the straight path where it is plain. Returns as queue_take_any()."""
    cdef vf_req *req = q.next_req
    cdef int plain
    if vf_unlikely(not q.tlb.has_windows):
        return queue_take_any(q, now_ns)
    if not q.vring.is_packed:
        if vf_unlikely(not vf_plain_look_split(q, req)):
            return queue_take_any(q, now_ns)
        if vf_unlikely(queue_log(q, req.head)):
            return -VF_RING_HEAD_BUSY
        q.vring.split.last_avail_idx += 1
        queue_begin_plain(q, req, now_ns, False)
        return 0
    plain = vf_plain_look_packed(q, req)
    if plain < 0:
        return VF_RING_EMPTY
    if vf_unlikely(plain == 0):
        return queue_take_any(q, now_ns)
    vf_packed_took(&q.vring.packed, 3)
    queue_begin_plain(q, req, now_ns, True)
    return 0


cdef inline int queue_round(vf_queue *q) noexcept nogil:
    """Reap, pop and publish once. The number of requests taken or finished, or -enum vf_ring_error."""
    cdef uint32_t moved = 0
    cdef uint32_t i, limit
    cdef uint64_t now_ns
    cdef uint64_t done_ns = 0
    cdef uint32_t prefetched = 0
    cdef uint32_t batch = q.engine.ops.publish_batch
    cdef bint blocks = q.engine.ops.blocks
    cdef int count
    cdef int err = 0
    cdef bint published

    if q.engine.inflight_count:
        moved = queue_reap(q)
        while vf_unlikely(vf_merge_has_done(&q.engine)):  # more than a batch: a worker before has left them
            moved += queue_reap(q)
        if moved and q.unpublished_count:
            # Before the next ones are submitted, which takes time: the driver prepares more meanwhile.
            queue_tell(q, queue_publish(q))
    published = q.irq_hold.since_ns != 0
    count = vf_vring_available(&q.vring)
    if count > 0:
        # Of a packed ring nobody knows how many there are.
        limit = <uint32_t> count if not q.vring.is_packed and <uint32_t> count < VF_BATCH_MAX else VF_BATCH_MAX
        if vf_unlikely(limit > q.free_count):
            limit = q.free_count
        now_ns = vf_now_ns()
        for i in range(limit):
            if i == prefetched:
                prefetched = limit if limit - i < PREFETCH_COUNT else i + PREFETCH_COUNT
                vf_vring_prefetch(&q.vring, &q.tlb, prefetched - i)
            err = queue_take(q, now_ns)
            if vf_unlikely(err or q.counters.memory_faults != q.faults_seen):
                break
            # A driver that spins sees these at once. One that sleeps is woken once for many, unless that takes long:
            # on a CPU shared with it, each wake-up would end our turn.
            if q.unpublished_count >= batch and queue_may_publish(q):
                done_ns = queue_publish(q)
                published = True
            elif vf_likely(not published or not blocks):
                continue
            else:
                done_ns = vf_now_ns()
            if done_ns - now_ns > IRQ_DELAY_NS:
                queue_interrupt(q)
                published = False
        else:
            i = limit  # of a loop that ran to its end, Python's counter is one less
        moved += i
        if err == VF_RING_EMPTY:
            err = 0
        vf_log_work(q.inflight, 0)  # what is in flight now is in the engine's hands
    elif vf_unlikely(count < 0):
        err = count
    if q.engine.ops.flush != NULL:
        q.engine.ops.flush(&q.engine)
    if queue_may_publish(q):
        done_ns = queue_publish(q)
        queue_tell(q, done_ns)
    elif published and moved:
        queue_tell(q, vf_now_ns())
    elif vf_unlikely(q.irq_due):
        queue_interrupt(q)
    if vf_unlikely(q.counters.memory_faults != q.faults_seen):
        err = -VF_RING_MEMORY_GONE
    return err if vf_unlikely(err) else <int> moved


cdef inline void queue_drain(vf_queue *q) noexcept nogil:
    """Finish and publish all that is in flight; waits for storage."""
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
    """Give the ring up: what is in flight ends, nothing more is taken."""
    q.ring_error = <uint32_t> -err
    q.counters.ring_errors += 1
    q.faults_seen = q.counters.memory_faults
    queue_drain(q)
    q.shm_status.fail_reason = q.ring_error
    queue_set_state(q, VF_QUEUE_FAILED)


cdef inline bint loop_may_spin(loop_lesson *lesson) noexcept nogil:
    """Decide at the start of an idle period. Spins in vain (slow storage, a driver on our CPU) make them rare."""
    cdef uint32_t rarity
    lesson.period_count += 1
    if lesson.fail_streak < SPIN_FAILS_MAX:
        return True
    rarity = lesson.fail_streak - SPIN_FAILS_MAX + 1
    if rarity > SPIN_RARE_MAX:
        rarity = SPIN_RARE_MAX
    return (lesson.period_count & ((1u << rarity) - 1)) == 0


cdef inline bint loop_spin(vf_queue *q, loop_idle *idle, uint64_t poll_ns) noexcept nogil:
    """One turn of an idle loop. True: look at the ring again at once. False: sleep."""
    cdef uint64_t now_ns
    if idle.since_ns == 0:
        idle.since_ns = vf_now_ns()
        idle.turns = 0
        idle.lesson = &idle.of_storage if q.engine.inflight_count else &idle.of_driver
        q.shm_status.inflight_count = q.engine.inflight_count  # for whoever asks what we wait for
        idle.spinning = poll_ns != 0 and loop_may_spin(idle.lesson)
    if not idle.spinning:
        return False
    vf_cpu_relax()
    idle.turns += 1
    if idle.turns & SPIN_CLOCK_MASK:
        return True
    now_ns = vf_now_ns()
    if q.irq_hold.since_ns and vf_irq_hold_expired(&q.irq_hold, vf_vring_irq_owed(&q.vring), now_ns):
        queue_interrupt(q)
        idle.since_ns = 0  # only now does the driver know that it is its turn
        return True
    if q.irq_hold.since_ns or now_ns - idle.since_ns < poll_ns:
        return True
    idle.spinning = False
    idle.lesson.fail_streak += 1
    return False


cdef inline void loop_hear(vf_queue *q, uint32_t readable, int kick_fd) noexcept nogil:
    """Take note of the descriptors that became readable: bits WATCH_*."""
    cdef uint64_t kicks = 0
    if readable & WATCH_KICK and read(kick_fd, &kicks, sizeof(kicks)) == sizeof(kicks):
        q.counters.kicks += kicks
    if readable & (WATCH_CTL | VF_READABLE_NEWS):
        # A message, news from the store, or the supervisor is gone: either way Python looks at it.
        q.ctl_seen = vf_load_relaxed_u32(&q.ctl.ctl_seq) - 1


cdef inline bint loop_sleep(vf_queue *q, const int *fds) noexcept nogil:
    """Ask for a kick, look once more, sleep. True when the sleep was ended by its timer."""
    cdef pollfd polled[3]
    cdef uint32_t readable = 0
    cdef int i, ready
    cdef int timeout_ms = IRQ_RETRY_MS if q.irq_due else RELOOK_MS
    # With every slot taken the ring is of no interest: only storage can move things on.
    if q.free_count and vf_vring_kick_enable(&q.vring):
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


cdef inline int queue_run(
    vf_queue *q, int kick_fd, int ctl_fd, int wake_fd, uint64_t poll_ns, uint64_t irq_delay_ns
) noexcept nogil:
    """Serve until there is something for Python to do. Returns RUN_*."""
    cdef loop_idle idle
    cdef bint timed_out = False
    cdef int reason = 0
    cdef int moved
    cdef int fds[3]

    fds[0] = kick_fd
    fds[1] = ctl_fd
    fds[2] = wake_fd
    memset(&idle, 0, sizeof(idle))
    vf_vring_kick_disable(&q.vring)
    # Only a loop that spins comes back in time to what it holds.
    q.irq_hold.limit_ns = irq_delay_ns if poll_ns else 0
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
            loop_hear(q, q.engine.readable, kick_fd)
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
        if loop_spin(q, &idle, poll_ns):
            continue
        if q.irq_hold.since_ns:
            queue_interrupt(q)
        timed_out = loop_sleep(q, fds)
        vf_vring_kick_disable(&q.vring)
    if q.irq_hold.since_ns:
        queue_interrupt(q)
    q.irq_hold.limit_ns = 0
    return reason
