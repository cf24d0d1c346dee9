"""Verified data: every 512-byte sector says which one it is, which generation of it, and whose; and a journal.

The journal is a shared file that outlives a client killed in mid-I/O: for each 4 KiB block the generation that was
last submitted and the one that was last completed. A block then holds one of these two and nothing else.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
SECTORS_PER_BLOCK = BLOCK_BYTES // SECTOR_BYTES
ZEROED = 1 << 31  # a generation with this bit is a write of zeroes
ANYTHING = 0  # never written, or discarded: not verified
_UNIT = struct.Struct("<QII")
_PAIR = struct.Struct("<II")
_ZEROES = bytes(BLOCK_BYTES)


def block_bytes(block: int, generation: int, seed: int) -> bytes:
    """Return what `block` holds in `generation`."""
    if generation & ZEROED:
        return _ZEROES
    sectors = []
    for sector in range(block * SECTORS_PER_BLOCK, (block + 1) * SECTORS_PER_BLOCK):
        unit = _UNIT.pack(sector, generation, seed)
        # The last unit is another one, so that data shifted inside of a sector is noticed too.
        sectors.append(unit * (SECTOR_BYTES // len(unit) - 1) + unit[::-1])
    return b"".join(sectors)


class Journal:
    """Two generations for each block of an area; in a file, so that they survive their client. A context manager."""

    def __init__(self, path: Path, blocks: int, *, seed: int = 1):
        self.blocks, self.seed = blocks, seed
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, blocks * _PAIR.size)
            self._map = mmap.mmap(fd, blocks * _PAIR.size)
        finally:
            os.close(fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    def get(self, block: int) -> tuple[int, int]:
        """Return the generations (submitted, completed) of a block."""
        submitted, completed = _PAIR.unpack_from(self._map, block * _PAIR.size)
        return submitted, completed

    def submit(self, block: int, *, zeroes: bool = False) -> int:
        """Note that a write of `block` goes out and return its generation."""
        submitted, completed = self.get(block)
        generation = (submitted & ~ZEROED) + 1
        generation |= ZEROED if zeroes else 0
        _PAIR.pack_into(self._map, block * _PAIR.size, generation, completed)
        return generation

    def complete(self, block: int) -> None:
        """Note that what was submitted last has completed."""
        submitted, _ = self.get(block)
        _PAIR.pack_into(self._map, block * _PAIR.size, submitted, submitted)

    def settle(self, block: int, data: bytes | memoryview) -> None:
        """Note what was found of a block whose client died in mid-write: it holds one known generation again."""
        submitted, completed = self.get(block)
        found = [g for g in (submitted, completed) if g != ANYTHING and data == block_bytes(block, g, self.seed)]
        # A torn block, or one that was never completed, may hold anything until the next write.
        _PAIR.pack_into(self._map, block * _PAIR.size, submitted, submitted if found[:1] == [submitted] else ANYTHING)

    def problem(self, block: int, data: bytes | memoryview) -> str:
        """Compare what was read of an idle block with its history; returns "" or what is wrong."""
        submitted, completed = self.get(block)
        if completed == ANYTHING:
            return ""
        allowed = {completed, submitted}
        if any(data == block_bytes(block, generation, self.seed) for generation in allowed):
            return ""
        # A block that was being written when its client died may have got some of its sectors.
        if submitted != completed:
            wanted = [block_bytes(block, generation, self.seed) for generation in allowed]
            starts = range(0, BLOCK_BYTES, SECTOR_BYTES)
            if all(any(data[at : at + SECTOR_BYTES] == w[at : at + SECTOR_BYTES] for w in wanted) for at in starts):
                return ""
        sector, generation, seed = _UNIT.unpack_from(data)
        return (
            f"block {block}: expected generation {completed:#x}"
            + (f" or {submitted:#x}" if submitted != completed else "")
            + f" of seed {self.seed}, found generation {generation:#x} of sector {sector}, seed {seed}"
        )
