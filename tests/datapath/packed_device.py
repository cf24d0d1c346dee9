"""The device's side of a packed vq in pure Python, after VIRTIO 1.3, 2.8: slots and wrap counters."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2

Buffer = tuple[int, int, int]  # IOVA, bytes, WRITE or 0


class Chain(NamedTuple):
    """A buffer that the driver has made available."""

    id: int
    count: int  # descriptors in the ring
    buffers: list[Buffer]


class PackedRing:
    """One ring at three addresses of this process; `va` turns IOVAs, of indirect tables, into such."""

    def __init__(
        self, size: int, desc: int, driver: int, device: int, start: int = 0x80008000, va: Callable[[int], int] = int
    ):
        self.size, self.desc, self.driver, self.device, self.va = size, desc, driver, device, va
        self.avail_slot, self.avail_wrap_counter = start & 0x7FFF, start >> 15 & 1
        self.used_slot, self.used_wrap_counter = start >> 16 & 0x7FFF, start >> 31

    @property
    def state(self) -> int:
        """Return the position of the device, as uapi.VqInfo.last_avail_idx."""
        used = self.used_wrap_counter << 15 | self.used_slot
        return used << 16 | self.avail_wrap_counter << 15 | self.avail_slot

    def descriptor(self, slot: int) -> tuple[int, int, int, int]:
        """Return address, length, buffer ID and flags."""
        addr, length, buffer_id, flags = struct.unpack("<QIHH", ctypes.string_at(self.desc + 16 * slot, 16))
        return addr, length, buffer_id, flags

    def pop(self) -> Chain | None:
        """Take the next chain, if there is one."""
        slot, wrap_counter, buffers = self.avail_slot, self.avail_wrap_counter, []
        for count in range(1, self.size + 1):
            addr, length, buffer_id, flags = self.descriptor(slot)
            if (bool(flags & AVAIL), bool(flags & USED)) != (bool(wrap_counter), not wrap_counter):
                assert count == 1, "a chain was shown before all of its descriptors were"
                return None
            if flags & INDIRECT:
                assert not flags & (NEXT | WRITE)
                assert length % 16 == 0
                table = ctypes.string_at(self.va(addr), length)
                buffers += [(at, n, f & WRITE) for at, n, _id, f in struct.iter_unpack("<QIHH", table)]
            else:
                buffers.append((addr, length, flags & WRITE))
            slot = (slot + 1) % self.size
            wrap_counter ^= slot == 0
            if not flags & NEXT:
                self.avail_slot, self.avail_wrap_counter = slot, wrap_counter
                return Chain(buffer_id, count, buffers)
        raise AssertionError("a chain is longer than the ring")

    def write_used(self, buffer_id: int, written_bytes: int, *, ahead: int = 0) -> None:
        """Write a used descriptor, `ahead` slots after the next one."""
        slot, wrap_counter = self.used_slot + ahead, self.used_wrap_counter
        if slot >= self.size:
            slot, wrap_counter = slot - self.size, wrap_counter ^ 1
        flags = (AVAIL | USED) * wrap_counter
        ctypes.memmove(self.desc + 16 * slot + 8, struct.pack("<IHH", written_bytes, buffer_id, flags), 8)

    def skip(self, count: int) -> None:
        """Continue after `count` descriptors that are used."""
        self.used_slot += count
        if self.used_slot >= self.size:
            self.used_slot -= self.size
            self.used_wrap_counter ^= 1

    def push(self, done: Sequence[tuple[Chain, int]]) -> None:
        """Give back chains, each with the bytes written; the driver sees none before it sees the first."""
        ahead = [0]
        for chain, _written in done:
            ahead.append(ahead[-1] + chain.count)
        for at in range(len(done) - 1, -1, -1):
            self.write_used(done[at][0].id, done[at][1], ahead=ahead[at])
        self.skip(ahead[-1])

    def push_batch(self, done: Sequence[tuple[Chain, int]]) -> None:
        """Give back chains under IN_ORDER by one used descriptor, which names the last one (VIRTIO 1.3, 2.8.9)."""
        self.write_used(done[-1][0].id, done[-1][1])
        self.skip(sum(chain.count for chain, _written in done))

    def push_in_order(self, done: Sequence[tuple[Chain, int]]) -> None:
        """The same by as few used descriptors as it takes: each chain that was not written in full is named."""
        first = 0
        for at, (chain, written) in enumerate(done):
            if at + 1 == len(done) or written != sum(n for _iova, n, writable in chain.buffers if writable):
                self.push_batch(done[first : at + 1])
                first = at + 1

    # -- event suppression: VIRTIO 1.3, 2.8.10

    def set_kicks(self, flags: int) -> None:
        """Ask for all kicks, for none, or for one at the next chain."""
        off_wrap = self.avail_wrap_counter << 15 | self.avail_slot
        ctypes.c_uint32.from_address(self.device).value = flags << 16 | (off_wrap if flags == DESC else 0)

    def driver_event(self) -> tuple[int, int]:
        """Return off_wrap and flags as the driver has them."""
        off_wrap, flags = struct.unpack("<HH", ctypes.string_at(self.driver, 4))
        return off_wrap, flags

    def irq_wanted(self, count: int) -> bool:
        """Tell whether the driver wants an interrupt for the last `count` descriptors."""
        off_wrap, flags = self.driver_event()
        if flags != DESC:
            return flags == ENABLE
        passed = []
        slot, wrap_counter = self.used_slot, self.used_wrap_counter
        for _ in range(count):
            slot -= 1
            if slot < 0:
                slot, wrap_counter = self.size - 1, wrap_counter ^ 1
            passed.append(wrap_counter << 15 | slot)
        return off_wrap in passed
