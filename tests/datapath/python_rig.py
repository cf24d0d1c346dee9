"""A queue in this process that serves a Python class of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from device_model import Params
from model import OK, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, WRITE, Desc, header, ranges
from rig import IN_IOVA, OUT_IOVA, Rig

from vdusefast import Backend
from vdusefast.backends._python import Engine
from vdusefast.backends.plugin import StoreSpec

STORE_BYTES = 1 << 16
PARAMS = Params(capacity_sectors=STORE_BYTES // 512, discard_max_sectors=128, write_zeroes_max_sectors=128)


class Memory(Backend):
    """Bytes in memory; subclasses do something wrong."""

    size_bytes = STORE_BYTES

    def __init__(self) -> None:
        self.data = bytearray(i // 512 % 251 + 1 for i in range(STORE_BYTES))
        self.calls: list[tuple[object, ...]] = []

    def pread(self, buffer, offset_bytes):
        buffer[:] = self.data[offset_bytes : offset_bytes + len(buffer)]

    def pwrite(self, buffer, offset_bytes):
        self.calls.append(("pwrite", offset_bytes, len(buffer)))
        self.data[offset_bytes : offset_bytes + len(buffer)] = buffer

    def flush(self):
        self.calls.append(("flush",))

    def discard(self, offset_bytes, length_bytes):
        self.calls.append(("discard", offset_bytes, length_bytes))


class BatchMemory(Memory):
    """The same by `submit`."""

    can_discard = can_write_zeroes = True

    def submit(self, batch):
        batch.read_from(self.data)
        batch.write_to(self.data)
        batch.complete()


@dataclass
class Served:
    """A class with the queue before it."""

    rig: Rig
    engine: Engine

    def read(self, sector: int = 0, size: int = 512) -> tuple[int, bytes]:
        """Return the status and what the driver finds in its buffer."""
        self.rig.memory.write(OUT_IOVA, b"\xee" * size)
        _, status = self.rig.ask(self.rig.request(T_IN, sector, b"", size))
        return status, self.rig.memory.read(OUT_IOVA, size)

    def read_ok(self, sector: int = 0, size: int = 512) -> bytes:
        status, data = self.read(sector, size)
        assert status == OK
        return data

    def write(self, sector: int, data: bytes) -> int:
        """Return the status."""
        return self.rig.ask(self.rig.request(T_OUT, sector, data))[1]

    def command(self, kind: int, payload: bytes = b"") -> int:
        return self.rig.ask(self.rig.request(kind, 0, payload))[1]

    def flush(self) -> int:
        return self.command(T_FLUSH)

    def zero(self, sector: int, count: int, kind: int = T_WRITE_ZEROES) -> int:
        return self.command(kind, ranges((sector, count, 0)))

    def read_pieces(self, sector: int, sizes: list[int]) -> tuple[int, bytes]:
        """Read into pieces of these sizes, 1 KiB apart."""
        self.rig.memory.write(IN_IOVA, header(T_IN, sector))
        parts = [Desc(IN_IOVA, 16)]
        parts += [Desc(OUT_IOVA + 1024 * i, size, WRITE) for i, size in enumerate(sizes)]
        status_at = OUT_IOVA + 1024 * len(sizes)
        self.rig.memory.write(status_at, b"\xff")
        _, status = self.rig.ask([*parts, Desc(status_at, 1, WRITE)])
        return status, b"".join(self.rig.memory.read(OUT_IOVA + 1024 * i, size) for i, size in enumerate(sizes))

    def write_pieces(self, sector: int, pieces: list[bytes]) -> int:
        self.rig.memory.write(IN_IOVA, header(T_OUT, sector))
        self.rig.memory.write(OUT_IOVA, b"\xff")
        parts = [Desc(IN_IOVA, 16)]
        for i, piece in enumerate(pieces, 1):
            self.rig.memory.write(IN_IOVA + 1024 * i, piece)
            parts.append(Desc(IN_IOVA + 1024 * i, len(piece)))
        return self.rig.ask([*parts, Desc(OUT_IOVA, 1, WRITE)])[1]

    def start_reads(self, count: int) -> list[int]:
        """Make `count` reads of a sector available, each of the sector of its number; return their heads."""
        heads = []
        for number in range(count):
            self.rig.memory.write(IN_IOVA + 16 * number, header(T_IN, number))
            at = OUT_IOVA + 1024 * number
            self.rig.memory.write(at, b"\xee" * 512 + b"\xff")
            parts = [Desc(IN_IOVA + 16 * number, 16), Desc(at, 512, WRITE), Desc(at + 512, 1, WRITE)]
            heads.append(self.rig.ring.put_chain(parts))
            self.rig.ring.make_available(heads[-1])
        return heads

    def answer(self, number: int) -> tuple[int, bytes]:
        """Return (status, data) of the read of that number."""
        data = self.rig.memory.read(OUT_IOVA + 1024 * number, 513)
        return data[512], data[:512]


@contextmanager
def serve(
    disk: Backend,
    *,
    cache: str = "writeback",
    features: int | None = None,
    timeout_s: float = 0.0,
    params: Params = PARAMS,
) -> Iterator[Served]:
    """Serve `disk` by a queue of this process."""
    spec = StoreSpec("python:test.py:Disk", cache=cache, timeout_s=timeout_s, slot_count=64, size_bytes=disk.size_bytes)
    engine = Engine(disk, spec)
    engine.begin()
    if features is not None:
        params = replace(params, features=features)
    rig = Rig(params, plugin=engine, cache=cache)
    try:
        yield Served(rig, engine)
    finally:
        rig.close()
        engine.close()
