"""Writers on a disk of the kernel's, each with a journal of its own of what was acknowledged."""

from __future__ import annotations

import array
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vdusefast.bench.common import block_node
from vdusefast.bench.torture.load import ERRORS, Lost, compare_block
from vdusefast.bench.torture.plan import TortureOptions
from vdusefast.driver import _driver
from vdusefast.errors import VdusefastError

READ_SHARE = 0.3
FSYNC_EVERY = 16  # requests of one thread
THREADS_A_QUEUE = 2
CHECK_BLOCKS = 32  # read at once when everything is read back
LOST_KEPT_MAX = 100  # of one writer in one cycle


class DiskLoad:
    """Writers on slices of a disk."""

    def __init__(self, node: str, options: TortureOptions, run_s: float):
        """Open the node. Raises VdusefastError."""
        count = options.queues * THREADS_A_QUEUE
        blocks = options.area_bytes(block_node.size_bytes(node)) // options.block_bytes // count
        slice_bytes = blocks * options.block_bytes
        self._give_up_s = options.give_up_s
        self._run_s = run_s
        try:
            self._fd = os.open(node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            raise VdusefastError(f"{node}: {error.strerror}") from None
        seed = int.from_bytes(os.urandom(4), "little") | 1
        self._writers = [
            _Writer(self._fd, place * slice_bytes, slice_bytes, options.block_bytes, seed, options.seed + place)
            for place in range(count)
        ]

    def close(self) -> None:
        """Close the node; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def begin(self) -> DiskCycle:
        """Start a cycle: the load runs when this returns."""
        return DiskCycle(self._writers, self._run_s, self._give_up_s)

    def forget_gaps(self) -> None:
        """Begin to measure how long the disk keeps its writers waiting."""
        for writer in self._writers:
            writer.gap_s = 0.0

    def gaps_s(self, queue: int | None) -> tuple[float, float | None]:
        """Return the longest wait of any writer; nobody knows which queue it waited for."""
        return max(writer.gap_s for writer in self._writers), None

    def new_faults(self, *, errors_expected: bool = False) -> list[Lost]:
        """Return what the writers have found wrong in the last cycle. errors_expected: errors of the disk are not."""
        lost = [one for writer in self._writers for one in writer.lost]
        if errors_expected:
            lost = [one for one in lost if one.what not in ERRORS]
        for writer in self._writers:
            writer.lost = []
        return lost

    def counts(self) -> dict[str, int]:
        """Return the counts so far."""
        names = ("writes", "reads", "flushes", "verified")
        return {name: sum(writer.counts[name] for writer in self._writers) for name in names}

    def check_store(self, path: Path) -> tuple[int, list[Lost]]:
        """Compare the journals with the file behind the device."""
        count, lost = 0, []
        with path.open("rb") as file:
            for writer in self._writers:
                for place, generation in enumerate(writer.journal):
                    if not generation:
                        continue
                    at = writer.offset + place * writer.block_bytes
                    block = os.pread(file.fileno(), writer.block_bytes, at)
                    lost += compare_block(block, at, generation, writer.seed, "store")
                    count += 1
        return count, lost


class DiskCycle:
    """One run of all writers, a thread each."""

    def __init__(self, writers: list[_Writer], run_s: float, give_up_s: float):
        self._give_up_s = give_up_s
        self._struck = threading.Event()
        writer_arguments = (time.monotonic() + run_s, self._struck)
        # Daemons: one that waits in the kernel for its disk must not keep us from ending.
        self._threads = [threading.Thread(target=writer.run, args=writer_arguments, daemon=True) for writer in writers]
        for thread in self._threads:
            thread.start()

    def struck(self) -> None:
        """Let the load end when its time is up: a blow that falls late, on a busy CPU, is to meet it all the same."""
        self._struck.set()

    def finish(self) -> list[Lost]:
        """Wait for the end of the run and of its read-back. Returns the requests without an answer."""
        self.struck()
        deadline = time.monotonic() + self._give_up_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        waiting = sum(thread.is_alive() for thread in self._threads)
        if not waiting:
            return []
        return [Lost("unanswered", "driver", text=f"{waiting} writers have waited for {self._give_up_s:g} s")]

    def abandon(self) -> None:
        """Leave the threads to their disk, which fails their requests when it is removed."""
        self.struck()


class _Writer:
    """Writes and reads single blocks of a slice, and knows what each of them must hold."""

    def __init__(self, fd: int, offset: int, size: int, block_bytes: int, seed: int, order_seed: int):
        self.offset = offset
        self.block_bytes = block_bytes
        self.seed = seed
        self.journal = array.array("I", bytes(4 * (size // block_bytes)))  # generation of the last acknowledged write
        self.lost: list[Lost] = []
        self.gap_s = 0.0
        self.counts = dict.fromkeys(("writes", "reads", "flushes", "verified"), 0)
        self._fd = fd
        self._numbers = random.Random(order_seed)  # noqa: S311 (where to write)
        self._generation = 0
        # O_DIRECT wants it aligned. Never closed: a thread that waits for its disk may need it for longer than we are.
        self._buffer = mmap.mmap(-1, CHECK_BLOCKS * block_bytes)

    def run(self, until: float, struck: threading.Event) -> None:
        """Write and read until that moment and that event, then read everything back."""
        try:
            while time.monotonic() < until or not struck.is_set():
                try:
                    self._one()
                except OSError as error:
                    self._note(error)
            self._flush()
            for first in range(0, len(self.journal), CHECK_BLOCKS):
                self._read(first, min(CHECK_BLOCKS, len(self.journal) - first))
        except OSError as error:
            self._note(error)

    def _note(self, error: OSError) -> None:
        if len(self.lost) < LOST_KEPT_MAX:
            self.lost.append(Lost("status", "driver", text=f"the disk has said {error.strerror}"))

    def _one(self) -> None:
        place = self._numbers.randrange(len(self.journal))
        if self._numbers.random() < READ_SHARE:
            self._read(place, 1)
            self.counts["reads"] += 1
            return
        self._generation += 1
        at = self.offset + place * self.block_bytes
        with memoryview(self._buffer) as whole, whole[: self.block_bytes] as block:
            _driver.fill_block(block, at, self._generation, self.seed)
            self.journal[place] = 0  # should it fail, nobody knows
            with self._timed():
                done = os.pwritev(self._fd, [block], at)
        if done != self.block_bytes:
            raise OSError(0, f"{done} bytes written of {self.block_bytes}")
        self.journal[place] = self._generation
        self.counts["writes"] += 1
        if self.counts["writes"] % FSYNC_EVERY == 0:
            self._flush()

    def _flush(self) -> None:
        with self._timed():
            os.fsync(self._fd)
        self.counts["flushes"] += 1

    def _read(self, first: int, count: int) -> None:
        """Read blocks and compare those that were written."""
        size = count * self.block_bytes
        with memoryview(self._buffer) as whole, whole[:size] as part, self._timed():
            done = os.preadv(self._fd, [part], self.offset + first * self.block_bytes)
        if done != size:
            raise OSError(0, f"{done} bytes read of {size}")
        for index in range(count):
            generation = self.journal[first + index]
            if generation:
                block = self._buffer[index * self.block_bytes : (index + 1) * self.block_bytes]
                at = self.offset + (first + index) * self.block_bytes
                self.lost += compare_block(block, at, generation, self.seed, "driver")
                self.counts["verified"] += 1

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.gap_s = max(self.gap_s, time.monotonic() - begin)
