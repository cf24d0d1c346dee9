# cython: language_level=3
"""The driver's side of a device at C speed: owner classes around csrc/driver/.

A `Ring` is one vq, a `Job` one benchmark job, a `DriverThread` runs jobs on rings with the GIL released. Memory that the
device shares is borrowed as plain addresses: the caller keeps it mapped while a ring or job uses it.
"""
import os
import time

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from vdusefast.driver._driver cimport *

from vdusefast.base._build cimport vf_build_id
from vdusefast.base.build import check_extension

check_extension(__name__, vf_build_id())

SEGMENTS_MAX = VF_DRV_SEGMENTS_MAX
DATA_SEGMENTS_MAX = VF_DRV_DATA_SEGMENTS_MAX
SLOT_BYTES = VF_DRV_SLOT_BYTES
QUEUES_MAX = VF_DRV_QUEUES_MAX
BLOCK_UNKNOWN = VF_BLOCK_UNKNOWN
HIST_BUCKET_COUNT = VF_HIST_BUCKET_COUNT
OPS = ("read", "write", "trim", "sync", "check")
KINDS = ("read", "write", "mixed", "trim")
VERIFIES = ("none", "crc32c", "pattern")
ORDERS = ("sequential", "random_once", "random")
FAULTS = ("none", "status", "used_len", "no_header", "offset", "seed", "generation", "length", "checksum", "pattern")
PHASES = ("run", "check", "done")
PACKED_FRESH = 0x80008000  # `start` of a new packed ring: slot 0, both wrap counters 1
WAIT_SLICE_MS = 50  # of a sleep, then it is seen that the ring is to be closed
CLOSE_PAUSE_S = 0.001

vf_crc32c_init()


def crc32c(const uint8_t[::1] data, uint32_t crc=0):
    """Return the CRC-32C of `data`, continuing `crc`."""
    return vf_crc32c(crc, &data[0] if data.shape[0] else NULL, data.shape[0])


def crc32c_soft(const uint8_t[::1] data, uint32_t crc=0):
    """Return the same by the table, whatever the CPU offers."""
    return (~vf_crc32c_soft(~crc, &data[0] if data.shape[0] else NULL, data.shape[0])) & 0xFFFFFFFF


def fill_block(uint8_t[::1] block, uint64_t offset_bytes, uint32_t generation, uint32_t seed):
    """Write into `block` what verify=crc32c writes at `offset_bytes` of the device."""
    if block.shape[0] < 64 or block.shape[0] % 8:
        raise ValueError("a block has a multiple of 8 bytes, 64 or more")
    cdef vf_block_expect expect = vf_block_expect(offset_bytes, generation, seed)
    vf_block_fill(&block[0], <uint32_t>block.shape[0], &expect)


def check_block(const uint8_t[::1] block, uint64_t offset_bytes, uint32_t generation=0, uint32_t seed=0):
    """Return "none" when `block` is a good block of that offset, else the name of what is wrong (one of FAULTS).

    With generation 0, any generation and seed will do.
    """
    if block.shape[0] < 64:
        raise ValueError("a block has 64 bytes or more")
    cdef vf_block_expect want = vf_block_expect(offset_bytes, generation, seed)
    cdef vf_drv_fault fault
    fault.kind = 0
    vf_block_check(&block[0], <uint32_t>block.shape[0], &want, &fault)
    return FAULTS[fault.kind]


def sequence(str order, uint64_t count, uint64_t seed, uint64_t length):
    """Return the first `length` blocks that a job over `count` blocks visits."""
    cdef vf_drv_seq seq
    if count == 0:
        raise ValueError("count must be 1 or more")
    vf_drv_seq_init(&seq, ORDERS.index(order), count, seed)
    return [vf_drv_seq_next(&seq) for _ in range(length)]


cdef object _error(int rc, str what):
    return OSError(-rc, f"{what}: {os.strerror(-rc)}")


cdef class Ring:
    """The driver's side of one vq, split or packed. One thread at a time uses it; any thread may close() it.

    The areas are zeroed memory. `start` is where the device begins, with nothing in flight: the free-running index of a
    split ring; of a packed one the next descriptor's slot, with the wrap counter in bit 15, and the same again in the upper
    half, for used descriptors (uapi.VqInfo has the same encoding).
    """

    cdef vf_drv_queue queue
    cdef vf_drv_desc_state *state
    cdef vf_drv_segment segments[1024]
    cdef bint closing
    cdef int waiter_count  # threads in the ring without the GIL
    cdef list runners  # of those, DriverThreads

    def __cinit__(self, *args, **kwargs):
        self.state = NULL
        self.closing = False
        self.waiter_count = 0
        self.runners = []

    def __init__(self, uint32_t index, uint32_t size, *, uintptr_t desc_va, uintptr_t driver_va, uintptr_t device_va,
                 int kick_fd, int irq_fd, bint event_idx, bint packed=False, bint in_order=False, start=None):
        if self.state != NULL:
            raise ValueError("ring is initialised already")
        if not 2 <= size <= 32768 or size & (size - 1):
            raise ValueError(f"queue size {size} is no power of two from 2 to 32768")
        self.state = <vf_drv_desc_state *>calloc(size, sizeof(vf_drv_desc_state))
        if self.state == NULL:
            raise MemoryError()
        cdef vf_drv_vq_params params
        params.desc, params.driver, params.device = <void *>desc_va, <void *>driver_va, <void *>device_va
        params.state, params.size = self.state, size
        params.start = (PACKED_FRESH if packed else 0) if start is None else start
        params.packed, params.event_idx, params.in_order = packed, event_idx, in_order
        if vf_drv_vq_init(&self.queue.vq, &params):
            raise ValueError(f"ring areas are misaligned, or {params.start:#x} is no place in the ring")
        vf_drv_vq_disable_irq(&self.queue.vq)
        self.queue.index = index
        self.queue.kick_fd = kick_fd
        self.queue.irq_fd = irq_fd

    def __dealloc__(self):
        free(self.state)

    cdef int check_open(self) except -1:
        if self.state == NULL or self.closing:
            raise ValueError("ring is closed")
        return 0

    def close(self):
        """Forget the ring memory, which no thread uses when this returns. A second call does nothing.

        Every later call raises ValueError, and so does a `wait` in another thread; a DriverThread is abandoned.
        """
        self.closing = True
        while self.waiter_count:
            for runner in list(self.runners):
                runner.stop(abandon=True)
            time.sleep(CLOSE_PAUSE_S)
        free(self.state)
        self.state = NULL

    cdef int take(self, chain) except -1:
        self.check_open()
        if not 0 < len(chain) <= 1024:
            raise ValueError("a chain has 1 to 1024 segments")
        cdef uint32_t i = 0
        for iova, len_bytes, writable in chain:
            self.segments[i] = vf_drv_segment(iova, len_bytes, 1 if writable else 0)
            i += 1
        self.check_open()  # the chain may have run code of its own
        return <int>i

    def add(self, chain, uint32_t cookie=0):
        """Add a chain of (iova, len_bytes, writable) as direct descriptors; returns its head.

        Raises BlockingIOError when too few descriptors are free.
        """
        cdef int count = self.take(chain)
        cdef int rc = vf_drv_vq_add(&self.queue.vq, self.segments, count, cookie)
        if rc < 0:
            raise BlockingIOError(-rc, "no room in the ring")
        return rc

    def add_indirect(self, chain, uintptr_t table_va, uint64_t table_iova, uint32_t cookie=0):
        """Add a chain through an indirect table of 16 bytes a segment at `table_va`; returns its head."""
        cdef int count = self.take(chain)
        cdef int rc = vf_drv_vq_add_indirect(&self.queue.vq, <void *>table_va, table_iova, self.segments, count, cookie)
        if rc < 0:
            raise BlockingIOError(-rc, "no room in the ring")
        return rc

    def publish(self):
        """Show the device what was added, and kick it if it wants that. Returns True when it was kicked."""
        self.check_open()
        cdef uint64_t before = self.queue.kicks
        vf_drv_queue_publish(&self.queue)
        return self.queue.kicks != before

    def kick(self):
        """Kick the device whether it wants it or not."""
        self.check_open()
        vf_drv_queue_kick(&self.queue)

    def reap(self):
        """Return the finished chains as a list of (head, cookie, written_bytes).

        Raises OSError(EPROTO) when the device gave back what is not in flight, or not next under IN_ORDER; what came
        before that is returned first.
        """
        self.check_open()
        cdef vf_drv_used used[64]
        cdef int count = 64
        cdef int i
        result = []
        while count == 64 and len(result) < self.queue.vq.size:
            self.check_open()
            count = vf_drv_vq_reap(&self.queue.vq, used, 64)
            for i in range(count):
                result.append((used[i].head, used[i].cookie, used[i].written_bytes))
        if count < 0 and not result:
            raise _error(count, f"queue {self.queue.index}: the device broke the ring")
        return result

    def wait(self, int timeout_ms):
        """Sleep until a chain is finished, for `timeout_ms` at most. Returns True when one is."""
        self.check_open()
        cdef vf_drv_queue *queue = &self.queue
        cdef int left_ms = timeout_ms, slice_ms
        deadline_s = time.monotonic() + timeout_ms / 1e3
        self.waiter_count += 1
        try:
            while True:
                slice_ms = WAIT_SLICE_MS if timeout_ms < 0 or left_ms > WAIT_SLICE_MS else left_ms
                with nogil:
                    vf_drv_queues_sleep(&queue, 1, slice_ms)
                PyErr_CheckSignals()
                self.check_open()
                if vf_drv_vq_has_used(&self.queue.vq):
                    return True
                if timeout_ms >= 0:
                    left_ms = <int>((deadline_s - time.monotonic()) * 1e3)
                    if left_ms <= 0:
                        return False
        finally:
            self.waiter_count -= 1

    @property
    def index(self):
        """Number of the queue."""
        return self.queue.index

    @property
    def size(self):
        """Descriptors in the ring."""
        return self.queue.vq.size

    @property
    def free_count(self):
        """Descriptors that are free."""
        return self.queue.vq.free_count

    @property
    def inflight(self):
        """Chains shown to the device and not reaped."""
        return vf_drv_vq_inflight(&self.queue.vq)

    @property
    def avail_idx(self):
        """Free-running index of the chains added."""
        return self.queue.vq.avail_idx

    @property
    def last_used_idx(self):
        """Free-running index of the chains reaped."""
        return self.queue.vq.last_used_idx

    @property
    def position(self):
        """Where a device stands that has finished all that was added, encoded as `start`."""
        return vf_drv_vq_position(&self.queue.vq)

    def take_gap_s(self):
        """Return the longest time between two completions, in seconds, since this was called last; in any thread."""
        gap_ns = vf_load_relaxed_u64(&self.queue.gap_max_ns)
        vf_store_relaxed_u64(&self.queue.gap_max_ns, 0)
        return gap_ns / 1e9

    def counters(self):
        """Return what the driver counted: kicks sent, interrupts taken, chains and batches published."""
        return {"kicks": self.queue.kicks, "irqs": self.queue.irqs, "requests": self.queue.published,
                "batches": self.queue.batches}


cdef class Job:
    """One benchmark job: its plan, its tables and its results. See jobs.JobPlan for what the arguments mean."""

    cdef vf_drv_job job
    cdef uint8_t *pattern
    cdef object __weakref__

    def __cinit__(self, *args, **kwargs):
        self.pattern = NULL

    def __init__(self, *, str kind, str order, uint64_t offset_bytes, uint64_t block_count, uint32_t block_bytes,
                 uint32_t depth, uint64_t io_limit, uintptr_t slot_va, uint64_t slot_iova, uintptr_t data_va,
                 uint64_t data_iova, uint64_t data_stride_bytes, uintptr_t table_va=0, uint64_t table_iova=0,
                 uint64_t table_stride_bytes=0, uint32_t segment_count=3, uint32_t size_max_bytes=131072,
                 double read_share=0.5, uint32_t fsync_every=0, str verify="none", bytes pattern=b"",
                 bint check_after=False, uint32_t seed=1, uint64_t order_seed=1, double ramp_s=0.0,
                 double runtime_s=0.0, bint indirect=False, bint moves_no_data=False, bint overlap=False):
        cdef vf_drv_job *job = &self.job
        if job.slots != NULL:
            raise ValueError("job is initialised already")
        if not 0 < depth < 65536 or block_count == 0 or block_bytes % 512 or block_bytes == 0 or size_max_bytes == 0:
            raise ValueError("depth, block count, block size or size_max out of range")
        if not 2 <= segment_count <= VF_DRV_SEGMENTS_MAX:
            raise ValueError(f"segment count {segment_count} out of range")
        if <uint32_t>len(pattern) != (block_bytes if verify == "pattern" else 0):
            raise ValueError("verify=pattern takes a pattern of one block, and nothing else takes one")
        job.kind = KINDS.index(kind)
        job.verify = VERIFIES.index(verify)
        job.seed = seed
        job.offset_bytes = offset_bytes
        job.block_count = block_count
        job.io_limit = io_limit
        job.block_bytes = block_bytes
        job.depth = depth
        job.read_share = <uint32_t>min(read_share * 4294967296.0, 4294967295.0)
        job.fsync_every = fsync_every
        job.size_max_bytes = size_max_bytes
        job.segment_count = segment_count
        job.ramp_ns = <uint64_t>(ramp_s * 1e9)
        job.runtime_ns = <uint64_t>(runtime_s * 1e9)
        job.check_after = check_after and kind in ("write", "mixed")
        job.indirect = indirect
        job.moves_no_data = moves_no_data
        job.overlap = overlap
        job.slot_va = <uint8_t *>slot_va
        job.slot_iova = slot_iova
        job.data_va = <uint8_t *>data_va
        job.data_iova = data_iova
        job.data_stride_bytes = data_stride_bytes
        job.table_va = <uint8_t *>table_va
        job.table_iova = table_iova
        job.table_stride_bytes = table_stride_bytes
        vf_drv_seq_init(&job.order, ORDERS.index(order), block_count, order_seed)
        vf_drv_seq_init(&job.read_order, ORDERS.index(order), block_count, order_seed + 0x5EAD)
        self.allocate(pattern)

    cdef int allocate(self, bytes pattern) except -1:
        cdef vf_drv_job *job = &self.job
        job.slots = <vf_drv_slot *>calloc(job.depth, sizeof(vf_drv_slot))
        job.free_slots = <uint32_t *>calloc(job.depth, 4)
        if job.slots == NULL or job.free_slots == NULL:
            raise MemoryError()
        if job.verify:
            job.blocks = <uint32_t *>calloc(job.block_count, 4)
            if job.blocks == NULL:
                raise MemoryError()
        if pattern:
            self.pattern = <uint8_t *>calloc(1, len(pattern))
            if self.pattern == NULL:
                raise MemoryError()
            memcpy(self.pattern, <const uint8_t *>pattern, len(pattern))
            job.pattern = self.pattern
        return 0

    def __dealloc__(self):
        free(self.job.slots)
        free(self.job.free_slots)
        free(self.job.blocks)
        free(self.pattern)

    def fill_buffers(self, uint64_t seed):
        """Fill the data buffers with bytes that do not compress, for writes that are not verified."""
        cdef uint64_t i
        for i in range(self.job.depth):
            vf_fill_words(self.job.data_va + i * self.job.data_stride_bytes, (seed + i) * 0x9E3779B97F4A7C15ULL,
                          self.job.block_bytes // 8)

    def forget(self, uint64_t first_block, uint64_t block_count):
        """Expect nothing of these blocks of the job until it writes them: an earlier job trimmed them."""
        if self.job.blocks == NULL:
            return
        if first_block + block_count > self.job.block_count:
            raise ValueError("blocks out of range")
        cdef uint64_t i
        for i in range(first_block, first_block + block_count):
            self.job.blocks[i] = VF_BLOCK_UNKNOWN

    def journal(self):
        """Return what is known of each block, as native 32-bit words: the generation of the last acknowledged write.

        0: never written; BLOCK_UNKNOWN: nothing is known. Not while the job runs. b"" for a job that does not verify.
        """
        if self.job.blocks == NULL:
            return b""
        return (<const uint8_t *>self.job.blocks)[:4 * self.job.block_count]

    @property
    def phase(self):
        """One of PHASES."""
        return PHASES[self.job.phase]

    def progress(self):
        """Return (requests, bytes) finished so far, those of the verification phase included; callable while it runs."""
        cdef uint64_t ios = 0, total = 0
        cdef int op
        for op in range(VF_DRV_OP_COUNT):
            ios += self.job.stats[op].ios
            total += self.job.stats[op].bytes
        return ios, total

    def errors(self):
        """Return (request errors, verification errors) so far; callable while it runs."""
        return self.job.request_errors, self.job.verify_errors

    def results(self):
        """Return the figures as plain values; a histogram is bytes of HIST_BUCKET_COUNT native 64-bit counts."""
        cdef vf_drv_job *job = &self.job
        cdef vf_drv_stats *stats
        ops = {}
        for op, name in enumerate(OPS):
            stats = &job.stats[<int>op]
            ops[name] = {
                "ios": stats.ios, "bytes": stats.bytes, "lat_sum_ns": stats.lat_sum_ns,
                "lat_min_ns": stats.lat_min_ns if stats.ios else 0, "lat_max_ns": stats.lat_max_ns,
                "hist": (<const uint8_t *>stats.hist)[:8 * VF_HIST_BUCKET_COUNT],
            }
        return {
            "ops": ops, "run_ns": job.end_ns - job.measure_ns if job.end_ns > job.measure_ns else 0,
            "start_ns": job.start_ns, "end_ns": job.end_ns,
            "check_ns": job.check_end_ns - job.check_start_ns,
            "request_errors": job.request_errors, "verify_errors": job.verify_errors, "verified": job.verified,
            "faults": [self.fault(i) for i in range(job.fault_count)],
        }

    cdef dict fault(self, uint32_t i):
        cdef vf_drv_fault *fault = &self.job.faults[i]
        return {
            "kind": FAULTS[fault.kind], "op": OPS[fault.op], "offset_bytes": fault.offset_bytes,
            "block": fault.offset_bytes // self.job.block_bytes, "expected": fault.expected, "found": fault.found,
            "where": fault.where,
        }


cdef class DriverThread:
    """Rings and jobs that one thread drives."""

    cdef vf_drv_thread thread
    cdef vf_drv_job **jobs
    cdef object keep

    def __cinit__(self, *args, **kwargs):
        self.jobs = NULL

    def __init__(self, rings, jobs, *, double spin_us=0.0, double stall_s=30.0):
        cdef vf_drv_thread *t = &self.thread
        cdef Ring ring
        cdef Job job
        if self.jobs != NULL:
            raise ValueError("thread is initialised already")
        if not 0 < len(rings) <= VF_DRV_QUEUES_MAX or not 0 < len(jobs) < 65536:
            raise ValueError("a driver thread takes 1 to 64 rings and 1 to 65535 jobs")
        self.keep = (list(rings), list(jobs))
        self.jobs = <vf_drv_job **>calloc(len(jobs), sizeof(void *))
        if self.jobs == NULL:
            raise MemoryError()
        t.jobs = self.jobs
        t.job_count = len(jobs)
        t.queue_count = len(rings)
        t.spin_ns = <uint64_t>(spin_us * 1e3)
        t.stall_ns = <uint64_t>(stall_s * 1e9)
        smallest = min(r.size for r in rings)
        for i, ring in enumerate(rings):
            ring.check_open()
            t.queues[<int>i] = &ring.queue
        for i, job in enumerate(jobs):
            if not job.job.indirect and job.job.segment_count > smallest:
                raise ValueError(f"a request takes {job.job.segment_count} descriptors, the queue has {smallest}")
            if job.job.overlap and len(rings) > 1:
                raise ValueError("overlapping writes are ordered on one queue only")
            job.job.id = i
            job.job.next_queue = i % len(rings)
            self.jobs[<int>i] = &job.job

    def __dealloc__(self):
        free(self.jobs)

    def run(self):
        """Run the jobs to their end with the GIL released.

        Raises OSError: ECANCELED when abandoned, ETIMEDOUT when nothing finishes for `stall_s` seconds, EPROTO when the
        device broke a ring, EBUSY when requests of an earlier run have not been answered. ValueError when a ring is
        closed.
        """
        cdef int rc
        cdef Ring ring
        rings = self.keep[0]
        for ring in rings:
            ring.check_open()
        for ring in rings:
            ring.waiter_count += 1
            ring.runners.append(self)
        try:
            with nogil:
                rc = vf_drv_thread_run(&self.thread)
        finally:
            for ring in rings:
                ring.runners.remove(self)
                ring.waiter_count -= 1
        if rc:
            raise _error(rc, f"queue {self.thread.failed_queue}")

    def stop(self, *, bint abandon=False):
        """Ask a running loop to issue nothing more and finish, or, with `abandon`, to return at once."""
        vf_store_relaxed_u32(&self.thread.stop, 2 if abandon else 1)

    def counters(self):
        """Return how often the thread slept and how often spinning sufficed."""
        return {"sleeps": self.thread.sleeps, "spins": self.thread.spins}
