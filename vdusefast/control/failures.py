"""The failures of a device: those of now, and the last that has ended.

A failure begins, is logged once, and ends; then it is history, with its time. Some end only with the device.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import NamedTuple

from vdusefast.errors import VdusefastError

_log = logging.getLogger("vdusefast")


class PastFailure(NamedTuple):
    """A failure that has ended."""

    error: VdusefastError
    began_s: float  # of CLOCK_REALTIME, as `ended_s`
    ended_s: float


class _Present(NamedTuple):
    error: VdusefastError
    began_s: float
    until_s: float  # of the monotonic clock; it ends by itself then


class Failures:
    """The failures of one device. All methods may be called in any thread."""

    def __init__(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._present: dict[str, _Present] = {}
        self.last: PastFailure | None = None

    @property
    def first(self) -> VdusefastError | None:
        """The one that has lasted longest, None when nothing is wrong."""
        now_s = time.monotonic()
        with self._lock:
            return next((kept.error for kept in self._present.values() if kept.until_s > now_s), None)

    def begin(self, error: VdusefastError, what: str = "", lasts_s: float = math.inf) -> None:
        """Log a failure, and keep it until `end`, or until nothing has been said of it for `lasts_s`.

        what: the part that has failed; a part that has failed already keeps its first failure.
        """
        _log.error("%s", error)
        new = _Present(error, time.time(), time.monotonic() + lasts_s)
        with self._lock:
            old = self._present.get(what)
            self._present[what] = new if old is None else old._replace(until_s=new.until_s)

    def end(self, what: str) -> None:
        """Note that `what` is well again. Does nothing when it was."""
        with self._lock:
            was = self._present.pop(what, None)
            if was is not None:
                self.last = PastFailure(was.error, was.began_s, time.time())

    def settle(self) -> None:
        """End the failures that nobody has reported for long enough."""
        now_s = time.monotonic()
        for what in [what for what, kept in list(self._present.items()) if kept.until_s <= now_s]:
            self.end(what)
