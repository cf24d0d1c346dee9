"""Which queues wait for their storage, and since when: seen from outside, as a worker that hangs cannot say it.

A queue hangs when it completes nothing although requests are in flight. The supervisor checks about once a second,
through the shared pages; a queue that moves costs one read of a counter.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdusefast.control.worker_process import Pages

LOOK_S = 1.0
WARN_S = 10.0  # then after twice as long each time, at least each WARN_PAUSE_MAX_S
WARN_PAUSE_MAX_S = 3600.0

_log = logging.getLogger("vdusefast")


@dataclass
class _Seen:
    """The result of the last check. `since_s` is None while nothing was in flight."""

    requests: int = -1
    since_s: float | None = None
    waits: bool = False  # a second check has found the same requests in flight
    warn_s: float = WARN_S  # the next warning is after so long

    @property
    def warned(self) -> bool:
        """Whether a warning has said that it waits."""
        return self.warn_s > WARN_S


class QueueWatch:
    """The queues of one device. `look` is called in one thread; `waiting_s` may be in any."""

    def __init__(self, device: str, pages: Pages, queue_count: int):
        """Begin to watch. pages: the shared pages (borrowed)."""
        self._device = device
        self._pages = pages
        self._seen = [_Seen() for _ in range(queue_count)]

    def look(self, queue: int, now_s: float, *, serves: bool = True) -> None:
        """Check `queue`. now_s: of a clock that does not jump. serves: False where it is not expected to move."""
        seen = self._seen[queue]
        requests = self._pages.requests_done(queue)
        inflight = serves and self._pages.has_inflight(queue)
        if not inflight or requests != seen.requests or seen.since_s is None:
            self._moves(queue, seen, now_s)
            # If the next check finds these requests again, they have waited since now.
            self._seen[queue] = _Seen(requests, now_s if inflight else None)
            return
        seen.waits = True
        if now_s - seen.since_s >= seen.warn_s:
            seen.warn_s += min(seen.warn_s, WARN_PAUSE_MAX_S)
            _log.warning(
                "device %s: queue %d waits for its storage since %.0f s", self._device, queue, now_s - seen.since_s
            )

    def waiting_s(self, queue: int, now_s: float) -> float:
        """Return for how many seconds `queue` has waited for its storage, 0.0 when it does not."""
        seen = self._seen[queue]
        return max(0.0, now_s - seen.since_s) if seen.waits and seen.since_s is not None else 0.0

    def _moves(self, queue: int, seen: _Seen, now_s: float) -> None:
        if seen.warned and seen.since_s is not None:
            _log.warning("device %s: queue %d continues after %.0f s", self._device, queue, now_s - seen.since_s)
