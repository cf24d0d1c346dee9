"""The driver's side of a loopback device: what virtio-blk and virtio_ring are in a kernel.

`LoopbackDriver` negotiates with a device on a LoopbackBus, puts rings and buffers into several regions at non-zero
IOVAs, and offers plain reads and writes as well as the raw rings. The rings themselves are `_driver.Ring`.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vdusefast.base.page import PAGE_BYTES, round_up_to_pages
from vdusefast.driver._driver import Ring
from vdusefast.errors import TimedOutError
from vdusefast.transport import TransportError, uapi
from vdusefast.transport.virtio_blk import (
    ID_BYTES,
    KNOWN_FEATURES,
    RANGE,
    REQUEST_HEADER,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
    WRITE_ZEROES_UNMAP,
    config_fields,
)
from vdusefast.units import SECTOR_BYTES

if TYPE_CHECKING:
    from vdusefast.driver._driver import Segment
    from vdusefast.transport.loopback_region import Region

FIRST_IOVA = 0x1_0000_0000
REGION_GAP_BYTES = 0x10_0000  # so that running off the end of one region never lands in the next
DATA_BYTES = 1 << 20  # of one queue's buffer for plain reads and writes
STATUS_OFFSET = 64
RANGES_OFFSET = 128
STATUS_UNSET = 0xFF
REQUEST_TIMEOUT_S = 30.0

_ERRNO_BY_STATUS = {1: errno.EIO, 2: errno.EOPNOTSUPP}


class Bus(Protocol):
    """The methods of a LoopbackBus that the driver needs."""

    offered_features: int
    queue_count: int
    queue_size_max: int

    @property
    def config(self) -> bytes:
        """The configuration space."""

    def add_region(self, iova: int, size_bytes: int, perm: int = 3) -> Region:
        """Let the device reach new memory at `iova`."""

    def remove_region(self, iova: int) -> None:
        """Take it away."""

    def negotiate(self, features: int) -> None:
        """Go through the status up to FEATURES_OK."""

    def set_vq(
        self, index: int, size: int, desc_addr: int, driver_addr: int, device_addr: int, last_avail_idx: int = 0
    ) -> None:
        """Set up a queue."""

    def set_vq_ready(self, index: int, ready: bool = True) -> None:
        """Make a queue ready."""

    def driver_ok(self) -> None:
        """Start the device."""

    def kickfd(self, index: int) -> int:
        """Return the eventfd that kicks a queue."""

    def irqfd(self, index: int) -> int:
        """Return the eventfd by which a queue interrupts."""

    def reset(self) -> None:
        """Stop the device."""


class BlkConfig(NamedTuple):
    """The configuration space of a block device (VIRTIO 1.3, 5.2.4), as far as the driver uses it."""

    capacity_sectors: int
    size_max_bytes: int
    seg_max: int
    block_size_bytes: int
    queue_count: int
    discard_max_sectors: int
    discard_max_seg: int
    write_zeroes_max_sectors: int
    write_zeroes_max_seg: int

    @classmethod
    def parse(cls, space: bytes) -> BlkConfig:
        """Read it from the bytes of the configuration space."""
        fields = config_fields(space)
        return cls(
            capacity_sectors=fields["capacity"],
            size_max_bytes=fields["size_max"],
            seg_max=fields["seg_max"],
            block_size_bytes=fields["blk_size"],
            queue_count=fields["num_queues"],
            discard_max_sectors=fields["max_discard_sectors"],
            discard_max_seg=fields["max_discard_seg"],
            write_zeroes_max_sectors=fields["max_write_zeroes_sectors"],
            write_zeroes_max_seg=fields["max_write_zeroes_seg"],
        )


def area_sizes(queue_size: int, *, packed: bool = False) -> tuple[int, int, int]:
    """Return the bytes of a queue's three areas.

    They are descriptor table, available ring and used ring (VIRTIO 1.3, 2.7), or in a packed queue the descriptor ring
    and the driver's and the device's event suppression structures (2.8).
    """
    if packed:
        return 16 * queue_size, 4, 4
    return 16 * queue_size, 6 + 2 * queue_size, 6 + 8 * queue_size


@dataclass
class _Buffers:
    """One queue's memory for plain requests: header, status and ranges in one region, data in another."""

    head: Region
    data: Region
    lock: threading.Lock = field(default_factory=threading.Lock)


class LoopbackDriver:
    """A driver of one loopback device; a context manager. Negotiates and starts the device when made.

    Plain requests (`read` ... `get_id`) may come from any thread, one at a time on each queue. `ring` and
    `submit_chain` are for tests and benchmarks: one thread at a time, and not beside plain requests on that queue.
    """

    def __init__(
        self, bus: Bus, *, queue_size: int | None = None, features: int | None = None, first_idx: int | None = None
    ) -> None:
        """Take the device on `bus`.

        queue_size: descriptors in each vq; the largest that the device allows when None. features: a mask of
        uapi.VIRTIO_*, all that is offered and understood when None. first_idx: where the rings start, as
        `uapi.VqInfo.last_avail_idx`; at their beginning when None. Raises VdusefastError when the device refuses.
        """
        self.bus = bus
        self.features = bus.offered_features & KNOWN_FEATURES if features is None else features
        self.queue_size = queue_size or bus.queue_size_max
        self._next_iova = FIRST_IOVA
        self._regions: list[Region] = []
        self._rings: list[Ring] = []
        self._buffers: dict[int, _Buffers] = {}
        self._tables: dict[int, Region] = {}
        self._lock = threading.RLock()
        self._closed = False
        try:
            self._start(uapi.fresh_vq_state(self.features) if first_idx is None else first_idx)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LoopbackDriver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Reset the device and give up the memory; a second call does nothing.

        Any thread may call it. Requests of other threads end with ValueError.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True  # no region is added any more
        try:
            self.bus.reset()
            for ring in self._rings:
                ring.close()  # no thread uses its memory any more
            for region in self._regions:
                self.bus.remove_region(region.iova)
        except TransportError:
            return  # the device is gone or broken; its server reports why, and the memory goes with the bus
        finally:
            for ring in self._rings:
                ring.close()
            self._buffers.clear()
            self._tables.clear()
            self._regions.clear()

    # -- the device

    @property
    def config(self) -> BlkConfig:
        """The configuration space as it is now."""
        return BlkConfig.parse(self.bus.config)

    @property
    def capacity_bytes(self) -> int:
        """Size of the device."""
        return self.config.capacity_sectors * SECTOR_BYTES

    @property
    def block_size_bytes(self) -> int:
        """Smallest unit of a read or write."""
        return self.config.block_size_bytes if self.has(uapi.VIRTIO_BLK_F_BLK_SIZE) else SECTOR_BYTES

    @property
    def queue_count(self) -> int:
        """Number of queues."""
        return len(self._rings)

    @property
    def size_max_bytes(self) -> int:
        """Largest data segment."""
        return self.config.size_max_bytes if self.has(uapi.VIRTIO_BLK_F_SIZE_MAX) else 0xFFFFFFFF

    @property
    def seg_max(self) -> int:
        """Most data segments in one request."""
        return self.config.seg_max if self.has(uapi.VIRTIO_BLK_F_SEG_MAX) else 1

    def has(self, feature: int) -> bool:
        """Return True when `feature` (a mask of uapi.VIRTIO_*) was negotiated."""
        return self.features & feature == feature

    def ring(self, queue: int) -> Ring:
        """Return the driver's side of a vq."""
        return self._rings[queue]

    def add_region(self, size_bytes: int, perm: int = uapi.VDUSE_ACCESS_RW) -> Region:
        """Return new memory that the device may reach, at an IOVA of the driver's choice."""
        size_bytes = round_up_to_pages(size_bytes)
        with self._lock:
            if self._closed:
                raise ValueError("the driver is closed")
            region = self.bus.add_region(self._next_iova, size_bytes, perm)
            self._next_iova += -(-size_bytes // REGION_GAP_BYTES) * REGION_GAP_BYTES + REGION_GAP_BYTES
            self._regions.append(region)
        return region

    def memory_at(self, iova: int, size_bytes: int) -> memoryview:
        """Return memory that the device may reach, such as a ring area. Raises KeyError for one without a region."""
        for region in self._regions:
            if region.iova <= iova and iova + size_bytes - 1 <= region.last:
                first = iova - region.iova
                return memoryview(region.buf)[first : first + size_bytes]
        raise KeyError(f"no region holds {size_bytes} bytes at {iova:#x}")

    # -- plain requests

    def read(self, offset_bytes: int, length_bytes: int, *, queue: int = 0) -> bytes:
        """Return `length_bytes` bytes at `offset_bytes`, both multiples of 512.

        Raises OSError with the errno of the answer, TimedOutError.
        """
        out = bytearray()
        for sector, part_bytes in self._parts(offset_bytes, length_bytes):
            out += self._request(VIRTIO_BLK_T_IN, sector, queue, read_bytes=part_bytes)
        return bytes(out)

    def write(self, offset_bytes: int, data: bytes | bytearray | memoryview, *, queue: int = 0) -> None:
        """Write `data` at `offset_bytes`, both multiples of 512. Raises as `read` does."""
        view = memoryview(data).cast("B")
        for sector, part_bytes in self._parts(offset_bytes, len(view)):
            start = sector * SECTOR_BYTES - offset_bytes
            self._request(VIRTIO_BLK_T_OUT, sector, queue, data=view[start : start + part_bytes])

    def flush(self, *, queue: int = 0) -> None:
        """Make every write finished before durable. Without the FLUSH feature writes are durable as they finish."""
        if self.has(uapi.VIRTIO_BLK_F_FLUSH):
            self._request(VIRTIO_BLK_T_FLUSH, 0, queue)

    def discard(self, offset_bytes: int, length_bytes: int, *, queue: int = 0) -> None:
        """Give up the content of a range."""
        self._ranges(VIRTIO_BLK_T_DISCARD, [(offset_bytes, length_bytes, 0)], queue)

    def write_zeroes(self, offset_bytes: int, length_bytes: int, *, unmap: bool = False, queue: int = 0) -> None:
        """Make a range read as zeros; with `unmap` the store may give up its space."""
        flags = WRITE_ZEROES_UNMAP if unmap else 0
        self._ranges(VIRTIO_BLK_T_WRITE_ZEROES, [(offset_bytes, length_bytes, flags)], queue)

    def get_id(self, *, queue: int = 0) -> str:
        """Return the device's serial."""
        raw = self._request(VIRTIO_BLK_T_GET_ID, 0, queue, read_bytes=ID_BYTES)
        return raw.split(b"\0", 1)[0].decode("ascii", errors="replace")

    def submit_chain(
        self, chain: Sequence[Segment], *, queue: int = 0, indirect: bool = False, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> int:
        """Send one chain of (iova, length_bytes, writable), wait for it, and return what the device wrote, in bytes.

        Raises TimedOutError, and OSError(EPROTO) when the device breaks the used ring.
        """
        ring = self._rings[queue]
        if indirect:
            table = self._table(queue, 16 * len(chain))
            head = ring.add_indirect(chain, table.address, table.iova)
        else:
            head = ring.add(chain)
        ring.publish()
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if ring.wait(20):
                for done, _cookie, written_bytes in ring.reap():
                    if done == head:
                        return written_bytes
        raise TimedOutError(f"queue {queue}: no answer within {timeout_s:g} s")

    # -- inside

    def _start(self, first_idx: int) -> None:
        self.bus.negotiate(self.features)
        layouts = [self._set_up_vq(index, first_idx) for index in range(self.bus.queue_count)]
        self.bus.driver_ok()
        for index, (desc, driver, device) in enumerate(layouts):
            ring = Ring(
                index,
                self.queue_size,
                desc_va=desc,
                driver_va=driver,
                device_va=device,
                kick_fd=self.bus.kickfd(index),
                irq_fd=self.bus.irqfd(index),
                event_idx=self.has(uapi.VIRTIO_RING_F_EVENT_IDX),
                packed=self.has(uapi.VIRTIO_F_RING_PACKED),
                in_order=self.has(uapi.VIRTIO_F_IN_ORDER),
                start=first_idx,
            )
            self._rings.append(ring)

    def _set_up_vq(self, index: int, first_idx: int) -> tuple[int, int, int]:
        """Make ring memory, tell the bus, and return the three areas' addresses in this process."""
        packed = self.has(uapi.VIRTIO_F_RING_PACKED)
        sizes = area_sizes(self.queue_size, packed=packed)
        offsets = [0, 0, 0]
        offsets[1] = round_up_to_pages(sizes[0])
        offsets[2] = offsets[1] + round_up_to_pages(sizes[1])
        region = self.add_region(offsets[2] + sizes[2])
        if not packed:  # before the device starts: it may look at the indices at once
            struct.pack_into("<H", region.buf, offsets[1] + 2, first_idx)
            struct.pack_into("<H", region.buf, offsets[2] + 2, first_idx)
        iovas = [region.iova + offset for offset in offsets]
        self.bus.set_vq(index, self.queue_size, iovas[0], iovas[1], iovas[2], first_idx)
        self.bus.set_vq_ready(index, True)
        vas = [region.address + offset for offset in offsets]
        return vas[0], vas[1], vas[2]

    def _queue_buffers(self, queue: int) -> _Buffers:
        with self._lock:
            if queue not in self._buffers:
                self._buffers[queue] = _Buffers(self.add_region(PAGE_BYTES), self.add_region(DATA_BYTES))
            return self._buffers[queue]

    def _table(self, queue: int, size_bytes: int) -> Region:
        """Return memory for a queue's indirect table; one at a time is in use."""
        with self._lock:
            table = self._tables.get(queue)
            if table is None or table.size_bytes < size_bytes:
                table = self._tables[queue] = self.add_region(size_bytes)
            return table

    def _parts(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
        """Cut a range into (sector, bytes) that one request can carry."""
        if offset_bytes % SECTOR_BYTES or length_bytes % SECTOR_BYTES or offset_bytes < 0 or length_bytes < 0:
            raise ValueError(f"offset {offset_bytes} and length {length_bytes} must be multiples of {SECTOR_BYTES}")
        room = self.queue_size - 2 if not self.has(uapi.VIRTIO_RING_F_INDIRECT_DESC) else self.seg_max
        most = min(DATA_BYTES, self.size_max_bytes * max(1, min(self.seg_max, room)))
        most -= most % self.block_size_bytes
        starts = range(offset_bytes, offset_bytes + length_bytes, most)
        return [(at // SECTOR_BYTES, min(most, offset_bytes + length_bytes - at)) for at in starts]

    def _segments(self, iova: int, length_bytes: int, writable: bool) -> list[Segment]:
        step = self.size_max_bytes
        return [(iova + at, min(step, length_bytes - at), writable) for at in range(0, length_bytes, step)]

    def _ranges(self, kind: int, ranges: list[tuple[int, int, int]], queue: int) -> None:
        sectors = [(o // SECTOR_BYTES, n // SECTOR_BYTES, f) for o, n, f in ranges]
        if any(o % SECTOR_BYTES or n % SECTOR_BYTES for o, n, _f in ranges):
            raise ValueError(f"offset and length must be multiples of {SECTOR_BYTES}")
        self._request(kind, 0, queue, ranges=b"".join(RANGE.pack(*r) for r in sectors))

    def _request(
        self,
        kind: int,
        sector: int,
        queue: int,
        *,
        data: memoryview | None = None,
        ranges: bytes = b"",
        read_bytes: int = 0,
    ) -> bytes:
        """Carry out one request of header, data and status; returns the data that was read."""
        buffers = self._queue_buffers(queue)
        head, body = buffers.head, buffers.data
        with buffers.lock:
            REQUEST_HEADER.pack_into(head.buf, 0, kind, 0, sector)
            head.buf[STATUS_OFFSET] = STATUS_UNSET
            chain: list[Segment] = [(head.iova, REQUEST_HEADER.size, False)]
            if data is not None:
                body.buf[: len(data)] = data
                chain += self._segments(body.iova, len(data), False)
            if ranges:
                head.buf[RANGES_OFFSET : RANGES_OFFSET + len(ranges)] = ranges
                chain.append((head.iova + RANGES_OFFSET, len(ranges), False))
            chain += self._segments(body.iova, read_bytes, True)
            chain.append((head.iova + STATUS_OFFSET, 1, True))
            written_bytes = self._submit(chain, queue)
            status = head.buf[STATUS_OFFSET]
            if status:
                number = _ERRNO_BY_STATUS.get(status, errno.EPROTO)
                raise OSError(number, f"request type {kind} at sector {sector}: {os.strerror(number)}")
            if written_bytes not in (0, read_bytes + 1):  # 0: a null store moves nothing
                raise OSError(errno.EPROTO, f"device wrote {written_bytes} bytes where {read_bytes + 1} were due")
            return body.buf[:read_bytes]

    def _submit(self, chain: list[Segment], queue: int) -> int:
        """Send a chain directly, or through a table in the queue's first region when the ring is too small for it."""
        ring = self._rings[queue]
        if len(chain) <= ring.size:
            return self.submit_chain(chain, queue=queue)
        return self.submit_chain(chain, queue=queue, indirect=True)
