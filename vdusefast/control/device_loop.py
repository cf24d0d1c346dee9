"""The event loop of a device, in a thread of its own, which lives until the device is released."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vdusefast.base.guard import Guard, Part
from vdusefast.base.time_limits import MARGIN_S
from vdusefast.errors import VdusefastError
from vdusefast.host import reclaim

_log = logging.getLogger("vdusefast")


class LoopThread:
    """A thread that runs an event loop. Workers die with this thread, so only `end` ends it."""

    def __init__(self, name: str, report: Callable[[VdusefastError], None], *, io_flusher: bool) -> None:
        """Start it. name: of the device. report: called with every failure. io_flusher: mark the thread as one."""
        self.loop = asyncio.new_event_loop()
        self._name = name
        self._guard = Guard(name, report)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"vdusefast-{name}", daemon=True)
        if io_flusher:
            self.loop.call_soon(_mark_io_flusher)  # first of all: workers inherit it
        self._thread.start()

    def end(self) -> None:
        """Stop the loop and wait for the thread. Workers that are left die with it."""
        self._ending.set()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(MARGIN_S)
        if self._thread.is_alive():
            _log.error("device %s: its loop does not end: something in it waits for the kernel", self._name)

    def _run(self) -> None:
        """Run the loop until `end`, let the tasks in it clean up, and close it."""
        loop = self.loop
        asyncio.set_event_loop(loop)
        loop.set_exception_handler(lambda _, context: self._guard.failed(Part.LOOP, _exception_of(context)))
        try:
            while not self._ending.is_set():
                try:
                    loop.run_forever()
                except BaseException as error:  # SystemExit and the like are not kept in the loop
                    self._guard.failed(Part.LOOP, error)
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        finally:
            asyncio.set_event_loop(None)
            loop.close()


def _mark_io_flusher() -> None:
    """Mark this thread, which answers the kernel: it must not wait for memory that is free only once it has."""
    with suppress(OSError):  # `info` says which processes could not be marked
        reclaim.mark_io_flusher()


def _exception_of(context: dict[str, Any]) -> BaseException:
    """Return the exception that an event loop reports because no task took it."""
    error = context.get("exception")
    return error if isinstance(error, BaseException) else RuntimeError(context.get("message", "unknown"))
