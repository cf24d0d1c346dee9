"""The driver's side of a tortured device: writes that prove themselves, and the journal of what was acknowledged.

Each queue has a driver thread and a job of its own over its slice of the device. A cycle is one run of all jobs: mixed
reads and writes for a while, then everything that was ever acknowledged is read back. What is known of each block (the
generation of its last acknowledged write) stays with the job from cycle to cycle, outside the device.
"""

from __future__ import annotations

import os
import struct
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from vdusefast.bench.raw.memory import Workload, make_job
from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver

READ_SHARE = 0.3
FSYNC_EVERY = 64
ERRORS = ("status", "used_len")  # answers that are errors, as apart from data that are wrong

_BLOCK_HEADER = struct.Struct("<QQIIII")  # magic, offset, generation, seed, length, checksum


@dataclass(frozen=True)
class Lost:
    """Something that should not have happened to acknowledged or pending data."""

    what: str  # one of _driver.FAULTS, or "unanswered", "ring"
    where: str  # "driver", "store"
    offset_bytes: int = -1  # on the device
    expected: int = 0
    found: int = 0
    text: str = ""

    def __str__(self) -> str:
        if self.offset_bytes < 0:
            return f"{self.what}: {self.text}"
        seen = "found in the store" if self.where == "store" else "read back"
        return (
            f"{self.what}: block at byte {self.offset_bytes}: expected {self.expected}, {seen} {self.found}"
            f"{': ' if self.text else ''}{self.text}"
        )


class DriverLoad:
    """Verified jobs, one a queue, that run again and again. Owns the driver."""

    def __init__(
        self,
        driver: LoopbackDriver,
        *,
        area_bytes: int,
        block_bytes: int,
        depth: int,
        run_s: float,
        seed: int,
        overlap: bool,
        give_up_s: float,
    ):
        """Share the first `area_bytes` of the device out among its queues.

        overlap: for an engine that keeps the order of a queue's requests.
        """
        self._driver = driver
        self._give_up_s = give_up_s
        self._seen = [(0, 0)] * driver.queue_count
        self._block_bytes = block_bytes
        self._seed = int.from_bytes(os.urandom(4), "little") | 1  # the blocks of an earlier run never pass for ours
        slice_bytes = area_bytes // driver.queue_count // block_bytes * block_bytes
        self._offsets = [queue * slice_bytes for queue in range(driver.queue_count)]
        load = Workload(
            kind="mixed",
            order="random",
            block_bytes=block_bytes,
            depth=depth,
            size_bytes=slice_bytes,
            io_limit=0,
            queue_count=1,
            read_share=READ_SHARE,
            fsync_every=FSYNC_EVERY,
            verify="crc32c",
            check_after=True,
            seed=self._seed,
            runtime_s=run_s,
            overlap=overlap,
        )
        self._jobs = [
            make_job(driver, replace(load, offset_bytes=offset, order_seed=seed * driver.queue_count + queue + 1))
            for queue, offset in enumerate(self._offsets)
        ]

    def close(self) -> None:
        """Reset the device and give its memory up."""
        self._driver.close()

    def begin(self) -> Cycle:
        """Start a cycle: the load runs when this returns."""
        return Cycle(
            [
                _driver.DriverThread([self._driver.ring(queue)], [job], stall_s=self._give_up_s)
                for queue, job in enumerate(self._jobs)
            ]
        )

    def forget_gaps(self) -> None:
        """Begin to measure how long queues keep their driver waiting."""
        for queue in range(self._driver.queue_count):
            self._driver.ring(queue).take_gap_s()

    def gaps_s(self, queue: int | None) -> tuple[float, float | None]:
        """Return the longest wait between two completions since `forget_gaps`, and that of the other queues.

        queue: the one that was hit; None means any, so that there are no others.
        """
        gaps = [self._driver.ring(index).take_gap_s() for index in range(self._driver.queue_count)]
        if queue is None:
            return max(gaps), None
        return gaps.pop(queue), max(gaps, default=None)

    def new_faults(self, *, errors_expected: bool = False) -> list[Lost]:
        """Return what the driver has found wrong in the last cycle; but for errors, where these are expected."""
        lost = []
        for queue, job in enumerate(self._jobs):
            results = job.results()
            now = results["request_errors"], results["verify_errors"]
            errors, wrong = (new - old for new, old in zip(now, self._seen[queue], strict=True))
            self._seen[queue] = now
            count = wrong if errors_expected else errors + wrong
            kept = [
                Lost(fault["kind"], "driver", fault["offset_bytes"], fault["expected"], fault["found"], fault["op"])
                for fault in results["faults"]
                if count and not (errors_expected and fault["kind"] in ERRORS)
            ]
            lost += kept
            if count > len(kept):
                lost.append(Lost("more", "driver", text=f"queue {queue}: {count - len(kept)} more"))
        return lost

    def counts(self) -> dict[str, int]:
        """Return the counts so far: writes, reads, flushes, blocks verified."""
        total = dict.fromkeys(("writes", "reads", "flushes", "verified"), 0)
        for job in self._jobs:
            results = job.results()
            total["writes"] += results["ops"]["write"]["ios"]
            total["reads"] += results["ops"]["read"]["ios"] + results["ops"]["check"]["ios"]
            total["flushes"] += results["ops"]["sync"]["ios"]
            total["verified"] += results["verified"]
        return total

    def check_store(self, path: Path) -> tuple[int, list[Lost]]:
        """Compare the journal with the file behind the device, past all of our code. Nothing may be running.

        Returns how many blocks were compared, and what is wrong. Raises OSError.
        """
        import numpy as np

        count, lost = 0, []
        with path.open("rb") as file:
            for job, offset in zip(self._jobs, self._offsets, strict=True):
                journal = np.frombuffer(job.journal(), np.uint32)
                known = np.flatnonzero((journal != 0) & (journal != _driver.BLOCK_UNKNOWN))
                for place in known.tolist():
                    at = offset + place * self._block_bytes
                    block = os.pread(file.fileno(), self._block_bytes, at)
                    lost += compare_block(block, at, int(journal[place]), self._seed, "store")
                count += len(known)
        return count, lost


def compare_block(block: bytes, at: int, generation: int, seed: int, where: str) -> list[Lost]:
    """Return what is wrong with a block that was written as `generation` at byte `at` of the device; nothing, if all is
    well.
    """
    what = _driver.check_block(block, at, generation, seed)
    return [] if what == "none" else [Lost(what, where, at, generation, generation_of(block))]


def generation_of(block: bytes) -> int:
    """Return the generation that a block says it is of."""
    return int(_BLOCK_HEADER.unpack_from(block)[2])


class Cycle:
    """One run of the jobs, by a thread for each queue."""

    def __init__(self, loops: list[_driver.DriverThread]):
        self._loops = loops
        self._lost: list[Lost] = []
        self._threads = [
            threading.Thread(target=self._run, args=(queue, loop), name=f"vdusefast-load-{queue}")
            for queue, loop in enumerate(loops)
        ]
        for thread in self._threads:
            thread.start()

    def struck(self) -> None:
        """Do nothing: the driver's threads keep their time."""

    def finish(self) -> list[Lost]:
        """Wait for the end of the run and of its read-back. Returns unanswered requests and broken rings."""
        for thread in self._threads:
            thread.join()
        return self._lost

    def abandon(self) -> None:
        """End the threads at once, whatever is in flight: the device is gone."""
        for loop in self._loops:
            loop.stop(abandon=True)
        for thread in self._threads:
            thread.join()

    def _run(self, queue: int, loop: _driver.DriverThread) -> None:
        try:
            loop.run()
        except OSError as error:
            text = error.strerror or str(error)
            if isinstance(error, TimeoutError):
                self._lost.append(Lost("unanswered", "driver", text=f"queue {queue}: requests are not answered"))
            else:
                self._lost.append(Lost("ring", "driver", text=text))
