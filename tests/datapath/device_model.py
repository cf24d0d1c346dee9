"""A correct virtio-blk device on a split ring, written from VIRTIO 1.3 alone; slow and plain."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from model import (
    BATCH_MAX,
    F_DISCARD,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT,
    F_WRITE_ZEROES,
    HEADER_BYTES,
    INDIRECT,
    IOERR,
    NEXT,
    OK,
    RO,
    SECTOR_BYTES,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    U64,
    UNSUPP,
    WO,
    WRITE,
    Desc,
    Memory,
    Reason,
    Ring,
    RingBroken,
)


@dataclass(frozen=True)
class Params:
    """The device as configured, and the features acked."""

    capacity_sectors: int = 64
    block_size: int = 512
    read_only: bool = False
    seg_max: int = 126
    discard_max_sectors: int = 1 << 20
    discard_max_seg: int = 32
    write_zeroes_max_sectors: int = 1 << 20
    write_zeroes_max_seg: int = 32
    serial: str = "model-0"
    queue_size_max: int = 256
    features: int = F_EVENT_IDX | F_INDIRECT | F_DISCARD | F_WRITE_ZEROES | 1 << 9


class BadRequest(Exception):
    """The request is answered with a status and no effect."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class View:
    """Memory as the device sees it, in a copy."""

    def __init__(self, memory: Memory) -> None:
        self.spans = [(r.start, r.last, r.perm) for r in memory.regions]
        self.bytes = memory.snapshot()

    def pieces(self, iova: int, size: int, perm: int) -> list[tuple[bytearray, int, int]]:
        """(bytes, offset, count) that make up the range. Raises BadRequest."""
        found = []
        while size:
            hit = next((i for i, (first, last, _) in enumerate(self.spans) if first <= iova <= last), None)
            if hit is None or self.spans[hit][2] & perm != perm:
                raise BadRequest(IOERR)
            first, last, _ = self.spans[hit]
            run = min(size, last - iova + 1)
            found.append((self.bytes[hit], iova - first, run))
            iova += run
            size -= run
        return found

    def raw(self, iova: int, size: int) -> bytes:
        """Bytes that the ring lies in: one region, whatever its permissions."""
        at = next(i for i, (first, last, _) in enumerate(self.spans) if first <= iova <= last)
        offset = iova - self.spans[at][0]
        return bytes(self.bytes[at][offset : offset + size])

    def put(self, iova: int, data: bytes) -> None:
        at = next(i for i, (first, last, _) in enumerate(self.spans) if first <= iova <= last)
        offset = iova - self.spans[at][0]
        self.bytes[at][offset : offset + len(data)] = data


@dataclass
class Interrupts:
    """The interrupts that are due when the device decides about each publication that decide() has seen."""

    signalled_idx: int
    due: bool = True  # the first publication after a start interrupts whatever the driver says
    count: int = 0

    def decide(self, device: DeviceModel) -> None:
        moved = (device.last_used_idx - self.signalled_idx) & 0xFFFF
        if not moved:
            return
        ring = device.ring
        if device.params.features & F_EVENT_IDX:
            # VIRTIO 1.3, 2.7.10: an interrupt when the entry named by used_event is among those that are new.
            event = device.u16(ring.avail + 4 + 2 * ring.size)
            wanted = (event - self.signalled_idx) & 0xFFFF < moved
        else:
            wanted = not device.u16(ring.avail) & 1
        self.count += wanted or self.due
        self.due = False
        self.signalled_idx = device.last_used_idx


class DeviceModel:
    """One virtqueue served by an engine that finishes each request at once and publishes after `batch` of them."""

    def __init__(self, params: Params, ring: Ring, store: bytearray, batch: int) -> None:
        self.params, self.ring, self.store, self.batch = params, ring, store, batch
        self.last_avail_idx = self.seen_avail_idx = ring.start_idx
        self.last_used_idx = ring.start_idx
        # A device may wait with an interrupt until the end of a round; how often it does not is a matter of time.
        self.least, self.most = Interrupts(ring.start_idx), Interrupts(ring.start_idx)
        self.view: View

    # The ring.

    def u16(self, iova: int) -> int:
        return int.from_bytes(self.view.raw(iova, 2), "little")

    def round(self, view: View) -> None:
        """Serve up to 64 chains. Raises RingBroken, with what went before it published."""
        self.view = view
        waiting = (self.seen_avail_idx - self.last_avail_idx) & 0xFFFF
        if not waiting:
            idx = self.u16(self.ring.avail + 2)
            waiting = (idx - self.last_avail_idx) & 0xFFFF
            if waiting > self.ring.size:
                raise RingBroken(Reason.AVAIL_OVERRUN)
            self.seen_avail_idx = idx
        done: list[tuple[int, int, bool]] = []
        try:
            for _ in range(min(waiting, BATCH_MAX, self.params.queue_size_max)):
                head = self.u16(self.ring.avail + 4 + 2 * (self.last_avail_idx % self.ring.size))
                segments = self.walk(head)
                self.last_avail_idx = (self.last_avail_idx + 1) & 0xFFFF
                if head in [other for other, _, _ in done]:
                    raise RingBroken(Reason.HEAD_BUSY)
                length = self.serve(segments)
                done.append((head, length, length == sum(part.len for part in segments if part.flags & WRITE)))
                if len(done) == self.batch:
                    self.publish(done)
        finally:
            self.publish(done)
            self.least.decide(self)

    def publish(self, done: list[tuple[int, int, bool]]) -> None:
        if not done:
            return
        # With IN_ORDER an entry stands for those before it that were used completely, and lies where the first would.
        goes_on = False
        at_idx = self.last_used_idx
        for head, length, full in done:
            if not goes_on:
                at_idx = self.last_used_idx
            at = self.ring.used + 4 + 8 * (at_idx % self.ring.size)
            self.view.put(at, struct.pack("<II", head, length))
            self.last_used_idx = (self.last_used_idx + 1) & 0xFFFF
            goes_on = full and bool(self.params.features & F_IN_ORDER)
        done.clear()
        self.view.put(self.ring.used + 2, struct.pack("<H", self.last_used_idx))
        self.most.decide(self)

    def desc_at(self, data: bytes, slot: int) -> Desc:
        return Desc(*struct.unpack_from("<QIHH", data, 16 * slot))

    def walk(self, head: int) -> list[Desc]:
        """Follow a chain. Raises RingBroken."""
        size = self.ring.size
        if head >= size:
            raise RingBroken(Reason.HEAD_RANGE)
        whole = self.view.raw(self.ring.desc, 16 * size)
        found: list[Desc] = []
        slot = head
        for _ in range(size):
            desc = self.desc_at(whole, slot)
            if desc.flags & INDIRECT:
                if not self.params.features & F_INDIRECT:
                    raise RingBroken(Reason.INDIRECT_NOT_OFFERED)
                if desc.flags & NEXT:
                    raise RingBroken(Reason.INDIRECT_NEXT)
                return self.walk_table(desc, found)
            found.append(desc)
            if not desc.flags & NEXT:
                return found
            if desc.next >= size:
                raise RingBroken(Reason.NEXT_RANGE)
            slot = desc.next
        raise RingBroken(Reason.CHAIN_TOO_LONG)

    def walk_table(self, where: Desc, found: list[Desc]) -> list[Desc]:
        if where.len == 0 or where.len % 16 or where.len // 16 > 32768:
            raise RingBroken(Reason.INDIRECT_SIZE)
        longest = max(self.params.queue_size_max, self.ring.size, self.params.seg_max + 2)
        slot = 0
        while True:
            try:
                if where.addr + where.len > U64:
                    raise BadRequest(IOERR)
                pieces = self.view.pieces(where.addr + 16 * slot, 16, RO)
            except BadRequest:
                raise RingBroken(Reason.INDIRECT_UNMAPPED) from None
            desc = self.desc_at(b"".join(data[at : at + n] for data, at, n in pieces), 0)
            if desc.flags & INDIRECT:
                raise RingBroken(Reason.INDIRECT_NESTED)
            if len(found) == longest:
                raise RingBroken(Reason.CHAIN_TOO_LONG)
            found.append(desc)
            if not desc.flags & NEXT:
                return found
            if desc.next >= where.len // 16:
                raise RingBroken(Reason.NEXT_RANGE)
            slot = desc.next

    # The request.

    def serve(self, segments: list[Desc]) -> int:
        """Carry out one request; used.len."""
        status_at = self.find_status(segments)
        stored = 0
        try:
            if status_at is None:
                raise BadRequest(IOERR)
            stored = self.carry_out(segments)
            status = OK
        except BadRequest as error:
            status = error.status
        if status_at is None:
            return 0
        data, at, _ = status_at
        data[at] = status
        # used.len counts from the first writable byte on: behind a gap the status does not count.
        writable = sum(segment.len for segment in segments if segment.flags & WRITE)
        return stored + 1 if stored + 1 == writable else stored

    def find_status(self, segments: list[Desc]) -> tuple[bytearray, int, int] | None:
        last = next((s for s in reversed(segments) if s.flags & WRITE and s.len), None)
        if last is None or last.addr + last.len > U64:
            return None
        try:
            return self.view.pieces(last.addr + last.len - 1, 1, WO)[0]
        except BadRequest:
            return None

    def span(self, segments: list[Desc], writable: int, skip: int, want: int) -> list[tuple[bytearray, int, int]]:
        """The memory of `want` bytes of one direction after the first `skip`. Raises BadRequest."""
        found = []
        for segment in segments:
            if segment.flags & WRITE != writable or not want:
                continue
            if skip >= segment.len:
                skip -= segment.len
                continue
            if segment.addr + segment.len > U64:
                raise BadRequest(IOERR)
            count = min(want, segment.len - skip)
            found += self.view.pieces(segment.addr + skip, count, WO if writable else RO)
            want -= count
            skip = 0
        return found

    def fetch(self, segments: list[Desc], skip: int, want: int) -> bytes:
        return b"".join(bytes(data[at : at + n]) for data, at, n in self.span(segments, 0, skip, want))

    def put_all(self, pieces: list[tuple[bytearray, int, int]], data: bytes) -> None:
        done = 0
        for to, at, n in pieces:
            to[at : at + n] = data[done : done + n]
            done += n

    def carry_out(self, segments: list[Desc]) -> int:
        """Do what the header asks; bytes stored in the driver's memory. Raises BadRequest before any effect."""
        first_write = next((i for i, s in enumerate(segments) if s.flags & WRITE and s.len), len(segments))
        readable = sum(s.len for s in segments if not s.flags & WRITE)
        writable = sum(s.len for s in segments if s.flags & WRITE)
        if any(not s.flags & WRITE for s in segments[first_write:]) or readable < HEADER_BYTES:
            raise BadRequest(IOERR)
        kind, _, sector = struct.unpack("<IIQ", self.fetch(segments, 0, HEADER_BYTES))
        payload = readable - HEADER_BYTES
        if kind == T_IN:
            if payload:
                raise BadRequest(IOERR)
            self.check_data(sector, writable - 1)
            where = self.span(segments, WRITE, 0, writable - 1)
            self.put_all(where, bytes(self.store[sector * SECTOR_BYTES :][: writable - 1]))
            return writable - 1
        if kind == T_OUT:
            if self.params.read_only or writable != 1:
                raise BadRequest(IOERR)
            self.check_data(sector, payload)
            self.store[sector * SECTOR_BYTES : sector * SECTOR_BYTES + payload] = self.fetch(
                segments, HEADER_BYTES, payload
            )
            return 0
        if kind == T_FLUSH:
            return 0
        if kind == T_GET_ID:
            if payload or writable == 1:
                raise BadRequest(IOERR)
            want = min(20, writable - 1)
            self.put_all(self.span(segments, WRITE, 0, want), self.params.serial.encode().ljust(20, b"\0"))
            return want
        if kind in (T_DISCARD, T_WRITE_ZEROES):
            self.do_ranges(kind, segments, payload, writable)
            return 0
        raise BadRequest(UNSUPP)

    def check_data(self, sector: int, size: int) -> None:
        if size % SECTOR_BYTES or size > 2**32 - 1 - SECTOR_BYTES:
            raise BadRequest(IOERR)
        self.check_range(sector, size // SECTOR_BYTES)

    def check_range(self, sector: int, count: int) -> None:
        per_block = self.params.block_size // SECTOR_BYTES
        if sector % per_block or count % per_block or sector + count > self.params.capacity_sectors:
            raise BadRequest(IOERR)

    def do_ranges(self, kind: int, segments: list[Desc], payload: int, writable: int) -> None:
        p = self.params
        if kind == T_DISCARD:
            acked, max_sectors, max_seg, known = F_DISCARD, p.discard_max_sectors, p.discard_max_seg, 0
        else:
            acked, max_sectors, max_seg, known = F_WRITE_ZEROES, p.write_zeroes_max_sectors, p.write_zeroes_max_seg, 1
        if not p.features & acked or not max_sectors:
            raise BadRequest(UNSUPP)
        if p.read_only or writable != 1 or payload == 0 or payload % 16 or payload // 16 > max_seg:
            raise BadRequest(IOERR)
        pieces = list(struct.iter_unpack("<QII", self.fetch(segments, HEADER_BYTES, payload)))
        if any(flags & ~known for _, _, flags in pieces):
            raise BadRequest(UNSUPP)
        for sector, count, _ in pieces:
            if count > max_sectors:
                raise BadRequest(IOERR)
            self.check_range(sector, count)
        for sector, count, _ in pieces:
            self.store[sector * SECTOR_BYTES : (sector + count) * SECTOR_BYTES] = bytes(count * SECTOR_BYTES)
