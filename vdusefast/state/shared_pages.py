"""The shared pages of a device: layout of csrc/base/counters.h and csrc/ring/inflight.h, and the reading side.

The supervisor makes the pages and rings the control word; each worker writes its queue's block; anybody reads.
Offsets are plain integers, so making the pages does not import NumPy; the reading functions do.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from vdusefast.base.page import round_up_to_pages
from vdusefast.errors import DeviceBusyError, VdusefastError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"VDUSFAST"
VERSION = 3
RING_SIZE_MAX = 32768  # each queue has room for the log of such a ring; only the part that it uses is in memory
LINE_BYTES = 64
NAME_MAX_BYTES = 63
LAST_IO_S = 10.0  # for the storage I/O of workers that were killed
LAST_IO_LOOK_S = 0.002

HIST_SUB_BITS = 5
HIST_SUB_COUNT = 1 << HIST_SUB_BITS
HIST_MAX_BITS = 40
HIST_BUCKET_COUNT = (HIST_MAX_BITS - HIST_SUB_BITS + 1) * HIST_SUB_COUNT

OPS = ("read", "write", "flush", "discard", "write_zeroes", "get_id", "other")
OP_FIELDS = ("requests", "bytes", "errors")
COUNTERS = (
    "requests",
    "batches",
    "kicks",
    "irqs",
    "irqs_suppressed",
    "spins",
    "sleeps",
    "relooks",
    "iotlb_misses",
    "bad_requests",
    "unsupported",
    "host_errors",
    "host_enospc",
    "host_eio",
    "last_host_errno",
    "ring_errors",
    "memory_faults",
    "invalidations",
)

INFLIGHT_MAGIC = b"VDUSELOG"
INFLIGHT_VERSION = 2
INFLIGHT_SPLIT = 0  # enum vf_log_format
INFLIGHT_PACKED = 1
INFLIGHT_SPLIT_IN_ORDER = 2
INFLIGHT_HEADER_BYTES = 64
INFLIGHT_ENTRY_BYTES = 16

HEADER_STRUCT = struct.Struct("=8s10IQ64s")
_STATUS = struct.Struct("=IIiIIIII")
FLUSH_FAILURE_OFFSET = HEADER_STRUCT.size  # of a word: vf_shm_header.flush_failure
_FLUSH_ERRNO_BITS = 16
LOG_HEADER_STRUCT = struct.Struct("=8sIHHIIIIII")  # struct vf_inflight_header
_LOG_STATE = struct.Struct("=I")
_LOG_STATE_OFFSET = 20
_LOG_ENTRY_COUNT_OFFSET = 16
_LOG_FORMAT = struct.Struct("=H")
_LOG_FORMAT_OFFSET = 12
_LOG_WORKING_OFFSET = 32
_U64 = struct.Struct("=Q")


def _round_up(value: int, step: int) -> int:
    return (value + step - 1) // step * step


HEADER_BYTES = round_up_to_pages(HEADER_STRUCT.size + 8)  # a worker maps the block of its queue alone
# From the start of a queue's block.
CTL_SEQ = 0
STATUS_OFFSET = LINE_BYTES
COUNTERS_OFFSET = 2 * LINE_BYTES
COUNTERS_BYTES = 8 * (len(COUNTERS) + len(OPS) * len(OP_FIELDS))
HIST_OFFSET = _round_up(COUNTERS_OFFSET + COUNTERS_BYTES, LINE_BYTES)
HIST_BYTES = 8 * len(OPS) * HIST_BUCKET_COUNT
INFLIGHT_OFFSET = _round_up(HIST_OFFSET + HIST_BYTES, LINE_BYTES)


class LogState(IntEnum):
    """Whether an in-flight log says anything (enum vf_log_state)."""

    VOID = 0  # nothing has been popped since the reset, or all of it was completed: start at the used index
    VALID = 1


class QueueState(IntEnum):
    """The state of a queue, as its worker reports it (enum vf_queue_state)."""

    STOPPED = 0
    RUNNING = 1
    QUIESCING = 2
    FAILED = 3


class Header(NamedTuple):
    """struct vf_shm_header."""

    magic: bytes
    version: int
    header_bytes: int
    queue_count: int
    queue_size: int
    queue_stride_bytes: int
    counters_offset: int
    hist_offset: int
    inflight_offset: int
    hist_bucket_count: int
    op_count: int
    created_ns: int  # CLOCK_REALTIME
    name: bytes


class StatusView(NamedTuple):
    """The last status that a worker has written."""

    state: int  # a QueueState
    pid: int
    cpu: int  # -1 = not pinned
    fail_reason: int  # 0 = none
    last_avail_idx: int
    last_used_idx: int
    inflight_count: int
    flushing: int  # flushes that are submitted to the store and have no result yet


class FlushFailure(NamedTuple):
    """Why every flush of a device fails."""

    errno: int
    since_s: int  # of CLOCK_REALTIME


def block_used_bytes(queue_size: int) -> int:
    """Return how many bytes of a queue's block a ring of that size needs, a multiple of a page."""
    log_bytes = INFLIGHT_HEADER_BYTES + queue_size * INFLIGHT_ENTRY_BYTES
    return round_up_to_pages(INFLIGHT_OFFSET + log_bytes)


QUEUE_STRIDE_BYTES = block_used_bytes(RING_SIZE_MAX)


def queue_offset(queue: int) -> int:
    """Return where the block of `queue` starts, in bytes from the start of the pages."""
    return HEADER_BYTES + queue * QUEUE_STRIDE_BYTES


def pages_bytes(queue_count: int) -> int:
    """Return the size of the shared pages in bytes. They have holes: see SharedPages.reserve_log."""
    return queue_offset(queue_count)


class SharedPages:
    """The mapped pages of one device. Owns its descriptor and mapping; `close` is idempotent.

    Made by `create` or `open`. `fd` may be inherited by workers.
    """

    def __init__(self, fd: int, header: Header, *, writable: bool) -> None:
        self.fd = fd
        self.queue_count = header.queue_count
        self.queue_size = header.queue_size
        self.name = header.name.rstrip(b"\0").decode(errors="replace")
        self.created_ns = header.created_ns
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self.map = mmap.mmap(fd, pages_bytes(self.queue_count), access=access)
        self.map.madvise(mmap.MADV_DONTDUMP)

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, name: str, queue_count: int, queue_size: int) -> SharedPages:
        """Make zeroed pages in a new file of mode 0600, replacing an old one; in a memfd when `path` is None.

        Raises VdusefastError when there is no room for them.
        """
        header = _make_header(name, queue_count, queue_size)
        where = "shared pages" if path is None else os.fspath(path)
        fd = -1
        try:
            if path is None:
                fd = os.memfd_create(f"vdusefast-{name}", os.MFD_CLOEXEC)
            else:
                Path(path).unlink(missing_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.ftruncate(fd, pages_bytes(queue_count))
            os.posix_fallocate(fd, 0, HEADER_BYTES)
            for queue in range(queue_count):
                _allocate_block(fd, queue, queue_size)
            os.pwrite(fd, HEADER_STRUCT.pack(*header), 0)
            return cls(fd, header, writable=True)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise VdusefastError(f"{name}: cannot make {where}: {error.strerror}") from None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = False) -> SharedPages:
        """Map existing pages. Raises VdusefastError when they are not what this version writes."""
        flags = os.O_RDWR if writable else os.O_RDONLY
        try:
            fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise VdusefastError(f"{os.fspath(path)}: cannot open the shared pages: {error.strerror}") from None
        try:
            return cls(fd, read_header(fd), writable=writable)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise VdusefastError(f"{os.fspath(path)}: not shared pages of this version: {error}") from None

    @classmethod
    def reopen(cls, path: str | os.PathLike[str], name: str, queue_count: int, queue_size: int) -> SharedPages:
        """Map the pages of a device whose server has ended, to adopt it.

        Waits up to LAST_IO_S for storage I/O that its workers have begun: a late write of the kernel must not overwrite
        a replayed one. Raises DeviceBusyError when that I/O does not end, VdusefastError for pages that are another
        device's, of another geometry, truncated or missing.
        """
        pages = cls.find(path, name, queue_count, queue_size)
        try:
            wait_unlocked(pages.fd, name)
        except BaseException:
            pages.close()
            raise
        return pages

    @classmethod
    def find(cls, path: str | os.PathLike[str], name: str, queue_count: int, queue_size: int) -> SharedPages:
        """Map the pages of a device that may be served now. Raises VdusefastError as `reopen`."""
        pages = cls.open(path, writable=True)
        found, wanted = (pages.name, pages.queue_count, pages.queue_size), (name, queue_count, queue_size)
        if found != wanted:
            pages.close()
            raise VdusefastError(
                f"{os.fspath(path)}: shared pages of {found[0]!r} with {found[1]} queues of {found[2]} entries, not of "
                f"{wanted[0]!r} with {wanted[1]} of {wanted[2]}: no server can adopt them"
            )
        return pages

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        if self.fd >= 0:
            self.map.close()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> SharedPages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def reserve_log(self, queue: int, ring_size: int) -> None:
        """Allocate the log of a ring of that size, which may be larger than the one offered.

        Raises VdusefastError where there is no space for it.
        """
        self._offset(queue)
        try:
            _allocate_block(self.fd, queue, ring_size)
        except OSError as error:
            raise VdusefastError(f"no room for the log of {ring_size} requests: {error.strerror}") from None

    def begin_log(
        self, queue: int, last_avail_idx: int, ring_format: int = INFLIGHT_SPLIT, ring_size: int | None = None
    ) -> None:
        """Make an empty log of `queue`, which starts at `last_avail_idx` (as uapi.VqInfo); no worker may serve it.

        ring_size: for which there is room; None = that which was offered.
        """
        entry_count = self.queue_size if ring_size is None else ring_size
        offset = self._offset(queue) + INFLIGHT_OFFSET
        self.void_log(queue)  # until all of it is there
        entries = offset + INFLIGHT_HEADER_BYTES
        length = entry_count * INFLIGHT_ENTRY_BYTES
        self.map[entries : entries + length] = bytes(length)
        kind = (INFLIGHT_MAGIC, INFLIGHT_VERSION, ring_format, INFLIGHT_ENTRY_BYTES, entry_count)
        # With nothing in flight a split queue stands at one index in both rings.
        last_used_idx = last_avail_idx >> 16 if ring_format == INFLIGHT_PACKED else last_avail_idx
        stands = (last_avail_idx & 0xFFFF, last_used_idx, 0, last_used_idx)
        LOG_HEADER_STRUCT.pack_into(self.map, offset, *kind, LogState.VOID, *stands)
        _LOG_STATE.pack_into(self.map, offset + _LOG_STATE_OFFSET, LogState.VALID)

    def void_log(self, queue: int) -> None:
        """Mark the log of `queue` void: its driver has reset the device. No worker may serve it."""
        _LOG_STATE.pack_into(self.map, self._offset(queue) + INFLIGHT_OFFSET + _LOG_STATE_OFFSET, LogState.VOID)

    def disown_log(self, queue: int) -> None:
        """Mark the log of `queue` foreign: its requests in flight are unknown.

        A worker continues only where the ring shows that nothing is in flight.
        """
        self.void_log(queue)
        offset = self._offset(queue) + INFLIGHT_OFFSET
        self.map[offset : offset + len(INFLIGHT_MAGIC)] = bytes(len(INFLIGHT_MAGIC))
        _LOG_STATE.pack_into(self.map, offset + _LOG_STATE_OFFSET, LogState.VALID)

    def log_is_void(self, queue: int) -> bool:
        """Return whether the log of `queue` says that nothing is in flight, whatever its entries are."""
        (state,) = _LOG_STATE.unpack_from(self.map, self._offset(queue) + INFLIGHT_OFFSET + _LOG_STATE_OFFSET)
        return bool(state == LogState.VOID)

    def requests_done(self, queue: int) -> int:
        """Return how many requests of `queue` have been completed: its first counter, without NumPy."""
        return int(_U64.unpack_from(self.map, self._offset(queue) + COUNTERS_OFFSET)[0])

    def has_inflight(self, queue: int) -> bool:
        """Return whether requests of `queue` have been popped and not completed, without NumPy."""
        header = self._offset(queue) + INFLIGHT_OFFSET
        (ring_format,) = _LOG_FORMAT.unpack_from(self.map, header + _LOG_FORMAT_OFFSET)
        if ring_format == INFLIGHT_PACKED and not self.log_is_void(queue):
            # A packed ring's entries do not tell: the worker's current request, or its count at its last wait, does.
            (working,) = _LOG_STATE.unpack_from(self.map, header + _LOG_WORKING_OFFSET)
            return bool(working or self.status(queue).inflight_count)
        (entry_count,) = _LOG_STATE.unpack_from(self.map, header + _LOG_ENTRY_COUNT_OFFSET)
        start = header + INFLIGHT_HEADER_BYTES
        end = start + min(entry_count, RING_SIZE_MAX) * INFLIGHT_ENTRY_BYTES
        if self.log_is_void(queue) or not self.map[start:end].strip(b"\0"):
            return False
        with memoryview(self.map) as pages, pages[start:end] as entries, entries.cast("Q") as words:
            return any(words[:: INFLIGHT_ENTRY_BYTES // 8])  # the orders; 0 = not in flight

    def flush_failure(self) -> FlushFailure | None:
        """Return why every flush of the device fails, None when none does."""
        (word,) = _U64.unpack_from(self.map, FLUSH_FAILURE_OFFSET)
        return FlushFailure(word & ((1 << _FLUSH_ERRNO_BITS) - 1), word >> _FLUSH_ERRNO_BITS) if word else None

    def fail_flushes(self, error: int) -> None:
        """Let every flush fail with `error`, an errno, from now on, unless they fail already."""
        if self.flush_failure() is None:
            self._set_flush_failure(int(time.time()) << _FLUSH_ERRNO_BITS | error)

    def forgive_flushes(self) -> None:
        """Let flushes be carried out again."""
        self._set_flush_failure(0)

    def _set_flush_failure(self, word: int) -> None:
        at = FLUSH_FAILURE_OFFSET
        with memoryview(self.map) as pages, pages[at : at + 8] as place, place.cast("Q") as words:
            words[0] = word  # one aligned 64-bit store

    def ring_ctl(self, queue: int) -> None:
        """Add one to the control word of `queue`: its worker has a message. Only the supervisor does this."""
        offset = self._offset(queue) + CTL_SEQ
        with memoryview(self.map) as pages, pages[offset : offset + 4] as word, word.cast("I") as seq:
            seq[0] = (seq[0] + 1) & 0xFFFFFFFF  # one aligned 32-bit store

    def status(self, queue: int) -> StatusView:
        """Return the last status that the worker of `queue` has written."""
        return StatusView(*_STATUS.unpack_from(self.map, self._offset(queue) + STATUS_OFFSET))

    def counters(self, queue: int) -> Any:
        """Return a copy of the counters of `queue`: a NumPy record of `counters_dtype`."""
        import numpy as np

        return np.frombuffer(self.map, counters_dtype(), 1, self._offset(queue) + COUNTERS_OFFSET)[0].copy()

    def hist(self, queue: int, op: int | str) -> npt.NDArray[np.uint64]:
        """Return a copy of the latency histogram of one operation (a name in OPS or its index): counts per bucket."""
        import numpy as np

        index = OPS.index(op) if isinstance(op, str) else range(len(OPS))[op]
        offset = self._offset(queue) + HIST_OFFSET + index * 8 * HIST_BUCKET_COUNT
        return np.frombuffer(self.map, np.uint64, HIST_BUCKET_COUNT, offset).copy()

    def _offset(self, queue: int) -> int:
        if not 0 <= queue < self.queue_count:
            raise IndexError(f"{self.name}: queue {queue} of {self.queue_count}")
        return queue_offset(queue)


def _allocate_block(fd: int, queue: int, ring_size: int) -> None:
    """Allocate the part of a queue's block that a ring of that size needs, so that a full file system is an error here
    and no SIGBUS in a worker. Raises OSError.
    """
    os.posix_fallocate(fd, queue_offset(queue), block_used_bytes(ring_size))


def wait_unlocked(fd: int, name: str) -> None:
    """Wait until no worker, and no storage I/O of one, holds its lock on the pages `fd`. Raises DeviceBusyError."""
    deadline = time.monotonic() + LAST_IO_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DeviceBusyError(
                    f"{name}: storage I/O of its last server's workers has not ended: its storage hangs; try again "
                    "when that is back"
                ) from None
            time.sleep(LAST_IO_LOOK_S)
        else:
            fcntl.flock(fd, fcntl.LOCK_UN)
            return


def header_dtype() -> np.dtype[Any]:
    """Return struct vf_shm_header as a NumPy dtype."""
    import numpy as np

    words = [(field, "<u4") for field in Header._fields[1:-2]]
    rest = [("created_ns", "<u8"), ("name", "S64"), ("flush_failure", "<u8")]
    return np.dtype([("magic", "S8"), *words, *rest])


def status_dtype() -> np.dtype[Any]:
    """Return struct vf_shm_status as a NumPy dtype."""
    import numpy as np

    fields = [(field, "<i4" if field == "cpu" else "<u4") for field in StatusView._fields]
    return np.dtype([*fields, ("reserved", "<u4", (8,))])


def counters_dtype() -> np.dtype[Any]:
    """Return struct vf_counters as a NumPy dtype."""
    import numpy as np

    op = np.dtype([(field, "<u8") for field in OP_FIELDS])
    return np.dtype([*((field, "<u8") for field in COUNTERS), ("op", op, (len(OPS),))])


def inflight_header_dtype() -> np.dtype[Any]:
    """Return struct vf_inflight_header as a NumPy dtype."""
    import numpy as np

    words = [
        (field, "<u4")
        for field in ("entry_count", "state", "last_avail_idx", "last_used_idx", "working", "next_used_idx")
    ]
    kind = [("magic", "S8"), ("version", "<u4"), ("ring_format", "<u2"), ("entry_bytes", "<u2")]
    return np.dtype([*kind, *words, ("reserved", "<u4", (6,))])


def _make_header(name: str, queue_count: int, queue_size: int) -> Header:
    encoded = name.encode()
    if len(encoded) > NAME_MAX_BYTES:
        raise VdusefastError(f"{name}: a name is at most {NAME_MAX_BYTES} bytes")
    return Header(
        MAGIC,
        VERSION,
        HEADER_BYTES,
        queue_count,
        queue_size,
        QUEUE_STRIDE_BYTES,
        COUNTERS_OFFSET,
        HIST_OFFSET,
        INFLIGHT_OFFSET,
        HIST_BUCKET_COUNT,
        len(OPS),
        time.time_ns(),
        encoded,
    )


def read_header(fd: int) -> Header:
    """Return the header in `fd`, checked. Raises ValueError that names the mismatch."""
    packed = os.pread(fd, HEADER_STRUCT.size, 0)
    if len(packed) < HEADER_STRUCT.size:
        raise ValueError("too short")
    header = Header(*HEADER_STRUCT.unpack(packed))
    if header.magic != MAGIC:
        raise ValueError("wrong magic")
    if header.version != VERSION:
        raise ValueError(f"layout version {header.version}, expected {VERSION}")
    size = header.queue_size
    if not (1 <= header.queue_count <= 1024 and 2 <= size <= RING_SIZE_MAX and size & (size - 1) == 0):
        raise ValueError(f"{header.queue_count} queues of {size} entries")
    expected = header._replace(
        header_bytes=HEADER_BYTES,
        queue_stride_bytes=QUEUE_STRIDE_BYTES,
        counters_offset=COUNTERS_OFFSET,
        hist_offset=HIST_OFFSET,
        inflight_offset=INFLIGHT_OFFSET,
        hist_bucket_count=HIST_BUCKET_COUNT,
        op_count=len(OPS),
    )
    if header != expected:
        raise ValueError("another geometry")
    wanted, actual = pages_bytes(header.queue_count), os.fstat(fd).st_size
    if actual != wanted:
        raise ValueError(f"{actual} bytes, expected {wanted}")
    return header
