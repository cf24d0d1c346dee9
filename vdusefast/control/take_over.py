"""When a worker that died is replaced: at once, and after deaths without progress with pauses that grow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from vdusefast.base.guard import PAUSE_S, Guard, Part

TRIES_AT_ONCE = 3  # without progress; then with pauses that grow
WINDOW_S = 60.0  # a death so long after the previous one has nothing to do with it
PAUSE_MIN_S = 0.05
PAUSE_MAX_S = 5.0


class TakeOver:
    """The replacement of one queue's worker. At most one is under way."""

    def __init__(
        self,
        guard: Guard,
        requests_done: Callable[[], int],
        attempt: Callable[[], Awaitable[bool]],
        on_repeated: Callable[[], None],
        is_wanted_after_fault: Callable[[], bool],
    ):
        """Prepare; see `begin`.

        requests_done: how many requests of the queue have been completed. attempt: replaces the worker once; returns
        whether nothing is left to do. on_repeated: called when several workers in a row made no progress.
        is_wanted_after_fault: called after an unexpected exception; returns whether to try again.
        """
        self._guard = guard
        self._requests_done = requests_done
        self._attempt = attempt
        self._on_repeated = on_repeated
        self._is_wanted_after_fault = is_wanted_after_fault
        self._task: asyncio.Task[None] | None = None
        self._tries = 0  # since a request was last completed, or since none was needed for WINDOW_S
        self._done_count = -1  # completed requests at the last try
        self._tried_s = 0.0  # when the last try was

    def begin(self, pause_s: float = 0.0) -> None:
        """Begin unless one is under way, after a pause."""
        if self._task is None:
            self._task = self._guard.task(Part.TAKE_OVER, self._try_until_done(pause_s), self._begin_again)

    def cancel(self) -> None:
        """End the one that is under way, if any."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    # -- inside

    def _begin_again(self) -> None:
        """Begin again after an unexpected exception."""
        self._task = None
        if self._is_wanted_after_fault():
            self.begin(PAUSE_S)

    async def _try_until_done(self, pause_s: float) -> None:
        """Try until the queue has a worker again or needs none. Other operations may replace the worker meanwhile."""
        try:
            await asyncio.sleep(pause_s)
            while True:
                pause_s = self._next_pause_s()
                if self._tries == TRIES_AT_ONCE + 1:
                    self._on_repeated()
                await asyncio.sleep(pause_s)
                if await self._attempt():
                    return
        finally:
            if self._task is asyncio.current_task():  # not where `begin` came after `cancel`
                self._task = None

    def _next_pause_s(self) -> float:
        """Return how long to wait before the next worker: 0 after progress, or after a long time without a death."""
        done_count, now_s = self._requests_done(), asyncio.get_running_loop().time()
        if done_count != self._done_count or now_s - self._tried_s > WINDOW_S:
            self._done_count, self._tries = done_count, 0
        self._tried_s = now_s
        self._tries += 1
        if self._tries <= TRIES_AT_ONCE:
            return 0.0
        return min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0 ** (self._tries - TRIES_AT_ONCE))
