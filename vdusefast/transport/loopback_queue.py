"""One queue of the loopback bus: the driver's settings, and the eventfds of both sides."""

from __future__ import annotations

import os
from contextlib import ExitStack

from vdusefast.transport.uapi import VqInfo

EVENTFD_FLAGS = os.EFD_NONBLOCK | os.EFD_CLOEXEC


class BusQueue:
    """The bus's state of one queue.

    `kickfd` keeps its number for the life of the bus: it is a duplicate of the device's eventfd, or of `idle_fd`
    while the device has set none, so that a driver may keep the number.
    """

    def __init__(self, index: int):
        with ExitStack() as opened:  # a failure half-way leaves nothing open
            self.idle_fd = os.eventfd(0, EVENTFD_FLAGS)
            opened.callback(os.close, self.idle_fd)
            self.kickfd = os.dup(self.idle_fd)
            opened.callback(os.close, self.kickfd)
            self.irqfd = os.eventfd(0, EVENTFD_FLAGS)
            opened.pop_all()
        self.kickfd_set = False
        self.info = VqInfo(index)

    def set_kickfd(self, fd: int) -> None:
        """Send kicks to `fd` (borrowed), -1 for nowhere. A kick that came too early is forwarded."""
        os.dup2(self.idle_fd if fd < 0 else fd, self.kickfd, inheritable=False)
        self.kickfd_set = fd >= 0
        if fd >= 0 and self._take_early_kick() and self.info.ready:
            os.eventfd_write(fd, 1)

    def reset(self) -> None:
        """Forget the driver's settings."""
        self.set_kickfd(-1)
        self._take_early_kick()
        self.info = VqInfo(self.info.vq_index)

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.idle_fd, self.kickfd, self.irqfd):
            os.close(fd)

    def _take_early_kick(self) -> bool:
        try:
            return os.eventfd_read(self.idle_fd) > 0
        except BlockingIOError:
            return False
