"""The asyncio loop of a worker whose class has coroutines. It runs in the worker's own thread, a step at a time.

A thread of its own would compete with the worker for the CPU and the interpreter's lock. So the worker steps the loop
after it has handed requests over and while it waits for them, and sleeps inside of it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any


class Loop:
    """An event loop and the tasks that requests wait for."""

    def __init__(self, wake_fd: int, complain: Callable[[BaseException], None]) -> None:
        """Make the loop.

        wake_fd: an eventfd, borrowed, by which other threads wake it. complain: gets exceptions that come out of it.
        """
        self._complain = complain
        self._wake_fd = wake_fd
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._watched: tuple[int, ...] = ()
        self._readable = 0
        self._sleeping = False
        self.tasks: set[asyncio.Task[None]] = set()
        self._loop.add_reader(wake_fd, self._woken)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a coroutine that ends a request."""
        task = self._loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def call(self, awaitable: Awaitable[Any]) -> None:
        """Run until `awaitable` is done; its exception is raised."""

        async def wait() -> None:
            await awaitable

        self._loop.run_until_complete(wait())

    def step(self) -> None:
        """Run ready callbacks, without waiting."""
        self._loop.call_soon(self._loop.stop)
        self._run()

    def wake(self) -> None:
        """End a sleep; called in the loop's thread."""
        if self._sleeping:
            self._loop.stop()

    def sleep(self, fds: Sequence[int], timeout_s: float | None) -> int:
        """Run until a request ends, one of `fds` is readable or the time is up; return bits of the readable ones."""
        self._watch(tuple(fds))
        self._readable = 0
        self._sleeping = True
        timer = self._loop.call_later(timeout_s, self._loop.stop) if timeout_s is not None else None
        try:
            self._run()
        finally:
            self._sleeping = False
            if timer is not None:
                timer.cancel()
        return self._readable

    def close(self) -> None:
        """Cancel running tasks, and close."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self.step()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._watch(())
        self._loop.remove_reader(self._wake_fd)
        asyncio.set_event_loop(None)
        self._loop.close()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        except BaseException as error:  # SystemExit of a callback, for one, must not end the worker
            self._complain(error)

    def _watch(self, fds: tuple[int, ...]) -> None:
        if fds == self._watched:
            return
        for fd in self._watched:
            self._loop.remove_reader(fd)
        for bit, fd in enumerate(fds):
            self._loop.add_reader(fd, self._seen, 1 << bit)
        self._watched = fds

    def _seen(self, bit: int) -> None:
        self._readable |= bit
        if self._sleeping:
            self._loop.stop()

    def _woken(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            return
        if self._sleeping:
            self._loop.stop()
