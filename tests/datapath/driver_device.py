"""A device in pure Python for tests of the driver: serves virtio-blk from a bytearray, in this process."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from packed_device import DESC, PackedRing

from vdusefast.transport import uapi
from vdusefast.transport.loopback_region import Region, RegionTable

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
NEXT, WRITE, INDIRECT = 1, 2, 4
OFFERED = (
    uapi.VIRTIO_F_VERSION_1
    | uapi.VIRTIO_F_ACCESS_PLATFORM
    | uapi.VIRTIO_RING_F_INDIRECT_DESC
    | uapi.VIRTIO_RING_F_EVENT_IDX
    | uapi.VIRTIO_BLK_F_SIZE_MAX
    | uapi.VIRTIO_BLK_F_SEG_MAX
    | uapi.VIRTIO_BLK_F_BLK_SIZE
    | uapi.VIRTIO_BLK_F_FLUSH
    | uapi.VIRTIO_BLK_F_MQ
    | uapi.VIRTIO_BLK_F_DISCARD
    | uapi.VIRTIO_BLK_F_WRITE_ZEROES
)

FORMATS = {
    "split": 0,
    "split in order": uapi.VIRTIO_F_IN_ORDER,
    "packed": uapi.VIRTIO_F_RING_PACKED,
    "packed in order": uapi.VIRTIO_F_RING_PACKED | uapi.VIRTIO_F_IN_ORDER,
}


class FakeBus:
    """A bus and the device on it. `spoil(kind, sector, data)` may change what a request does; see PyDevice.serve."""

    def __init__(
        self, size_bytes: int, *, queues: int = 1, queue_size: int = 64, size_max: int = 131072, more: int = 0
    ):
        self.disk = bytearray(size_bytes)
        self.offered_features = OFFERED | more
        self.queue_count = queues
        self.queue_size_max = queue_size
        self.features = 0
        self.table = RegionTable("test")
        self.kickfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(queues)]
        self.irqfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(queues)]
        self.vqs: list[tuple[int, ...]] = [()] * queues
        self.size_max = size_max
        self.log: list[tuple[int, int, int, int]] = []  # queue, type, sector, data segments
        self.mute = False  # take requests and never answer
        self.spoil: Callable[[int, int, bytes], bytes | None] | None = None
        self.lie_about_length = 0
        self.threads: list[threading.Thread] = []
        self.stopping = False

    @property
    def config(self) -> bytes:
        space = bytearray(96)
        struct.pack_into("<QII", space, 0, len(self.disk) // 512, self.size_max, 16)
        struct.pack_into("<I", space, 20, 512)
        struct.pack_into("<H", space, 34, self.queue_count)
        struct.pack_into("<IIIII", space, 36, 1 << 20, 1, 1, 1 << 20, 1)
        return bytes(space)

    def add_region(self, iova: int, size_bytes: int, perm: int = 3) -> Region:
        return self.table.add(iova, size_bytes, perm, None, 0)

    def remove_region(self, iova: int) -> None:
        self.table.take(iova).close()

    def negotiate(self, features: int) -> None:
        self.features = features

    def set_vq(self, index: int, size: int, desc: int, driver: int, device: int, last_avail_idx: int = 0) -> None:
        self.vqs[index] = (size, desc, driver, device, last_avail_idx)

    def set_vq_ready(self, index: int, ready: bool = True) -> None:
        pass

    def driver_ok(self) -> None:
        kind = PackedPyQueue if uapi.is_packed(self.features) else PyQueue
        self.threads = [threading.Thread(target=kind(self, i).run) for i in range(self.queue_count)]
        for thread in self.threads:
            thread.start()

    def kickfd(self, index: int) -> int:
        return self.kickfds[index]

    def irqfd(self, index: int) -> int:
        return self.irqfds[index]

    def reset(self) -> None:
        self.stopping = True
        for thread in self.threads:
            thread.join()

    def close(self) -> None:
        self.reset()
        self.table.close()
        for fd in (*self.kickfds, *self.irqfds):
            os.close(fd)

    def va(self, iova: int) -> int:
        region = self.table.find(iova, iova)
        assert region is not None, hex(iova)
        return region.address + iova - region.iova


def writable_bytes(buffers: Sequence[tuple[int, int, int]]) -> int:
    """Return how much the device writes of a chain that it uses completely: all others are named, under IN_ORDER."""
    return sum(length for _address, length, writable in buffers if writable)


class BlkQueue(ABC):
    """One queue of virtio-blk, of either format."""

    def __init__(self, bus: FakeBus, index: int):
        self.bus = bus
        self.index = index
        self.event_idx = bool(bus.features & uapi.VIRTIO_RING_F_EVENT_IDX)
        self.in_order = bool(bus.features & uapi.VIRTIO_F_IN_ORDER)

    @abstractmethod
    def serve_all(self) -> bool:
        """Serve what is available. Returns whether there was any."""

    def run(self) -> None:
        poll = select.poll()
        poll.register(self.bus.kickfds[self.index], 1)
        while not self.bus.stopping:
            if not self.serve_all() and poll.poll(5):
                os.eventfd_read(self.bus.kickfds[self.index])

    def serve(self, chain: list[tuple[int, int, int]]) -> int:
        """Carry out one request; returns used.len. `spoil` returns the data to use instead, or None for an IOERR."""
        (header, _n, _w), *data, (status, _one, _writable) = chain
        kind, _prio, sector = struct.unpack("<IIQ", ctypes.string_at(header, 16))
        self.bus.log.append((self.index, kind, sector, len(data)))
        disk, at, moved = self.bus.disk, 512 * sector, 0
        total = sum(length for _va, length, _w in data)
        payload = b"".join(ctypes.string_at(va, n) for va, n, w in data if not w)
        if kind == IN:
            payload = bytes(disk[at : at + total])
        elif kind == GET_ID:
            payload = b"py-device".ljust(total, b"\0")
        if self.bus.spoil is not None:
            spoiled = self.bus.spoil(kind, sector, payload)
            if spoiled is None:
                ctypes.memset(status, 1, 1)
                return 1
            payload = spoiled
        if kind == OUT:
            disk[at : at + len(payload)] = payload
        elif kind in (DISCARD, WRITE_ZEROES):
            first, count, _flags = struct.unpack("<QII", payload)
            disk[512 * first : 512 * (first + count)] = bytes(512 * count)
        elif kind in (IN, GET_ID):
            for va, n, _w in data:
                ctypes.memmove(va, payload[moved : moved + n], n)
                moved += n
        ctypes.memset(status, 0, 1)
        return moved + 1 + self.bus.lie_about_length


class PyQueue(BlkQueue):
    """The device's side of one split vq."""

    def __init__(self, bus: FakeBus, index: int):
        super().__init__(bus, index)
        self.size, desc, driver, device, self.last_avail_idx = bus.vqs[index]
        self.desc, self.avail, self.used = bus.va(desc), bus.va(driver), bus.va(device)
        self.used_idx = self.last_avail_idx

    def u16(self, va: int) -> ctypes.c_uint16:
        return ctypes.c_uint16.from_address(va)

    def serve_all(self) -> bool:
        avail_idx = self.u16(self.avail + 2).value
        old, work, element = self.used_idx, False, self.used_idx
        while self.last_avail_idx != avail_idx and not self.bus.mute:
            slot = self.last_avail_idx % self.size
            head = self.u16(self.avail + 4 + 2 * slot).value
            chain = self.chain(head)
            written = self.serve(chain)
            ctypes.memmove(self.used + 4 + 8 * (element % self.size), struct.pack("<II", head, written), 8)
            self.last_avail_idx = (self.last_avail_idx + 1) & 0xFFFF
            self.used_idx = (self.used_idx + 1) & 0xFFFF
            # Under IN_ORDER one element, at the place of the first, names the last (VIRTIO 1.3, 2.7.9).
            if not self.in_order or written != writable_bytes(chain):
                element = self.used_idx
            work = True
        if work:
            self.u16(self.used + 2).value = self.used_idx
            if self.event_idx:  # ask for a kick at the next chain
                self.u16(self.used + 4 + 8 * self.size).value = self.last_avail_idx
            self.interrupt(old)
        return work

    def interrupt(self, old: int) -> None:
        if self.event_idx:
            event = self.u16(self.avail + 4 + 2 * self.size).value
            wanted = ((self.used_idx - event - 1) & 0xFFFF) < ((self.used_idx - old) & 0xFFFF)
        else:
            wanted = not self.u16(self.avail).value & 1
        if wanted:
            os.eventfd_write(self.bus.irqfds[self.index], 1)

    def chain(self, head: int) -> list[tuple[int, int, int]]:
        table, at, out = self.desc, head, []
        while True:
            addr, length, flags, following = struct.unpack("<QIHH", ctypes.string_at(table + 16 * at, 16))
            if flags & INDIRECT:
                table, at = self.bus.va(addr), 0
                continue
            out.append((self.bus.va(addr), length, flags & WRITE))
            if not flags & NEXT:
                return out
            at = following


class PackedPyQueue(BlkQueue):
    """The device's side of one packed vq."""

    def __init__(self, bus: FakeBus, index: int):
        super().__init__(bus, index)
        size, desc, driver, device, start = bus.vqs[index]
        self.ring = PackedRing(size, bus.va(desc), bus.va(driver), bus.va(device), start, bus.va)

    def serve_all(self) -> bool:
        done = []
        while not self.bus.mute and (chain := self.ring.pop()) is not None:
            written = self.serve([(self.bus.va(iova), n, w) for iova, n, w in chain.buffers])
            done.append((chain, written))
        if done:
            if self.event_idx:
                self.ring.set_kicks(DESC)
            if self.in_order:
                self.ring.push_in_order(done)
            else:
                self.ring.push(done)
            if self.ring.irq_wanted(sum(chain.count for chain, _written in done)):
                os.eventfd_write(self.bus.irqfds[self.index], 1)
        return bool(done)
