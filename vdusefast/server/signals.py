"""Signals that ask a process to end, noted rather than obeyed at once."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequestedError(Exception):
    """A signal has asked for the end; the message is its name."""


class StopSignals:
    """Context manager: while it is entered, SIGTERM and SIGINT are noted rather than end the process.

    For commands that drain their devices and end with status 0. Enter it in the main thread; `requested` and `wait`
    work in any. A second signal has its usual effect, for those who cannot wait; one that comes within SAME_S of the
    first is the same one, sent to a process and to its group.
    """

    SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
    SAME_S = 0.5

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since_s = 0.0
        self._fd = -1
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # An eventfd and not a threading.Event, whose lock the handler might find held by the wait that it interrupts.
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        numbers = [number for number in self.SIGNALS if not _is_waived(number)]
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()
        os.close(self._fd)
        self._fd = -1

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def fileno(self) -> int:
        """Return a descriptor (its own) that polls readable once a signal has come."""
        return self._fd

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for a signal; returns whether one has come."""
        if not self.requested:
            select.select([self._fd], [], [], timeout_s)
        return self.requested

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since_s = signal.Signals(number), time.monotonic()
            os.eventfd_write(self._fd, 1)
        elif time.monotonic() - self._since_s > self.SAME_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class PatientStopSignals(StopSignals):
    """The same for a process that must always clean up: no second signal ends it at once. Notes SIGHUP, too.

    For a process with a device in the kernel, because nobody else can clean that up. After nohup, SIGHUP is ignored as
    before.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        super().__init__()
        self._interrupting = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within it, the first signal raises StopRequestedError, to cut short what cleans up by itself."""
        if self.received is not None:
            raise StopRequestedError(self.received.name)
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            os.eventfd_write(self._fd, 1)
        if self._interrupting:
            self._interrupting = False
            raise StopRequestedError(self.received.name)


def _is_waived(number: signal.Signals) -> bool:
    """Return whether this process was started to continue after a hangup."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
