"""Signals that ask a process to end, noted rather than obeyed at once."""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

WAKEUP_BYTES = 4096  # to read at once: one for each signal


class StopRequestedError(Exception):
    """A signal has asked for the end; the message is its name."""


class Wakeup:
    """Context manager of the main thread: lets its waits end when a signal with a handler comes, in whichever thread.

    Handlers run in the main thread. The kernel may give a signal to another thread (as it does while the main thread
    has one pending), and then no system call of the main thread is interrupted: it would wait on, and the handler, too.
    """

    def __init__(self) -> None:
        self._read_fd = self._write_fd = self._previous = -1

    def __enter__(self) -> Self:
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._previous)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def wait(self, *fds: int, timeout_s: float | None = None) -> list[int]:
        """Wait until one of `fds` (borrowed) is readable, a signal has come, or `timeout_s` (None: no limit) is over.

        Returns the readable ones of `fds`. Runs in the main thread; handlers have run when it returns.
        """
        poll = select.poll()
        for fd in (*fds, self._read_fd):
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _events in poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)]
        if self._read_fd in ready:
            os.read(self._read_fd, WAKEUP_BYTES)
        return [fd for fd in ready if fd != self._read_fd]


class StopSignals:
    """Context manager: while it is entered, SIGTERM, SIGINT and SIGHUP are noted rather than end the process.

    For commands that drain their devices and end with status 0. Enter it in the main thread; `requested` and `wait`
    work in any. A second signal has its usual effect, for those who cannot wait; one that comes within SAME_S of the
    first is the same one, sent to a process and to its group. After nohup, SIGHUP is ignored as before.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    SAME_S = 0.5

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.repeated = False  # another one has come, later than SAME_S
        self._since_s = 0.0
        self._fd = -1
        self._wakeup = Wakeup()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # An eventfd and not a threading.Event, whose lock the handler might find held by the wait that it interrupts.
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wakeup.__enter__()
        numbers = [number for number in self.SIGNALS if not _is_waived(number)]
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()
        self._wakeup.__exit__(kind, error, tb)
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
        if threading.current_thread() is not threading.main_thread():
            select.select([self._fd], [], [], timeout_s)
            return self.requested
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self.requested and (left_s := until - time.monotonic()) > 0:
            self.wait_for(timeout_s=None if left_s == math.inf else left_s)
        return self.requested

    def wait_for(self, *fds: int, timeout_s: float | None = None) -> list[int]:
        """Wait until one of `fds` (borrowed) is readable, a signal has come, or `timeout_s` (None: no limit) is over.

        Returns the readable ones of `fds`; at once, and without a look at them, when a signal has come before. It may
        return none early. Runs in the main thread.
        """
        return [] if self.requested else self._wakeup.wait(*fds, timeout_s=timeout_s)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._is_new(number):
            self._restore()
            signal.raise_signal(number)

    def _is_new(self, number: int) -> bool:
        """Note a signal. Returns whether it is another one than the first, and repeats it."""
        if self.received is None:
            self.received, self._since_s = signal.Signals(number), time.monotonic()
            os.eventfd_write(self._fd, 1)
            return False
        self.repeated = self.repeated or time.monotonic() - self._since_s > self.SAME_S
        return self.repeated

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class PatientStopSignals(StopSignals):
    """The same for a process that must always clean up: no second signal ends it at once.

    For a process with things that nobody else can clean up: a device in the kernel, other processes, directories. When
    `repeated` is set, the user wants a faster end.
    """

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
        self._is_new(number)
        if self._interrupting and self.received is not None:
            self._interrupting = False
            raise StopRequestedError(self.received.name)


def _is_waived(number: signal.Signals) -> bool:
    """Return whether this process was started to continue after a hangup."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
