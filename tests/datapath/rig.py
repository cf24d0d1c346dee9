"""A real Queue in this process over memory, a ring and a store of the models'."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from device_model import DeviceModel, Params, View
from model import (
    F_IN_ORDER,
    F_PACKED,
    RO,
    RW,
    SECTOR_BYTES,
    T_OUT,
    WRITE,
    Desc,
    Memory,
    Reason,
    Region,
    Ring,
    RingBroken,
    header,
)
from packed_model import PackedDeviceModel, PackedRing

from vdusefast.state import shared_pages
from vdusefast.worker import _datapath

RING_IOVA = 0x10_0000
DATA_IOVA = 0x4000_0000
IN_IOVA = DATA_IOVA  # what the device reads, in the plain set-up
OUT_IOVA = DATA_IOVA + 0x10_0000  # what it writes
DISK_DIR = Path(__file__).parent.parent.parent / "build"  # knows O_DIRECT and RWF_NOWAIT; /tmp may be a tmpfs
PUBLISH_BATCH = {"memory": 8, "sync": 4, "uring": 16, "cached": 4, "null": 16, "fail": 16}


def file_engines() -> list[str]:
    """Return the engines for files that this machine allows."""
    pages = mmap.mmap(-1, shared_pages.QUEUE_STRIDE_BYTES)
    queue = _datapath.Queue(pages, queue_size=2, capacity_sectors=1)
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        queue.open_engine("uring", store="file", fd=fd, size_bytes=512)
        return ["sync", "uring"]
    except OSError:
        return ["sync"]
    finally:
        queue.close()
        pages.close()
        os.close(fd)


def pattern(size: int, seed: int = 1) -> bytes:
    """Return bytes that differ from sector to sector."""
    period = min(size, 256 * SECTOR_BYTES)
    first = bytes((i // SECTOR_BYTES * 7 + i + seed * 31) & 0xFF for i in range(period))
    return first * (size // period) + first[: size % period] if period else b""


@contextmanager
def store_on_disk(size_bytes: int) -> Iterator[Path]:
    """Make a file with a pattern, on the file system of this checkout, for as long as it is used."""
    path = DISK_DIR / f"store-{os.getpid()}.img"
    path.write_bytes(pattern(size_bytes))
    try:
        yield path
    finally:
        path.unlink()


class Rig:
    """A queue that is started over `regions` and a store of capacity_sectors; nothing in flight between calls.

    plugin: the engine of a backend's module, in place of `engine`. engine_options: more of `Queue.open_engine`.
    """

    def __init__(
        self,
        params: Params = Params(),  # noqa: B008 (frozen)
        *,
        size: int = 16,
        engine: str = "memory",
        store_fd: int | None = None,
        start_idx: int | None = None,
        regions: Sequence[Region] | None = None,
        ring_perms: tuple[int, int, int] | None = None,
        start: bool = True,
        cache: str = "writeback",
        plugin: Any = None,
        size_max_bytes: int = 0,
        **engine_options: Any,
    ) -> None:
        self.params, self.engine = params, engine
        desc, avail, used = RING_IOVA, RING_IOVA + 0x10_0000, RING_IOVA + 0x20_0000
        self.packed = bool(params.features & F_PACKED)
        sizes = (16 * size, 4, 4) if self.packed else (16 * size, 6 + 2 * size, 6 + 8 * size)
        perms = ring_perms or ((RW, RO, RW) if self.packed else (RO, RO, RW))
        areas = [Region(*area) for area in zip((desc, avail, used), sizes, perms, strict=True)]
        if regions is None:
            regions = [Region(IN_IOVA, 0x1_0000), Region(OUT_IOVA, 0x1_0000)]
        self.memory = Memory([*areas, *regions])
        # Tests of one format use what only that has; those of both go by what the two have in common.
        make_ring: Any = PackedRing if self.packed else Ring
        make_model: Any = PackedDeviceModel if self.packed else DeviceModel
        if start_idx is None:
            start_idx = 1 << 15 if self.packed else 0
        self.ring = make_ring(self.memory, size, desc, avail, used, start_idx)
        bytes_in_store = params.capacity_sectors * SECTOR_BYTES
        self.store = bytearray(pattern(bytes_in_store))
        self.owns_store = store_fd is None
        self.store_fd = os.memfd_create("store", os.MFD_CLOEXEC) if store_fd is None else store_fd
        if self.owns_store:
            os.pwrite(self.store_fd, self.store, 0)
        self.model = make_model(params, self.ring, self.store, PUBLISH_BATCH[engine])
        self.irq_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.pages = mmap.mmap(-1, shared_pages.QUEUE_STRIDE_BYTES)
        self._cache, self._plugin, self._engine_options = cache, plugin, engine_options
        self._size_max_bytes = size_max_bytes
        self._dead: list[_datapath.Queue] = []
        self.queue = self._make_queue()
        if start:
            self.start()

    def _make_queue(self) -> _datapath.Queue:
        """Return a queue over what there is, with an engine, not started: what a worker has that begins."""
        params, bytes_in_store = self.params, len(self.store)
        queue = _datapath.Queue(
            self.pages,
            queue_size=params.queue_size_max,
            capacity_sectors=params.capacity_sectors,
            block_size=params.block_size,
            read_only=params.read_only,
            seg_max=params.seg_max,
            size_max_bytes=self._size_max_bytes,
            discard_max_sectors=params.discard_max_sectors,
            discard_max_seg=params.discard_max_seg,
            write_zeroes_max_sectors=params.write_zeroes_max_sectors,
            write_zeroes_max_seg=params.write_zeroes_max_seg,
            serial=params.serial,
        )
        queue.set_port_none(self.irq_fd)
        if self._plugin is not None:
            queue.open_plugin(self._plugin, size_bytes=bytes_in_store, cache=self._cache)
        else:
            queue.open_engine(
                self.engine,
                store="memory" if self.engine == "memory" else "file",
                fd=self.store_fd,
                size_bytes=bytes_in_store,
                cache=self._cache,
                **self._engine_options,
            )
        for region in self.memory.regions:
            queue.map_region(region.start, region.last, region.perm, region.fd, region.offset)
        return queue

    def replace_worker(self) -> None:
        """Have the worker do nothing any more, as if it were dead, and the next one go on by the log."""
        self._dead.append(self.queue)
        self.queue = self._make_queue()
        self.queue.start(**self.start_words(0), recover=True)

    def map(self, region: Region) -> None:
        self.queue.map_region(region.start, region.last, region.perm, region.fd, region.offset)

    def start(self) -> None:
        state = self.ring.start_idx
        self.queue.start(**self.start_words(state | (state << 16 if self.packed else 0)))

    def start_words(self, last_avail_idx: int) -> dict[str, int]:
        """Return the description of the rings that Queue.start() takes."""
        ring = self.ring
        return {
            "acked_features": self.params.features,
            "size": ring.size,
            "desc_addr": ring.desc,
            "driver_addr": ring.avail,
            "device_addr": ring.used,
            "last_avail_idx": last_avail_idx,
        }

    @property
    def in_order(self) -> bool:
        return bool(self.params.features & F_IN_ORDER)

    def close(self) -> None:
        if not self.queue.failure:
            self.queue.quiesce()
        self.queue.close()
        for queue in self._dead:  # nobody looks at what they do to the ring any more
            queue.quiesce()
            queue.close()
        self.pages.close()
        self.memory.close()
        os.close(self.irq_fd)
        if self.owns_store:
            os.close(self.store_fd)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- the device's side

    @property
    def reason(self) -> Reason:
        """The fail_reason in the shared pages."""
        return Reason(
            int.from_bytes(self.pages[shared_pages.STATUS_OFFSET + 12 : shared_pages.STATUS_OFFSET + 16], "little")
        )

    def counter(self, name: str) -> int:
        at = shared_pages.COUNTERS_OFFSET + 8 * shared_pages.COUNTERS.index(name)
        return int.from_bytes(self.pages[at : at + 8], "little")

    def irqs(self) -> int:
        """Interrupts since the last call."""
        try:
            return os.eventfd_read(self.irq_fd)
        except BlockingIOError:
            return 0

    def store_bytes(self) -> bytes:
        return os.pread(self.store_fd, len(self.store), 0)

    def poll(self) -> int:
        """Poll until nothing is in flight; what the first poll returned."""
        moved = self.queue.poll()
        deadline = time.monotonic() + 20  # what the ring cannot do at once is done by a thread of the kernel's
        while time.monotonic() < deadline:
            if not self.queue.inflight_count or self.queue.failure:
                return moved
            self.queue.poll()
        raise AssertionError("requests stay in flight")

    def agree(self) -> Reason:
        """Let model and device do one round and compare memory, store, interrupts, and why the ring failed."""
        view = View(self.memory)
        expected = Reason.NONE
        least, most = self.model.least.count, self.model.most.count
        try:
            self.model.round(view)
        except RingBroken as broken:
            expected = broken.reason
        self.poll()
        assert self.reason == expected, (self.reason, expected)
        for region, mine, theirs in zip(self.memory.regions, view.bytes, self.memory.snapshot(), strict=True):
            assert theirs == mine, f"region {region.start:#x} differs at {first_difference(mine, theirs)}"
        stored = self.store_bytes()
        assert stored == self.store, f"the store differs at byte {first_difference(self.store, stored)}"
        assert self.model.least.count - least <= self.irqs() <= self.model.most.count - most
        return expected

    # One request in plain memory.

    def ask(self, parts: Sequence[Desc]) -> tuple[int, int]:
        """Have one chain served: (used.len, status byte at the end of the last writable descriptor)."""
        head = self.ring.put_chain(parts)
        self.ring.reap(in_order=self.in_order)
        self.ring.make_available(head)
        assert self.poll() > 0, self.queue.failure
        ((answered, length),) = self.ring.reap(in_order=self.in_order)
        assert answered == head
        last = [p for p in parts if p.flags & WRITE and p.len]
        status = self.memory.read(last[-1].addr + last[-1].len - 1, 1)[0] if last else -1
        return length, status

    def request(self, kind: int, sector: int = 0, payload: bytes = b"", data_bytes: int = 0) -> list[Desc]:
        """Return the plain three descriptors of a request; the status starts as 0xff."""
        self.memory.write(IN_IOVA, header(kind, sector) + payload)
        self.memory.write(OUT_IOVA + data_bytes, b"\xff")
        parts = [Desc(IN_IOVA, 16)]
        if payload:
            parts.append(Desc(IN_IOVA + 16, len(payload)))
        if data_bytes:
            parts.append(Desc(OUT_IOVA, data_bytes, WRITE))
        return [*parts, Desc(OUT_IOVA + data_bytes, 1, WRITE)]

    def offer_writes(self, count: int) -> list[int]:
        """Make writes available, each of one sector to the sector of its number; returns their heads.

        The sectors are full of 0x40 + number, and the status bytes, side by side from OUT_IOVA on, are 0xff.
        """
        heads = []
        for number in range(count):
            at = IN_IOVA + number * 0x1000
            self.memory.write(at, header(T_OUT, number) + bytes([0x40 + number]) * SECTOR_BYTES)
            self.memory.write(OUT_IOVA + number, b"\xff")
            parts = [Desc(at, 16), Desc(at + 16, SECTOR_BYTES), Desc(OUT_IOVA + number, 1, WRITE)]
            heads.append(self.ring.put_chain(parts))
            self.ring.make_available(heads[-1])
        return heads

    def break_ring(self) -> Reason:
        """Poll, expecting failure; the reason, after checking that the queue stays failed."""
        assert self.queue.poll() == -1
        assert self.queue.failure
        assert self.queue.poll() == -1
        assert self.counter("ring_errors") == 1
        return self.reason


def first_difference(left: bytes | bytearray, right: bytes | bytearray) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), -1)
