"""Signals that ask a process to end, noted rather than obeyed at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequestedError(Exception):
    """A signal has asked for the end; the message is its name."""


class StopSignals:
    """Notes the first of SIGTERM, SIGINT and SIGHUP while entered; further ones change nothing.

    For what must clean up whatever comes: there is no second signal that ends the process at once. A context
    manager, for the main thread.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = ""  # the name of the first
        self._interrupting = False
        self._fd = -1
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # An eventfd and not a threading.Event, whose lock the handler might find held by the wait that it interrupts.
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._previous = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._fd)
        self._fd = -1

    def fileno(self) -> int:
        """Return a descriptor that polls readable once a signal has come."""
        return self._fd

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within it, the first signal raises StopRequestedError, to cut short what cleans up by itself."""
        if self.received:
            raise StopRequestedError(self.received)
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self.received:
            self.received = signal.Signals(number).name
            os.eventfd_write(self._fd, 1)
        if self._interrupting:
            self._interrupting = False
            raise StopRequestedError(self.received)
