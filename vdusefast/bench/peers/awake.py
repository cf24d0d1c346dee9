"""Keep a CPU busy while nothing is timed: for machines whose clock jumps over idle time.

Where time is a count of instructions, a machine with nothing to do, such as one that waits for its host's files, jumps
to its next timer: time-outs expire that nobody has waited for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Awake:
    """A context manager: a process of the lowest priority spins, except within `paused`; none does unless `wanted`."""

    def __init__(self, wanted: bool):
        self._wanted = wanted
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Awake:
        if self._wanted:
            arguments = [sys.executable, "-S", "-c", "while True: pass"]
            self._process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, process_group=0)
            os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the machine idle, so that a measurement does not share it."""
        if self._process is None:
            yield
            return
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)
