"""Messages to systemd about a service: sd_notify(3) over a datagram socket."""

from __future__ import annotations

import logging
import os
import socket
import time

from vdusefast.base.time_limits import EXTEND_EVERY_S, EXTEND_S

_log = logging.getLogger("vdusefast")


def is_service() -> bool:
    """Return whether a service manager has started this very process, and would start it again."""
    return bool(os.environ.get("NOTIFY_SOCKET")) or os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


class Notifier:
    """Tells the service manager named by $NOTIFY_SOCKET; does nothing where there is none.

    The variables are taken out of the environment: workers are not the service.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = os.environ.pop("WATCHDOG_USEC", "")
        watchdog_pid = os.environ.pop("WATCHDOG_PID", "")
        # An abstract name is written with @ in place of its zero byte.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        meant = not watchdog_pid or watchdog_pid == str(os.getpid())
        self._alive_s = self._extended_s = 0.0  # when the manager last had such a message
        self.watchdog_s = int(watchdog_us) / 1e6 if self._address and meant and watchdog_us.isdecimal() else 0.0

    @property
    def active(self) -> bool:
        """Whether there is a manager to send to."""
        return bool(self._address)

    def send(self, **fields: str | int) -> None:
        """Send fields such as READY=1, STATUS="..."; a manager that is gone is logged, no more."""
        if not self._address:
            return
        text = "\n".join(f"{key}={str(value).replace(chr(10), ' ')}" for key, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.setblocking(False)
                connection.sendto(text.encode(), self._address)
        except OSError as error:
            _log.warning("cannot tell the service manager %s: %s", text.partition("\n")[0], error.strerror)

    def keep_alive(self) -> None:
        """Send the watchdog's message, if it is time for one. Call it again and again."""
        now_s = time.monotonic()
        if self.watchdog_s and now_s - self._alive_s >= self.watchdog_s / 3:
            self._alive_s = now_s
            self.send(WATCHDOG=1)

    def extend(self) -> None:
        """Have the manager wait longer for a stop, if it was asked long ago. Call it again and again."""
        now_s = time.monotonic()
        if not self._extended_s or now_s - self._extended_s >= EXTEND_EVERY_S:
            self._extended_s = now_s
            self.send(EXTEND_TIMEOUT_USEC=int(EXTEND_S * 1e6))
