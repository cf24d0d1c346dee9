"""A packed ring in pure Python, twice, as model.py and device_model.py have the split one: from VIRTIO 1.3, 2.8."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from device_model import BadRequest, DeviceModel, Interrupts, Params
from model import (
    BATCH_MAX,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT,
    INDIRECT,
    NEXT,
    RO,
    U64,
    WRITE,
    Desc,
    Memory,
    Reason,
    RingBroken,
)

AVAIL, USED = 1 << 7, 1 << 15
DISABLE, DESC = 1, 2  # flags of the event suppression structures


class Position:
    """A slot and the wrap counter that goes with it."""

    def __init__(self, size: int, state: int) -> None:
        self.size, self.slot, self.wrap = size, state & 0x7FFF, state >> 15 & 1

    @property
    def state(self) -> int:
        return self.slot | self.wrap << 15

    def move(self, count: int) -> None:
        self.slot += count
        if self.slot >= self.size:
            self.slot -= self.size
            self.wrap ^= 1

    def copy(self) -> Position:
        return Position(self.size, self.state)


class PackedRing:
    """The place of a packed ring, and the driver's cursors. The areas have the names that they have in a split ring."""

    def __init__(self, memory: Memory, size: int, desc: int, avail: int, used: int, start_idx: int = 1 << 15) -> None:
        """start_idx: slot and wrap counter (bit 15)."""
        self.memory, self.size, self.desc, self.avail, self.used, self.start_idx = (
            memory,
            size,
            desc,
            avail,
            used,
            start_idx,
        )
        self.next_avail, self.next_used = Position(size, start_idx), Position(size, start_idx)
        self.heads: list[tuple[int, int, int]] = []  # (slot, flags, descriptors) by id, of all chains ever put
        self.outstanding: list[int] = []  # ids, in the order in which they were made available
        # A new ring, or what long chains have left: slots where none began keep the driver's flags of their lap.
        of_this_lap, of_the_lap_before = (AVAIL, USED) if self.next_avail.wrap else (USED, AVAIL)
        for slot in range(size):
            flags = of_the_lap_before if slot >= self.next_avail.slot else of_this_lap
            if start_idx == 1 << 15:
                flags = 0
            memory.write(desc + 16 * slot, struct.pack("<QIHH", 0, 0, 0, flags))

    @property
    def avail_idx(self) -> int:
        return self.next_avail.state

    def put_desc(self, slot: int, desc: Desc) -> None:
        self.memory.write(self.desc + 16 * slot, desc.pack_as_packed())

    def put_chain(self, parts: Sequence[Desc]) -> int:
        """Write a chain into the next slots, all but what makes it available; its id."""
        buffer_id = len(self.heads)
        at = self.next_avail
        for i, part in enumerate(parts):
            flags = part.flags if i + 1 == len(parts) else part.flags | NEXT
            bits = AVAIL if at.wrap else USED
            if i == 0:
                self.heads.append((at.slot, flags | bits, len(parts)))
                bits ^= AVAIL | USED
            self.put_desc(at.slot, Desc(part.addr, part.len, flags | bits, buffer_id & 0xFFFF))
            at.move(1)
        return buffer_id

    def make_available(self, buffer_id: int) -> None:
        slot, flags, _ = self.heads[buffer_id]
        self.memory.write(self.desc + 16 * slot + 14, struct.pack("<H", flags))
        self.outstanding.append(buffer_id)

    def set_wish(self, *, no_interrupt: bool = False, used_event: int = 0) -> None:
        """used_event: a position (slot and wrap counter), which counts where EVENT_IDX is negotiated."""
        flags = DISABLE if no_interrupt else DESC
        self.memory.write(self.avail, struct.pack("<HH", used_event & 0xFFFF, flags))

    def used_here(self) -> tuple[int, int] | None:
        """(id, used.len) of the next used element."""
        at = self.next_used
        _, length, buffer_id, flags = struct.unpack("<QIHH", self.memory.read(self.desc + 16 * at.slot, 16))
        bits = AVAIL | USED if at.wrap else 0
        return (buffer_id, length) if flags & (AVAIL | USED) == bits else None

    def reap(self, *, in_order: bool = False) -> list[tuple[int, int | None]]:
        """(id, used.len) of what was pushed since; None where an element stands for others, too."""
        found: list[tuple[int, int | None]] = []
        while element := self.used_here():
            run = self.outstanding.index(element[0]) + 1 if in_order else 1
            ids = self.outstanding[:run] if in_order else [element[0]]
            for buffer_id in ids:
                self.outstanding.remove(buffer_id)
                found.append((buffer_id, element[1] if buffer_id == element[0] else None))
                self.next_used.move(self.heads[buffer_id][2])
        return found


class PackedInterrupts(Interrupts):
    """As Interrupts, over positions."""

    def __init__(self, signalled: Position) -> None:
        super().__init__(0)
        self.signalled = signalled

    def decide(self, device: DeviceModel) -> None:
        assert isinstance(device, PackedDeviceModel)
        passed = []
        for _ in range(device.take_given(self)):
            passed.append(self.signalled.state)
            self.signalled.move(1)
        if not passed:
            return
        event, flags = struct.unpack("<HH", device.view.raw(device.ring.avail, 4))
        if flags == DESC and device.params.features & F_EVENT_IDX:
            wanted = event in passed or len(passed) > device.ring.size
        else:
            wanted = flags != DISABLE
        self.count += wanted or self.due
        self.due = False


class PackedDeviceModel(DeviceModel):
    """One packed virtqueue, completed in order; an element is shown when the next chain is done, or with the batch."""

    def __init__(self, params: Params, ring: PackedRing, store: bytearray, batch: int) -> None:
        self.params, self.ring, self.store, self.batch = params, ring, store, batch  # type: ignore[assignment]
        self.next_avail, self.next_used = Position(ring.size, ring.start_idx), Position(ring.size, ring.start_idx)
        self.least, self.most = PackedInterrupts(self.next_used.copy()), PackedInterrupts(self.next_used.copy())
        self.given = {id(self.least): 0, id(self.most): 0}
        self.run: list[tuple[int, int, int, bool]] = []  # (id, descriptors, used.len, whether all was written)

    def take_given(self, which: PackedInterrupts) -> int:
        """Descriptors pushed since that one decided last."""
        count, self.given[id(which)] = self.given[id(which)], 0
        return count

    def round(self, view: object) -> None:
        self.view = view  # type: ignore[assignment]
        done = 0
        try:
            for _ in range(min(BATCH_MAX, self.params.queue_size_max)):
                chain = self.pop()
                if chain is None:
                    break
                segments, buffer_id, slots = chain
                length = self.serve(segments)
                full = length == sum(segment.len for segment in segments if segment.flags & WRITE)
                self.push(buffer_id, slots, length, full)
                done += 1
                if done % self.batch == 0:
                    self.end_run()
                    self.most.decide(self)
        finally:
            self.end_run()
            self.most.decide(self)
            self.least.decide(self)

    def pop(self) -> tuple[list[Desc], int, int] | None:
        at = self.next_avail.copy()
        (flags,) = struct.unpack("<H", self.view.raw(self.ring.desc + 16 * at.slot + 14, 2))
        if (bool(flags & AVAIL), bool(flags & USED)) != (bool(at.wrap), not at.wrap):
            return None
        room = self.ring.size - sum(slots for _, slots, _, _ in self.run)
        found: list[Desc] = []
        for count in range(1, room + 1):
            desc = Desc(*struct.unpack("<QIHH", self.view.raw(self.ring.desc + 16 * at.slot, 16)[:12] + bytes(4)))
            buffer_id, flags = struct.unpack("<HH", self.view.raw(self.ring.desc + 16 * at.slot + 12, 4))
            at.move(1)
            if flags & INDIRECT:
                if not self.params.features & F_INDIRECT:
                    raise RingBroken(Reason.INDIRECT_NOT_OFFERED)
                if flags & NEXT or found:
                    raise RingBroken(Reason.INDIRECT_NEXT)
                found = self.walk_table(desc, [])
            else:
                found.append(Desc(desc.addr, desc.len, flags))
            if not flags & NEXT:
                self.next_avail = at
                return found, buffer_id, count
        raise RingBroken(Reason.CHAIN_TOO_LONG if room == self.ring.size else Reason.AVAIL_OVERRUN)

    def walk_table(self, where: Desc, found: list[Desc]) -> list[Desc]:
        if where.len == 0 or where.len % 16:
            raise RingBroken(Reason.INDIRECT_SIZE)
        if where.len // 16 > max(self.params.queue_size_max, self.ring.size, self.params.seg_max + 2):
            raise RingBroken(Reason.CHAIN_TOO_LONG)
        for slot in range(where.len // 16):
            try:
                if where.addr + where.len > U64:
                    raise BadRequest(0)
                pieces = self.view.pieces(where.addr + 16 * slot, 16, RO)
            except BadRequest:
                raise RingBroken(Reason.INDIRECT_UNMAPPED) from None
            addr, length, _, flags = struct.unpack(
                "<QIHH", b"".join(bytes(data[at : at + n]) for data, at, n in pieces)
            )
            found.append(Desc(addr, length, flags))
        return found

    def push(self, buffer_id: int, slots: int, length: int, full: bool) -> None:
        if self.run and (not self.params.features & F_IN_ORDER or not self.run[-1][3]):
            self.end_run()
        self.run.append((buffer_id, slots, length, full))

    def end_run(self) -> None:
        if not self.run:
            return
        buffer_id, _, length, _ = self.run[-1]
        flags = (AVAIL | USED if self.next_used.wrap else 0) | (WRITE if length else 0)
        self.view.put(self.ring.desc + 16 * self.next_used.slot + 8, struct.pack("<IHH", length, buffer_id, flags))
        slots = sum(run[1] for run in self.run)
        self.next_used.move(slots)
        for which in self.given:
            self.given[which] += slots
        self.run = []
