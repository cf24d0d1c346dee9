"""The tasks and readers in the loop of a device, and the recovery when one of them fails unexpectedly.

The supervisor, its queues, its workers and the relay start every task and every reader here. An exception that leaves
one is a fault in our own code. It is logged with its traceback, `show` reports it as the device's failure, and the
part's own recovery follows. No part ends silently.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, TypeVar

from vdusefast.errors import VdusefastError

PAUSE_S = 1.0  # before a failed part is restarted

_log = logging.getLogger("vdusefast")
_T = TypeVar("_T")


class Part(Enum):
    """A part of a serving device: its work, and its recovery when it fails. The same table is in
    docs/design/control-plane.md.

    The recovery itself is where the part is started.
    """

    MESSAGES = (
        "reading the kernel's messages",
        "the next one is read; after three in a row the device is broken",
    )
    ANSWER = "answering a message", "it is answered with FAILED"
    QUEUE_WATCH = "checking for waiting queues", "it restarts after a second"
    MEMORY = "registering user memory", "the kernel's bounce pages stay in use"
    CONFIG_IRQ = "notifying the driver of its configuration", "the driver sees the change when it next reads it"
    QUEUE_START = "starting a queue", "the queue has failed; a reset starts it again"
    QUEUE_RESET = "stopping a queue of a broken device", "its worker is killed"
    KICK = "checking a kicked queue", "the queue has failed; a reset starts it again"
    TAKE_OVER = "replacing a worker", "it is tried again after a second"
    WORKER_EVENTS = "processing a worker's events", "the worker is killed and replaced"
    WORKER_OUTPUT = "logging a worker's output", "these lines are lost"
    WORKER_END = "noticing a worker's end", "it is replaced once its storage I/O has ended"
    RELAY = "running a relay", "the relay is killed and restarted after a pause"
    RELAY_EVENTS = "processing the relay's events", "the relay is killed and restarted"
    RELAY_OUTPUT = "logging the relay's output", "these lines are lost"
    KEEPER = "watching the keeper of connections", "another keeper is started after a second"
    RESIZE = "following the store's size", "the device keeps its size; vdusefast resize tries again"
    LOOP = "running the device's loop", "the loop continues"

    def __init__(self, what: str, follows: str) -> None:
        self.what = what
        self.follows = follows


class InternalError(VdusefastError):
    """A part has failed unexpectedly; the message says what follows."""


class Guard:
    """Starts the tasks and readers of one device."""

    def __init__(self, device: str, on_failure: Callable[[VdusefastError], None]):
        """Begin. on_failure: called with an InternalError for each failure; a failure of its own is logged."""
        self._device = device
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()

    def task(
        self, part: Part, work: Coroutine[Any, Any, _T], recover: Callable[[], object] | None = None
    ) -> asyncio.Task[_T | None]:
        """Run a coroutine in the running loop. Its result is None after a failure, which `recover` follows."""
        task = asyncio.get_running_loop().create_task(self._attend(part, work, recover))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # where it was cancelled before it began
        return task

    def reader(
        self, fd: int, part: Part, callback: Callable[[], object], recover: Callable[[], object] | None = None
    ) -> None:
        """Call `callback` in the running loop whenever `fd` is readable; `recover` follows each failure."""
        asyncio.get_running_loop().add_reader(fd, self.call, part, callback, recover)

    def call(self, part: Part, function: Callable[[], object], recover: Callable[[], object] | None = None) -> None:
        """Call `function` now; `recover` follows a failure."""
        try:
            function()
        except Exception as error:
            self.failed(part, error, recover)

    def failed(self, part: Part, error: BaseException, recover: Callable[[], object] | None = None) -> None:
        """Make a failure visible, and recover from it."""
        message = f"device {self._device}: {part.what} failed: {type(error).__name__}: {error}; {part.follows}"
        _log.error("%s", message, exc_info=error)
        for what in (lambda: self._on_failure(InternalError(message)), recover):
            try:
                if what is not None:
                    what()
            except Exception:
                _log.exception("device %s: %s: so did its recovery", self._device, part.what)

    async def close(self) -> None:
        """Cancel every task that still runs, and wait for its end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- inside

    async def _attend(
        self, part: Part, work: Coroutine[Any, Any, _T], recover: Callable[[], object] | None
    ) -> _T | None:
        try:
            return await work
        except Exception as error:
            self.failed(part, error, recover)
            return None
