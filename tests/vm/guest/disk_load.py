"""Verified direct I/O on a block device that may vanish and come back under it; the data are those of pattern.py.

A request that fails leaves its blocks as a killed client would: with the old data or the new.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pattern import BLOCK_BYTES, Journal, block_bytes

REQUEST_BLOCKS_MAX = 16
# The errors of a disk that is being removed, or is not there; its size is 0 for a moment (ENOSPC).
GONE = (errno.EIO, errno.ENODEV, errno.ENXIO, errno.ENOENT, errno.ENOSPC)


class DiskLoad:
    """Random reads and writes of blocks [0, journal.blocks) from `at_bytes` on, one at a time.

    node: says where the disk is now, "" when it is not there.
    """

    def __init__(self, node: Callable[[], str], journal: Journal, *, at_bytes: int = 0, seed: int = 1):
        self._node, self._journal, self._at = node, journal, at_bytes
        self._random = random.Random(seed)
        self._buffer = mmap.mmap(-1, REQUEST_BLOCKS_MAX * BLOCK_BYTES)  # page-aligned
        self._fd = -1
        self.counts = {"read": 0, "write": 0, "gone": 0}

    def close(self) -> None:
        """Close the disk. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def run(self, stop: Callable[[], bool]) -> None:
        """Work until `stop()`. Raises AssertionError for wrong data, OSError for an error that no removal explains."""
        while not stop():
            try:
                self._open()
                self._one()
            except OSError as error:
                if error.errno not in GONE:
                    raise
                self.counts["gone"] += 1
                self.close()
                time.sleep(0.01)
        self.close()

    def verify(self) -> int:
        """Read everything and compare it with the journal; returns how many blocks hold something known."""
        self._open()
        known = 0
        for start in range(0, self._journal.blocks, REQUEST_BLOCKS_MAX):
            known += self._read(range(start, min(start + REQUEST_BLOCKS_MAX, self._journal.blocks)))
        self.close()
        return known

    def _open(self) -> None:
        if self._fd < 0:
            node = self._node()
            if not node:
                raise OSError(errno.ENOENT, "the disk is not there")
            self._fd = os.open(node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)

    def _one(self) -> None:
        start = self._random.randrange(self._journal.blocks)
        blocks = range(start, min(start + self._random.choice((1, 2, REQUEST_BLOCKS_MAX)), self._journal.blocks))
        if self._random.random() < 0.5:
            self._read(blocks)
            self.counts["read"] += 1
            return
        size = len(blocks) * BLOCK_BYTES
        data = [block_bytes(block, self._journal.submit(block), self._journal.seed) for block in blocks]
        self._buffer[:size] = b"".join(data)
        with memoryview(self._buffer) as whole, whole[:size] as part:
            done = os.pwritev(self._fd, [part], self._at + start * BLOCK_BYTES)
        if done != size:
            raise OSError(errno.EIO, f"{done} of {size} bytes")
        for block in blocks:
            self._journal.complete(block)
        self.counts["write"] += 1

    def _read(self, blocks: range) -> int:
        size = len(blocks) * BLOCK_BYTES
        with memoryview(self._buffer) as whole, whole[:size] as part:
            done = os.preadv(self._fd, [part], self._at + blocks.start * BLOCK_BYTES)
        if done != size:
            raise OSError(errno.EIO, f"{done} of {size} bytes")
        known = 0
        for place, block in enumerate(blocks):
            data = self._buffer[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES]
            problem = self._journal.problem(block, data)
            assert not problem, problem
            submitted, completed = self._journal.get(block)
            if submitted != completed:
                self._journal.settle(block, data)
            known += completed != 0
        return known


@contextlib.contextmanager
def under_load(name: str, node: Callable[[], str], journals: Path, *, processes: int = 2) -> Iterator[None]:
    """Keep processes busy on parts of the disk of their own meanwhile, and verify all of it at the end.

    name: of the journals' files. Raises AssertionError when one of them found anything wrong or did too little.
    """
    stop = multiprocessing.get_context("fork").Event()
    results: multiprocessing.Queue[str] = multiprocessing.get_context("fork").Queue()
    blocks = 256

    def work(place: int) -> None:
        result = "ended without a word"
        try:
            with Journal(journals / f"{name}-{place}", blocks, seed=place + 1) as journal:
                load = DiskLoad(node, journal, at_bytes=place * blocks * BLOCK_BYTES, seed=place)
                load.run(stop.is_set)
                known = load.verify()
                enough = load.counts["write"] > 20 and known > blocks // 8
                result = "" if enough else f"too little: {load.counts}, {known} blocks known"
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        finally:
            results.put(result)

    children = [multiprocessing.get_context("fork").Process(target=work, args=(place,)) for place in range(processes)]
    for child in children:
        child.start()
    try:
        yield
    finally:
        stop.set()
    problems = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join(10)
    assert not any(problems), f"{name}: {problems}"
