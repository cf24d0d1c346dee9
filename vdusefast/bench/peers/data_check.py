"""Is what a device returns what its file holds? Asked before anything is timed, and again afterwards."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vdusefast.errors import VdusefastError

BLOCK_BYTES = 4096
CHUNK_BYTES = 1 << 20
STAMP_BYTES = 16
WRITTEN_BLOCKS = 64


class DataError(VdusefastError):
    """A device returned, or stored, something else than it should have."""


def make_file(path: Path, size_bytes: int, seed: int) -> None:
    """Write a file of random blocks, each with its own number in it, so that a misplaced one is noticed.

    size_bytes: a multiple of 1 MiB. Raises OSError; the file is gone then.
    """
    chunk = bytearray(random.Random(seed).randbytes(CHUNK_BYTES))  # noqa: S311 (data, no secret)
    try:
        with path.open("xb", buffering=0) as file:
            for at in range(0, size_bytes, CHUNK_BYTES):
                for place in range(0, CHUNK_BYTES, BLOCK_BYTES):
                    chunk[place : place + STAMP_BYTES] = (at + place).to_bytes(STAMP_BYTES, "little")
                file.write(chunk)
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def compare(node: str, path: Path, size_bytes: int) -> None:
    """Read all of `node`, past its page cache, and compare it with its file. Raises DataError, OSError."""
    with _opened(node, os.O_RDONLY | os.O_DIRECT) as device, _opened(path, os.O_RDONLY) as file, _buffer() as buffer:
        for at in range(0, size_bytes, CHUNK_BYTES):
            _read(device, buffer, at, node)
            held = os.pread(file, CHUNK_BYTES, at)
            if buffer[:] != held:
                place = next(i for i in range(0, CHUNK_BYTES, BLOCK_BYTES) if _differ(buffer, held, i))
                raise DataError(f"{node}: the data read at byte {at + place} differs from its file")


def check_writes(node: str, path: Path, size_bytes: int, seed: int) -> None:
    """Write some blocks through `node`, flush, and look for them through the device and in the file.

    The blocks get their old content back. Raises DataError, OSError.
    """
    numbers = random.Random(seed)  # noqa: S311 (data, no secret)
    places = numbers.sample(range(size_bytes // BLOCK_BYTES), min(WRITTEN_BLOCKS, size_bytes // BLOCK_BYTES))
    new = {place * BLOCK_BYTES: numbers.randbytes(BLOCK_BYTES) for place in places}
    with _opened(node, os.O_RDWR | os.O_DIRECT) as device, _opened(path, os.O_RDONLY) as file, _buffer() as buffer:
        old = {at: os.pread(file, BLOCK_BYTES, at) for at in new}
        for content in (new, old):
            for at, block in content.items():
                buffer[:BLOCK_BYTES] = block
                _write(device, buffer, at, node)
            os.fsync(device)
            for at, block in content.items():
                _read(device, buffer, at, node, BLOCK_BYTES)
                if buffer[:BLOCK_BYTES] != block:
                    raise DataError(f"{node}: the data written at byte {at} is not read back")
                if os.pread(file, BLOCK_BYTES, at) != block:
                    raise DataError(f"{node}: the data written at byte {at} and flushed is not in its file")


def _differ(buffer: mmap.mmap, held: bytes, place: int) -> bool:
    return buffer[place : place + BLOCK_BYTES] != held[place : place + BLOCK_BYTES]


@contextmanager
def _opened(path: str | Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _buffer() -> Iterator[mmap.mmap]:
    # O_DIRECT wants aligned memory; an anonymous mapping begins at a page.
    with mmap.mmap(-1, CHUNK_BYTES) as buffer:
        yield buffer


def _read(fd: int, buffer: mmap.mmap, at: int, node: str, size: int = CHUNK_BYTES) -> None:
    with memoryview(buffer) as view, view[:size] as part:
        if os.preadv(fd, [part], at) != size:
            raise DataError(f"{node}: the read at byte {at} came up short")


def _write(fd: int, buffer: mmap.mmap, at: int, node: str) -> None:
    with memoryview(buffer) as view, view[:BLOCK_BYTES] as part:
        if os.pwritev(fd, [part], at) != BLOCK_BYTES:
            raise DataError(f"{node}: the write at byte {at} came up short")
