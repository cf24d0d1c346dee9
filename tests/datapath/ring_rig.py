"""A driver's vq of either format over memory of this process, and a device's hands on the other side of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

import pytest
from packed_device import Buffer, Chain, PackedRing

from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import PAGE_BYTES, area_sizes

TABLES_MAX, TABLE_BYTES = 64, 256
NEXT, WRITE, INDIRECT = 1, 2, 4
Taken = tuple[Chain, int]  # and the bytes that the device has written


class SplitRing:
    """The device's side of a split vq, after VIRTIO 1.3, 2.7. IOVAs are addresses of this process."""

    def __init__(self, size: int, desc: int, driver: int, device: int, start: int = 0):
        self.size, self.desc, self.driver, self.device = size, desc, driver, device
        self.avail_idx = self.used_idx = start

    def pop(self) -> Chain | None:
        """Take the next chain, if there is one."""
        if ctypes.c_uint16.from_address(self.driver + 2).value == self.avail_idx:
            return None
        head = ctypes.c_uint16.from_address(self.driver + 4 + 2 * (self.avail_idx % self.size)).value
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        table, at, count, buffers = self.desc, head, 0, []
        while True:
            addr, length, flags, following = struct.unpack("<QIHH", ctypes.string_at(table + 16 * at, 16))
            count += table == self.desc
            if flags & INDIRECT:
                table, at = addr, 0
                continue
            buffers.append((addr, length, flags & WRITE))
            if not flags & NEXT:
                return Chain(head, count, buffers)
            at = following

    def write_used(self, head: int, written_bytes: int, *, ahead: int = 0) -> None:
        """Write a used element, `ahead` places after the next one."""
        slot = (self.used_idx + ahead) % self.size
        ctypes.memmove(self.device + 4 + 8 * slot, struct.pack("<II", head, written_bytes), 8)

    def skip(self, count: int) -> None:
        """Show the driver `count` elements more."""
        self.used_idx = (self.used_idx + count) & 0xFFFF
        ctypes.c_uint16.from_address(self.device + 2).value = self.used_idx

    def push(self, done: Sequence[Taken]) -> None:
        """Give back chains, each with the bytes written."""
        for ahead, (chain, written) in enumerate(done):
            self.write_used(chain.id, written, ahead=ahead)
        self.skip(len(done))

    def push_batch(self, done: Sequence[Taken]) -> None:
        """Give back chains under IN_ORDER by one element, which names the last one (VIRTIO 1.3, 2.7.9)."""
        self.write_used(done[-1][0].id, done[-1][1])
        self.skip(len(done))


class RingRig:
    """`ring` is the driver's side; `device` the other. A context manager."""

    def __init__(
        self,
        size: int = 8,
        *,
        packed: bool = True,
        in_order: bool = False,
        event_idx: bool = True,
        start: int | None = None,
    ):
        self.packed, self.start = packed, start if start is not None else 0x80008000 * packed
        sizes = [-(-n // PAGE_BYTES) * PAGE_BYTES for n in area_sizes(size, packed=packed)]
        self.memory = mmap.mmap(-1, sum(sizes) + TABLES_MAX * TABLE_BYTES)
        self.first_byte: ctypes.c_char | None = ctypes.c_char.from_buffer(self.memory)
        address = ctypes.addressof(self.first_byte)
        areas = (address, address + sizes[0], address + sizes[0] + sizes[1])
        self.tables = address + sum(sizes)
        self.kick_fd, self.irq_fd = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        if not packed:
            for area in areas[1:]:
                ctypes.c_uint16.from_address(area + 2).value = self.start
        try:
            self.ring = _driver.Ring(
                0,
                size,
                desc_va=areas[0],
                driver_va=areas[1],
                device_va=areas[2],
                kick_fd=self.kick_fd,
                irq_fd=self.irq_fd,
                event_idx=event_idx,
                packed=packed,
                in_order=in_order,
                start=self.start,
            )
        except ValueError:
            self._let_go()
            raise
        self.device: PackedRing | SplitRing = (PackedRing if packed else SplitRing)(size, *areas, self.start)

    def __enter__(self) -> RingRig:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.ring.close()
        self._let_go()

    def _let_go(self) -> None:
        self.first_byte = None  # a mapping that is pointed into cannot be closed
        self.memory.close()
        for fd in (self.kick_fd, self.irq_fd):
            os.close(fd)

    def add(self, *lengths: int, cookie: int = 0, indirect_at: int | None = None) -> list[Buffer]:
        """Add a chain of buffers of these lengths, negative ones writable. Returns what the device has to find.

        indirect_at: in the so many'th of TABLES_MAX tables.
        """
        buffers = [(0x1000 * i, abs(n), WRITE * (n < 0)) for i, n in enumerate(lengths, 1)]
        chain = [(iova, n, bool(writable)) for iova, n, writable in buffers]
        if indirect_at is None:
            self.ring.add(chain, cookie)
        else:
            table = self.tables + TABLE_BYTES * indirect_at
            self.ring.add_indirect(chain, table, table, cookie)
        return buffers

    def take(self, count: int) -> list[Taken]:
        """Take `count` chains for the device, which is to write what it may."""
        taken = []
        for _ in range(count):
            chain = self.device.pop()
            assert chain is not None
            taken.append((chain, sum(n for _iova, n, writable in chain.buffers if writable)))
        return taken

    def reap(self) -> list[tuple[int, int]]:
        """Return (cookie, bytes written) of what has come back."""
        return [(cookie, written) for _head, cookie, written in self.ring.reap()]

    def reap_fails(self) -> None:
        """Check that the driver sees that the device has broken the ring."""
        with pytest.raises(OSError, match="queue 0: the device broke the ring") as raised:
            self.ring.reap()
        assert raised.value.errno == errno.EPROTO

    def kicked(self) -> bool:
        """Return whether there was a kick since this was asked last."""
        with suppress(BlockingIOError):
            return os.eventfd_read(self.kick_fd) > 0
        return False
