"""The standard output and error of a child process, as lines of the device's log.

A user's class may print anything, and any amount. So lines are bounded in length and number, control characters are
escaped, and no output is ever parsed as an event. Their level is WARNING: Python's default logging shows no lower one,
and the author of a class needs its tracebacks and prints.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable

from vdusefast.base.guard import Guard, Part
from vdusefast.base.printable import printable

READ_BYTES = 16 << 10  # at a time: a child that writes much must not occupy the loop
LAST_READ_COUNT_MAX = 64  # at the child's end; the pipe may have a writer that continues
LOST_COUNT_MAX = 100
LINE_MAX_BYTES = 1024
LINES_KEPT = 16
BURST_LINES = 200
LINES_A_SECOND = 20

_log = logging.getLogger("vdusefast")


class LineBudget:
    """Lines of one child in the log: a burst, and then so many a second."""

    def __init__(self) -> None:
        self._lines = float(BURST_LINES)
        self._at_s = time.monotonic()
        self._left_out = 0

    def log(self, level: int, text: str) -> None:
        """Log a line if there is room for it, and how many were left out before."""
        now_s = time.monotonic()
        self._lines = min(BURST_LINES, self._lines + (now_s - self._at_s) * LINES_A_SECOND)
        self._at_s = now_s
        if self._lines < 1:
            self._left_out += 1
            return
        self._lines -= 1
        left_out, self._left_out = self._left_out, 0
        _log.log(level, "%s%s", text, f" (after {left_out} lines that were left out)" if left_out else "")


class Output:
    """The bytes from a pipe, as lines of the log; the last ones are kept."""

    def __init__(self, title: str | Callable[[], str]):
        """Begin. title: what lines begin with."""
        self.budget = LineBudget()
        self._title = title if callable(title) else lambda: title
        self._kept: deque[str] = deque(maxlen=LINES_KEPT)
        self._rest = b""

    @property
    def last_line(self) -> str:
        """The last line that is not blank, "" while there is none."""
        return self._kept[-1] if self._kept else ""

    @property
    def last_lines(self) -> list[str]:
        """The last lines that are not blank, the oldest first."""
        return list(self._kept)

    def read(self, fd: int) -> int:
        """Read some bytes from a non-blocking pipe. Returns how many, 0 at its end, -1 if it is empty."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return -1
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[:LINE_MAX_BYTES]
        for line in lines:
            self._keep(line)
        return len(data)

    def finish(self, fd: int) -> None:
        """Read the last output; the child has ended."""
        for _ in range(LAST_READ_COUNT_MAX):
            if self.read(fd) <= 0:
                break
        self._keep(self._rest)
        self._rest = b""

    def lose(self) -> None:
        """Continue after a failed attempt to log."""
        self._rest = b""

    def _keep(self, line: bytes) -> None:
        text = printable(line[:LINE_MAX_BYTES].decode(errors="replace").rstrip().expandtabs())
        if text:
            self._kept.append(text.lstrip())
            self.budget.log(logging.WARNING, f"{self._title()}: {text}")


class ChildOutput(Output):
    """The pipe behind a child's standard output and error, from `watch` to `close`."""

    def __init__(self, guard: Guard, part: Part, title: Callable[[], str]):
        """Make the pipe; `write_fd` is for the child, to be closed by `spawned`. Raises OSError."""
        super().__init__(title)
        self._guard = guard
        self._part = part
        self._lost_count = 0
        self._watched = False
        self._fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)

    def spawned(self) -> None:
        """Close the child's end: it has its own by now, or was not started. A second call does nothing."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def watch(self) -> None:
        """Log the output as it comes, in the running loop."""
        self._watched = True
        self._guard.reader(self._fd, self._part, self._on_output, self._on_lost)

    def end(self) -> None:
        """Log the last output of the child, which has ended. Closes the pipe."""
        if self._fd >= 0:
            self.finish(self._fd)
        self.close()

    def close(self) -> None:
        """Close the pipe; a second call does nothing."""
        self.spawned()
        self._unwatch()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- inside

    def _on_output(self) -> None:
        if self.read(self._fd) == 0:
            self._unwatch()

    def _on_lost(self) -> None:
        """Continue to read: a full pipe would stop its writer."""
        self.lose()
        self._lost_count += 1
        if self._lost_count >= LOST_COUNT_MAX:
            self.close()

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            asyncio.get_running_loop().remove_reader(self._fd)
