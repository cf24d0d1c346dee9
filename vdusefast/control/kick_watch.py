"""A queue's kick eventfd, watched by the supervisor while no worker serves the queue."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from vdusefast.base.guard import Guard, Part


class KickWatch:
    """One kick eventfd. While the queue is served, its worker reads the eventfd."""

    def __init__(self, guard: Guard):
        """Make the eventfd; `close` releases it. Raises OSError."""
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._guard = guard
        self._watching = False

    def watch(self, on_kick: Callable[[], object], on_fault: Callable[[], object]) -> None:
        """Call `on_kick` at each kick; `on_fault` after a kick at which that raised."""

        def kicked() -> None:
            try:
                os.eventfd_read(self.fd)
            except BlockingIOError:
                return
            on_kick()

        self._watching = True
        self._guard.reader(self.fd, Part.KICK, kicked, on_fault)

    def unwatch(self) -> None:
        """Leave the kicks to the worker."""
        if self._watching:
            self._watching = False
            asyncio.get_running_loop().remove_reader(self.fd)

    def close(self) -> None:
        """Close the eventfd; a second call does nothing."""
        if self.fd >= 0:
            self.unwatch()
            os.close(self.fd)
            self.fd = -1
