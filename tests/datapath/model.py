"""A split ring in pure Python, twice: the driver's side, and what a correct device must do with it.

Neither shares a line with the product: the driver's side builds rings and chains in memfds, and the device's side is
written from VIRTIO 1.3 (2.7 and 5.2.6) over plain byte arrays, so that the two can be compared byte by byte.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

SECTOR_BYTES = 512
U64 = 1 << 64

NEXT, WRITE, INDIRECT = 1, 2, 4
RO, WO, RW = 1, 2, 3
F_RO, F_FLUSH, F_DISCARD, F_WRITE_ZEROES = 1 << 5, 1 << 9, 1 << 13, 1 << 14
F_INDIRECT, F_EVENT_IDX, F_PACKED, F_IN_ORDER = 1 << 28, 1 << 29, 1 << 34, 1 << 35
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
HEADER_BYTES = 16
BATCH_MAX = 64


class Reason(IntEnum):
    """Why a device gives a ring up; the numbers of the shared pages' fail_reason."""

    NONE = 0
    AVAIL_OVERRUN = 1
    HEAD_RANGE = 2
    NEXT_RANGE = 3
    CHAIN_TOO_LONG = 4
    INDIRECT_NOT_OFFERED = 5
    INDIRECT_NESTED = 6
    INDIRECT_NEXT = 7
    INDIRECT_SIZE = 8
    INDIRECT_UNMAPPED = 9
    HEAD_BUSY = 10
    UNMAPPED = 11
    MISALIGNED = 12
    MEMORY_GONE = 13


class RingBroken(Exception):
    """The device gives the ring up."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


@dataclass(frozen=True)
class Desc:
    """A descriptor; `next` only counts with NEXT in `flags`."""

    addr: int
    len: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        return struct.pack("<QIHH", self.addr, self.len, self.flags, self.next)

    def pack_as_packed(self) -> bytes:
        """As a packed ring has it, where the id of the buffer stands in place of `next`."""
        return struct.pack("<QIHH", self.addr, self.len, self.next, self.flags)


class Region:
    """[start, start + size) of the IOVA space, backed by a memfd at `offset` bytes."""

    def __init__(self, start: int, size: int, perm: int = RW, offset: int = 0) -> None:
        self.start, self.size, self.perm, self.offset = start, size, perm, offset
        self.fd = os.memfd_create("region", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, offset + size)
        self.map = mmap.mmap(self.fd, offset + size)

    @property
    def last(self) -> int:
        return self.start + self.size - 1

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class Memory:
    """The driver's memory: regions that do not overlap."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        self.regions = list(regions)

    def close(self) -> None:
        for region in self.regions:
            region.close()

    def find(self, iova: int) -> Region | None:
        return next((r for r in self.regions if r.start <= iova <= r.last), None)

    def write(self, iova: int, data: bytes) -> None:
        """Write what lies in a region; the rest is dropped."""
        for region in self.regions:
            first, last = max(iova, region.start), min(iova + len(data) - 1, region.last)
            if first <= last:
                at = region.offset + first - region.start
                region.map[at : at + last - first + 1] = data[first - iova : last - iova + 1]

    def read(self, iova: int, size: int) -> bytes:
        region = self.find(iova)
        assert region is not None
        at = region.offset + iova - region.start
        return region.map[at : at + size]

    def snapshot(self) -> list[bytearray]:
        return [bytearray(r.map[r.offset : r.offset + r.size]) for r in self.regions]


@dataclass
class Ring:
    """The place of a split ring, and the driver's cursors."""

    memory: Memory
    size: int
    desc: int
    avail: int
    used: int
    start_idx: int = 0
    avail_idx: int = field(init=False)
    reaped_idx: int = field(init=False)
    outstanding: list[int] = field(init=False, default_factory=list)
    free_desc: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.avail_idx = self.reaped_idx = self.start_idx
        self.put_u16(self.avail + 2, self.start_idx)
        self.put_u16(self.used + 2, self.start_idx)

    def put_u16(self, iova: int, value: int) -> None:
        self.memory.write(iova, struct.pack("<H", value & 0xFFFF))

    def put_desc(self, slot: int, desc: Desc) -> None:
        self.memory.write(self.desc + 16 * slot, desc.pack())

    def put_chain(self, parts: Sequence[Desc]) -> int:
        """Link descriptors (their NEXT and next are set here) into free slots, in order; the head."""
        slots = [(self.free_desc + i) % self.size for i in range(len(parts))]
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            flags = part.flags if last else part.flags | NEXT
            self.put_desc(slots[i], Desc(part.addr, part.len, flags, part.next if last else slots[i + 1]))
        self.free_desc = (self.free_desc + len(parts)) % self.size
        return slots[0]

    def make_available(self, head: int) -> None:
        self.put_u16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.outstanding.append(head)
        self.put_u16(self.avail + 2, self.avail_idx)

    def set_wish(self, *, no_interrupt: bool = False, used_event: int = 0) -> None:
        self.put_u16(self.avail, int(no_interrupt))
        self.put_u16(self.avail + 4 + 2 * self.size, used_event)

    @property
    def used_idx(self) -> int:
        return int.from_bytes(self.memory.read(self.used + 2, 2), "little")

    def used_elem(self, idx: int) -> tuple[int, int]:
        """(head, used.len) of the free-running index."""
        at = self.used + 4 + 8 * (idx % self.size)
        head, length = struct.unpack("<II", self.memory.read(at, 8))
        return head, length

    def reap(self, *, in_order: bool = False) -> list[tuple[int, int | None]]:
        """(head, used.len) of what was pushed since; None where an entry stands for others, too."""
        found: list[tuple[int, int | None]] = []
        while self.reaped_idx != self.used_idx:
            head, length = self.used_elem(self.reaped_idx)
            heads = self.outstanding[: self.outstanding.index(head) + 1] if in_order else [head]
            for one in heads:
                self.outstanding.remove(one)
                found.append((one, length if one == head else None))
            self.reaped_idx = (self.reaped_idx + len(heads)) & 0xFFFF
        return found


def table(parts: Sequence[Desc]) -> bytes:
    """Link descriptors into the bytes of an indirect table."""
    last = len(parts) - 1
    return b"".join(
        Desc(p.addr, p.len, p.flags if i == last else p.flags | NEXT, p.next if i == last else i + 1).pack()
        for i, p in enumerate(parts)
    )


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def ranges(*pieces: tuple[int, int, int]) -> bytes:
    """(sector, sectors, flags) each."""
    return b"".join(struct.pack("<QII", *piece) for piece in pieces)
