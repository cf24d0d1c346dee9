"""A worker's virtqueue: the owner of the tables in csrc and of the loop in _loop.pxd. Imported by the worker alone."""

import os

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport UINT64_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from vdusefast.worker._virtio_blk cimport *
from vdusefast.worker._csrc cimport *
from vdusefast.worker._layout cimport shm_layout
from vdusefast.worker._loop cimport *
from vdusefast.worker._recover cimport *
from vdusefast.worker._ring_errors cimport poison_text, ring_error_text
from vdusefast.worker._store cimport *

from vdusefast.base._build cimport vf_build_id
from vdusefast.base.build import check_extension

check_extension(__name__, vf_build_id())

CONTROL = RUN_CONTROL
FAILED = RUN_FAILED
STOP = RUN_STOP
UNMAPPED = RUN_UNMAPPED

PERM_RO = VF_PERM_RO
PERM_WO = VF_PERM_WO
PERM_RW = VF_PERM_RW

SLOT_MAX = VF_SLOT_MAX
HEADER_BYTES = vf_shm_layout_of().header_bytes


cdef int _check(int rc, str what) except -1:
    """Turn -errno into an OSError: the one place that does."""
    if rc < 0:
        raise OSError(-rc, f"{os.strerror(-rc)}: {what}")
    return rc


def install_stop(int wake_fd):
    """Make SIGTERM and SIGINT end `Queue.run` with STOP; borrows the eventfd `wake_fd`, which wakes a sleeping loop."""
    _check(vf_stop_install(wake_fd), "signal handlers")


def stop_requested():
    """Tell whether SIGTERM or SIGINT has come."""
    return bool(vf_stop_flag()[0])


def die_with_parent(int parent_pid):
    """Have the kernel kill this process when the thread that started it ends. Raises OSError (ESRCH: it has ended)."""
    _check(vf_die_with_parent(parent_pid), "the supervisor has ended")


def mark_io_flusher():
    """Mark this thread, and all that it starts, as an I/O flusher. Raises OSError (EPERM: CAP_SYS_RESOURCE is missing)."""
    _check(vf_io_flusher_set(), "cannot be marked as I/O flusher")


def lock_memory():
    """Lock the used pages of all current mappings in memory. Raises OSError (EPERM, ENOMEM: RLIMIT_MEMLOCK)."""
    _check(vf_memory_lock(), "memory cannot be locked")


def block_extent(uint32_t index):
    """Return (offset, length) in bytes of a queue's block of the shared pages."""
    cdef vf_shm_layout layout = vf_shm_layout_of()
    return layout.header_bytes + index * <uint64_t> layout.stride_bytes, layout.stride_bytes


def block_used_bytes(uint32_t queue_size):
    """Return how many bytes of a queue's block a ring of that size needs, whole pages."""
    return vf_shm_block_bytes(queue_size)


cdef class Queue:
    """One virtqueue of a virtio-blk device: rings, IOTLB, engine, and the loop over them.

    `pages` is a writable buffer of the queue's block of the shared pages, kept until close(), as is `header`, of their first
    HEADER_BYTES, which all queues of the device share. Sizes are in bytes, sectors of 512. Raises ValueError, MemoryError.
    """

    cdef vf_queue *q
    cdef Py_buffer pages
    cdef bint has_pages
    cdef Py_buffer header
    cdef bint has_header
    cdef bint started
    cdef object plugin  # keeps a module's engine alive
    cdef vf_faulty *faulty  # rules for the engine that is opened next; NULL: none, or it is open
    cdef readonly str note  # a remark of the last start, which succeeded; "" = none

    def __cinit__(
        self,
        pages,
        *,
        uint32_t queue_size,
        uint64_t capacity_sectors,
        uint32_t block_size=512,
        bint read_only=False,
        uint32_t seg_max=126,
        uint32_t size_max_bytes=0,
        uint32_t discard_max_sectors=0,
        uint32_t discard_max_seg=0,
        uint32_t write_zeroes_max_sectors=0,
        uint32_t write_zeroes_max_seg=0,
        bint ignores_discards=False,
        bint keeps_zeroes=False,
        serial="",
        header=None,
    ):
        cdef vf_blk_device device
        cdef bytes ident = serial.encode()[:VF_BLK_ID_BYTES].ljust(VF_BLK_ID_BYTES, b"\0")
        self.q = NULL
        self.faulty = NULL
        self.has_pages = False
        self.has_header = False
        self.note = ""
        if block_size < 512 or block_size & (block_size - 1):
            raise ValueError(f"block size of {block_size} bytes is no power of two from 512")
        memset(&device, 0, sizeof(device))
        device.capacity_sectors = capacity_sectors
        device.block_sectors = block_size // 512
        device.seg_max = seg_max
        device.size_max_bytes = size_max_bytes
        device.discard_max_sectors = discard_max_sectors
        device.discard_max_seg = discard_max_seg
        device.write_zeroes_max_sectors = write_zeroes_max_sectors
        device.write_zeroes_max_seg = write_zeroes_max_seg
        device.ignores_discards = ignores_discards
        device.keeps_zeroes = keeps_zeroes
        device.read_only = read_only
        memcpy(device.serial, <const char *> ident, VF_BLK_ID_BYTES)
        PyObject_GetBuffer(pages, &self.pages, PyBUF_WRITABLE)
        self.has_pages = True
        if self.pages.len < vf_shm_layout_of().stride_bytes:
            raise ValueError(f"{self.pages.len} bytes of shared pages are too few for a queue")
        self.q = vf_queue_create(&device, queue_size, self.pages.buf)
        if self.q == NULL:
            raise ValueError("queue size, seg_max or the segments of a discard are out of range (or no memory)")
        if header is not None:
            PyObject_GetBuffer(header, &self.header, PyBUF_WRITABLE)
            self.has_header = True
            if self.header.len < HEADER_BYTES:
                raise ValueError(f"a header of {self.header.len} bytes")
            vf_queue_use_header(self.q, <vf_shm_header *> self.header.buf)

    def __dealloc__(self):
        self.close()

    cpdef close(self):
        """Free everything; mappings go. Nothing may be in flight. Idempotent."""
        vf_queue_destroy(self.q)
        self.q = NULL
        vf_faulty_free(self.faulty)
        self.faulty = NULL
        self.plugin = None
        if self.has_pages:
            self.has_pages = False
            PyBuffer_Release(&self.pages)
        if self.has_header:
            self.has_header = False
            PyBuffer_Release(&self.header)

    cdef vf_queue *_open(self) except NULL:
        if self.q == NULL:
            raise ValueError("the queue is closed")
        return self.q

    def open_engine(self, str name, *, str store, int fd=-1, uint64_t size_bytes=0, str cache="writeback",
                    uint32_t direct_align=0, uint32_t granule=0, int lock_fd=-1, int witness_fd=-1, hold_fds=(), bint map_reads=True,
                    bint sqpoll=False, bint merge=True, uint64_t discard_unit=0, uint64_t discard_offset=0):
        """Open engine `name` (sync, uring, cached, memory, null, fail) over a store, whose descriptor is borrowed.

        granule: bytes of the store's smallest block, possibly larger than the device's. lock_fd: a file (borrowed) that all
        workers of the device have, for record locks on such blocks; -1: this is the only worker.
        witness_fd: another open file description of a file (borrowed), of this queue alone. It reports failed write-backs
        that the kernel has already reported to another queue's flush.
        hold_fds: at most two descriptors (borrowed) that stay open until the last request has ended, also when this process
        is killed before.
        map_reads: let the sync engine read a file on tmpfs through a mapping; `maps_reads` says whether it does.
        merge: let the engines sync and cached carry out adjacent requests of a batch by one call.
        sqpoll: let a kernel thread pop the submission queue of a ring.
        discard_unit: bytes that the store frees at a time; the first such unit begins at `discard_offset`.
        Raises OSError when the kernel refuses (ENOSYS, EPERM: no io_uring; EOPNOTSUPP: cached, and the store cannot be
        read without waiting), ValueError for an unknown name.
        """
        cdef vf_store described
        cdef vf_queue *q = self._open()
        cdef vf_store_kind kind = store_kind(store)
        cdef bytes encoded = name.encode()
        cdef const vf_engine_ops *ops = vf_engine_find(encoded)
        if ops == NULL:
            raise ValueError(f"no engine is called {name!r}")
        if not ops.stores >> <int> kind & 1:
            raise ValueError(f"engine {name!r} cannot serve a store of kind {store!r}")
        if store == "memory" and size_bytes < q.device.capacity_sectors * VF_SECTOR_BYTES:
            raise ValueError(f"a memory of {size_bytes} bytes is smaller than the device")  # no read would notice
        store_describe(&described, q, kind, size_bytes, cache)
        described.fd = fd
        described.witness_fd = witness_fd
        described.direct_align = direct_align
        described.granule = max(granule, direct_align)
        store_check_granule(described.granule)
        described.emulates = described.granule > q.device.block_sectors * VF_SECTOR_BYTES
        described.pieces.unit_bytes = max(discard_unit, described.granule)
        described.pieces.offset_bytes = discard_offset
        described.lock_fd = lock_fd
        described.map_reads = map_reads
        described.sqpoll = sqpoll
        described.merge = merge and VF_SEED_FAULT != VF_SEED_WRITE_EARLY  # it answers what would be held
        store_hold(&described, hold_fds)
        _check(vf_engine_open(self._place(), ops, &described, q.slot_count), f"engine {name}")
        self._opened()

    def open_plugin(self, plugin, *, uint64_t size_bytes, str cache="writeback"):
        """Open the engine that a backend's module provides: `plugin.engine` is a capsule. Keeps `plugin`.

        Returns its name. Raises OSError (EPROTO: it was built for another version), ValueError if it is no engine.
        """
        cdef vf_store described
        cdef vf_queue *q = self._open()
        cdef const vf_engine_plugin *brought = <const vf_engine_plugin *> PyCapsule_GetPointer(
            plugin.engine, VF_ENGINE_CAPSULE)
        store_describe(&described, q, VF_STORE_PLUGIN, size_bytes, cache)
        _check(vf_engine_open_plugin(self._place(), brought, &described, q.slot_count), "the engine of a backend's module")
        self.plugin = plugin
        self._opened()
        return brought.ops.name.decode()

    def lock_memory(self):
        """Lock the current mappings in memory, except the store's bytes and the driver's memory. Call it after the engine is
        open and before the driver's memory is mapped. Raises OSError.
        """
        cdef vf_queue *q = self._open()
        _check(vf_memory_lock_used(), "memory cannot be locked")
        vf_store_unlock_memory(&q.engine.store)

    def inject_faults(self, faults, *, uint64_t seed=1):
        """Put rules (backends.faulty.Fault, at most 16) in front of the engine that is opened next. Raises OSError, ValueError."""
        cdef vf_queue *q = self._open()
        if q.engine.ops != NULL or self.faulty != NULL:
            raise ValueError("an engine is open already, or has rules")
        self.faulty = store_faults([(fault, os.fsencode(fault.path)) for fault in faults], seed, q.slot_count)

    cdef vf_engine *_place(self) noexcept:
        """Return the place of the engine that is opened next; call _opened() afterwards."""
        return &self.q.engine if self.faulty == NULL else vf_faulty_inner(self.faulty)

    cdef void _opened(self) noexcept:
        if self.faulty != NULL:
            vf_faulty_attach(&self.q.engine, self.faulty)
            self.faulty = NULL

    def set_port_kernel(self, int fd, uint32_t api_version, uint32_t index):
        """Fetch regions and interrupt through `fd`, a descriptor of /dev/vduse/NAME, which is borrowed."""
        vf_port_kernel_init(&self._open().port, fd, api_version, index)

    def use_memory(self, int fd, uint64_t length_bytes):
        """Map the region [0, length_bytes - 1] from the memfd `fd` (borrowed), whose pages replace all of the kernel's
        bounce pages from now on; 0 bytes: map it from the kernel's file. Call it after set_port_kernel().
        """
        vf_port_kernel_use_memory(&self._open().port, fd, length_bytes)

    def set_port_loopback(self, int fd, int irq_fd, uint32_t index):
        """Fetch regions over the bus socket `fd` and interrupt by the eventfd `irq_fd`; both are borrowed."""
        vf_port_loopback_init(&self._open().port, fd, irq_fd, index)

    def set_port_none(self, int irq_fd=-1):
        """Serve only what map_region() has entered; interrupts go to the eventfd `irq_fd`, borrowed."""
        vf_port_none_init(&self._open().port, irq_fd)

    def map_region(self, uint64_t start, uint64_t last, uint32_t perm, int fd, uint64_t offset_bytes=0):
        """Enter [start, last] of IOVAs, backed by `fd` (borrowed) at `offset_bytes`. Raises OSError."""
        _check(vf_iotlb_map(&self._open().tlb, start, last, perm, fd, offset_bytes), f"region [{start:#x}, {last:#x}]")

    def invalidate(self, uint64_t start, uint64_t last):
        """Drain, then drop every mapping that overlaps [start, last]. Returns the number dropped."""
        cdef vf_queue *q = self._open()
        cdef uint32_t dropped
        with nogil:
            self._drain()
            q.vring.mapped = 0  # the next round maps it again, if it is still there
            dropped = vf_iotlb_drop(&q.tlb, start, last)
            q.counters.invalidations += 1
        return dropped

    def set_capacity(self, uint64_t capacity_sectors):
        """Set the device's capacity to `capacity_sectors`. If it shrinks, drain first.

        Raises ValueError for a store in memory that is smaller.
        """
        cdef vf_queue *q = self._open()
        if q.engine.ops != NULL and q.engine.store.kind == VF_STORE_MEMORY and (
                capacity_sectors > q.engine.store.size_bytes // VF_SECTOR_BYTES):
            raise ValueError(f"a memory of {q.engine.store.size_bytes} bytes is smaller than the device")
        if capacity_sectors < q.device.capacity_sectors:
            with nogil:
                self._drain()  # no write may go beyond the new end, as the store is about to be truncated
        if q.engine.ops != NULL:
            vf_store_resize(&q.engine.store, capacity_sectors * VF_SECTOR_BYTES)
        q.device.capacity_sectors = capacity_sectors

    cdef void _drain(self) noexcept nogil:
        if self.started:
            queue_drain(self.q)

    def start(self, *, uint64_t acked_features, uint32_t size, uint64_t desc_addr, uint64_t driver_addr,
              uint64_t device_addr, uint32_t last_avail_idx=0, bint recover=False):
        """Map the rings at these IOVAs and be ready to run. Raises OSError (EINVAL) for a bad size, RingError.

        last_avail_idx: the position. Of a split ring: the avail index. Of a packed one, as in vhost: slot and wrap
        counter (bit 15) of the next chain to pop, and in the upper half of the next one to complete; both must be
        equal.
        recover: continue by the in-flight log of the previous worker; `last_avail_idx` counts only for a packed ring from
        which nothing was ever popped.
        """
        cdef vf_queue *q = self._open()
        cdef uint32_t adopted = 0
        cdef int err
        if q.engine.ops == NULL:
            raise ValueError("no engine is open")
        self._drain()
        self.started = False
        queue_set_state(q, VF_QUEUE_STOPPED)
        _check(vf_vring_setup(&q.vring, acked_features, size, desc_addr, driver_addr, device_addr,
                              q.inflight, q.inflight_log), "virtqueue size")
        _check(vf_queue_fit(q, size), "descriptor chains")
        err = vf_vring_map(&q.vring, &q.tlb)
        if err:
            raise RingError(ring_error_text(-err))
        q.faults_seen = q.counters.memory_faults  # a fault from here on fails the queue
        self.note = ""
        if q.vring.is_packed and last_avail_idx >> 16 != last_avail_idx & 0xFFFF:
            raise RingError("this packed ring has requests in flight, and no in-flight log to continue by")
        if recover:
            adopted = self._adopt(last_avail_idx & 0xFFFF)
        else:
            err = queue_begin_log(q, last_avail_idx & 0xFFFF)
            if err:
                raise RingError(ring_error_text(-err))
        store_use_features(q, acked_features)
        q.ring_error = VF_RING_OK
        q.shm_status.fail_reason = VF_RING_OK
        self.started = True
        queue_set_state(q, VF_QUEUE_RUNNING)
        if recover:
            with nogil:
                err = queue_redo(q, adopted)
                if err:
                    queue_fail(q, err)
            if q.poison.count:
                self.note = poison_text(&q.poison)

    cdef int _adopt(self, uint16_t state) except -1:
        """Continue by the log, or by the ring alone if nothing is outstanding. Requests in flight. Raises RingError."""
        cdef vf_queue *q = self.q
        cdef int err = queue_adopt(q, state)
        if err >= 0:
            return err
        if err == -VF_RING_POISON or not vf_takeover_is_idle(&q.vring):
            raise RingError(ring_error_text(-err))
        vf_takeover_begin(&q.vring, q.inflight, q.inflight_log, state)
        queue_align_order(q)
        self.note = f"{ring_error_text(-err)}; no request was outstanding, so the queue continues by the ring itself"
        return 0

    def run(self, int kick_fd, int ctl_fd, int wake_fd, int64_t poll_us, uint64_t irq_delay_us=0):
        """Serve the queue, without the GIL, until CONTROL, FAILED, STOP or UNMAPPED is returned.

        poll_us: longest spin; negative: it never ends, so the loop makes no system call of its own, and does not read a kick
        that comes all the same. irq_delay_us: longest time that a spinning loop coalesces an interrupt with later ones.
        UNMAPPED: since an invalidation the rings lie in no region, as while a driver changes its map; run again later.
        """
        cdef vf_queue *q = self._open()
        cdef loop_waits waits
        cdef int reason
        waits.fds[0], waits.fds[1], waits.fds[2] = kick_fd, ctl_fd, wake_fd
        waits.poll_ns = UINT64_MAX if poll_us < 0 else <uint64_t> poll_us * 1000  # 584 years: no spin is in vain
        waits.irq_delay_ns = irq_delay_us * 1000
        reason = self._reason_to_wait()
        if reason:
            return reason
        if not q.engine.ops.instant:
            _check(vf_publisher_start(&q.publisher, queue_publish_during_call, q), "the thread that publishes while storage hangs")
        with nogil:
            reason = queue_run(q, &waits)
        return reason

    def poll(self):
        """Do one round and return how many requests were popped or finished; -1 when the ring has failed.

        Does nothing while the rings are unmapped.
        """
        cdef vf_queue *q = self._open()
        cdef int moved, reason = self._reason_to_wait()
        if reason:
            return 0 if reason == RUN_UNMAPPED else -1
        with nogil:
            moved = queue_round(q)
            if moved < 0:
                queue_fail(q, moved)
        return moved if moved >= 0 else -1

    cdef int _reason_to_wait(self) except -1:
        """Map the rings again after an invalidation. 0; RUN_UNMAPPED, which may pass; or RUN_FAILED. Raises ValueError."""
        cdef int err
        if not self.started:
            raise ValueError("the queue is not started")
        if self.q.ring_error:
            return RUN_FAILED
        err = 0 if self.q.vring.mapped else vf_vring_map(&self.q.vring, &self.q.tlb)
        if err and err != -VF_RING_UNMAPPED:
            queue_fail(self.q, err)
            return RUN_FAILED
        return RUN_UNMAPPED if err else 0

    def quiesce(self):
        """Drain and stop; the driver is asked for kicks again.

        Returns (the position, as `last_avail_idx` of start(); last_used_idx; whether requests are pending for which no
        kick will come).
        """
        cdef vf_queue *q = self._open()
        cdef bint waiting = False
        cdef uint32_t stands
        with nogil:
            queue_set_state(q, VF_QUEUE_QUIESCING)
            self._drain()
            if self.started and q.vring.mapped and not q.ring_error:
                waiting = vf_vring_kick_enable(&q.vring)
            queue_set_state(q, VF_QUEUE_STOPPED)
        self.started = False
        stands = <uint32_t> vf_vring_avail_state(&q.vring)
        if q.vring.is_packed:
            stands |= <uint32_t> vf_vring_used_state(&q.vring) << 16
        return stands, vf_vring_used_state(&q.vring), waiting

    def control_seen(self):
        """Note the control word: all messages up to now are read next."""
        cdef vf_queue *q = self._open()
        q.ctl_seen = vf_load_relaxed_u32(&q.ctl.ctl_seq)

    def identify(self, int pid, int cpu):
        """Write pid and cpu (-1: not pinned) into the shared pages."""
        cdef vf_queue *q = self._open()
        q.shm_status.pid = <uint32_t> pid
        q.shm_status.cpu = cpu
        queue_set_state(q, VF_QUEUE_STOPPED)

    def guard(self):
        """Survive vanished pages of the driver's memory (SIGBUS); for the one queue of a process."""
        _check(vf_queue_guard(self._open()), "SIGBUS handler")

    @property
    def failure(self):
        """Why the ring has failed, or an empty string."""
        return ring_error_text(self._open().ring_error)

    @property
    def inflight_count(self):
        """Requests that the engine holds."""
        return self._open().engine.inflight_count

    @property
    def maps_reads(self):
        """Whether the engine reads the store through a mapping."""
        return self._open().engine.store.read_map.base != NULL

    @property
    def fixed_buffers(self):
        """How many bytes of mapped regions are registered buffers, and the errno that ended registration (0: none)."""
        cdef vf_queue *q = self._open()
        cdef uint64_t registered_bytes = 0
        cdef int refused = 0
        if q.engine.ops == &vf_engine_uring:
            vf_uring_fixed(&q.engine, &registered_bytes, &refused)
        return registered_bytes, -refused

    @property
    def region_count(self):
        """Mapped regions."""
        return self._open().tlb.region_count


class RingError(Exception):
    """The rings cannot be used; the message says why."""


def layout():
    """Return the layout of the shared pages as C sees it, for the test that compares it with shared_pages.py."""
    return shm_layout()


def hist_bucket(uint64_t ns):
    """Return the histogram bucket that counts a latency of `ns`."""
    return vf_hist_bucket(ns)
