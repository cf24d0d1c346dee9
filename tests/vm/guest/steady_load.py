"""Verified direct I/O on a file, from processes of its own: no request may fail, and every pause is noted."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

from disk_load import DiskLoad
from pattern import BLOCK_BYTES, Journal

BLOCKS = 256
PAUSE_MIN_S = 0.3
LOAD_NICE = 19  # it takes what time of the CPUs nothing else wants: a new server is not to be slow because of it
END_LIMIT_S = 120


class SteadyLoad:
    """Processes that write and read a file on the file system at `directory`, until `stop`."""

    def __init__(self, directory: Path, journals: Path, processes: int = 2) -> None:
        context = multiprocessing.get_context("fork")
        self._stop = context.Event()
        self._results: multiprocessing.Queue[str] = context.Queue()
        self._pauses: multiprocessing.Queue[float] = context.Queue()
        self._done = [context.Value("L", 0) for _ in range(processes)]
        self._path = directory / "load.bin"
        self._path.write_bytes(bytes(processes * BLOCKS * BLOCK_BYTES))
        self._journals = journals
        self._children = [context.Process(target=self._work, args=(place,)) for place in range(processes)]
        for child in self._children:
            child.start()

    def done(self) -> list[int]:
        """Return how many requests each process has made."""
        return [int(count.value) for count in self._done]

    def longest_pause_s(self) -> float:
        """Return the longest pause of any process since the last call."""
        longest_s = 0.0
        while not self._pauses.empty():
            longest_s = max(longest_s, self._pauses.get())
        return longest_s

    def stop(self) -> None:
        """End it, verify all that was written, and close the file. Raises AssertionError for what was wrong."""
        self._stop.set()
        problems = [self._results.get(timeout=END_LIMIT_S) for _ in self._children]
        for child in self._children:
            child.join(END_LIMIT_S)
        assert not any(problems), problems

    def _work(self, place: int) -> None:
        os.nice(LOAD_NICE)
        result = "ended without a word"
        try:
            with Journal(self._journals / f"steady-{place}", BLOCKS, seed=place + 1) as journal:
                load = DiskLoad(lambda: str(self._path), journal, at_bytes=place * BLOCKS * BLOCK_BYTES, seed=place)
                last_s = [time.monotonic()]

                def stop() -> bool:
                    now_s = time.monotonic()
                    if now_s - last_s[0] > PAUSE_MIN_S:
                        self._pauses.put(now_s - last_s[0])
                    last_s[0] = now_s
                    self._done[place].value += 1
                    return load.counts["gone"] > 0 or self._stop.is_set()

                load.run(stop)
                load.verify()
                result = f"an I/O error: {load.counts}" if load.counts["gone"] else ""
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        finally:
            self._results.put(result)
