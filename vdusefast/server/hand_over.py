"""One server takes a device over from another, in two steps, so that there is always one that can serve it.

The new server first proves that it can take over (proof.py). Then it asks the old one for the device (`ask`), which
drains it, lets go of it, and stays until its successor serves (`Successor`). If the successor ends before that, or
takes too long, the old server takes the device back.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from vdusefast.base import time_limits
from vdusefast.errors import DeviceBusyError, TimedOutError, VdusefastError
from vdusefast.host import containers, run_dirs
from vdusefast.server.rpc_client import NoServerError, RpcClient

LOOK_S = 0.002
SUCCESSOR_LOOK_S = 0.02
PING_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 10.0


def ask(path: Path) -> None:
    """Have the server of the run directory at `path`, if there is one, let go of its device, and wait until it has.

    All that this process needs later is loaded already, so that the device's driver waits as shortly as can be. Raises
    DeviceBusyError when its holder takes no commands, TimedOutError, what the server answers.
    """
    import vdusefast.backends.file
    import vdusefast.transport.kernel  # noqa: F401

    try:
        with RpcClient(path) as client:
            params = {"timeout_s": time_limits.STOP_TIMEOUT_S}
            client.call("hand_over", params, time_limits.client_s(time_limits.hand_over_s(time_limits.STOP_TIMEOUT_S)))
    except NoServerError:
        if run_dirs.is_held(path):
            raise DeviceBusyError(
                f"{path.name}: held by {containers.pid_text(run_dirs.holder_pid(path))}, which takes no commands"
            ) from None
    deadline = time.monotonic() + time_limits.MARGIN_S
    while run_dirs.is_held(path):
        if time.monotonic() > deadline:
            holder = containers.pid_text(run_dirs.holder_pid(path))
            raise TimedOutError(f"{path.name}: its old server ({holder}) does not let go of it")
        time.sleep(LOOK_S)


def serving_pid(path: Path) -> int | None:
    """Return the pid of the server that answers for the run directory at `path`, None when none does.

    It is 0 for a server in a PID namespace that we do not see.
    """
    try:
        with RpcClient(path) as client:
            client.call("ping", timeout_s=PING_TIMEOUT_S)
            return client.server_pid
    except VdusefastError:
        return None


class Successor:
    """The process that has asked for a device, until it serves it or has failed to."""

    def __init__(self, path: Path, pid: int, limit_s: float):
        """Begin to watch it. pid: 0 where that is not known (another PID namespace): the limit alone counts then.

        path: the run directory. limit_s: how long it may take to serve. Raises VdusefastError when it has ended.
        """
        self.pid = pid
        self._path = path
        self._limit_s = limit_s
        self._pid_fd = -1
        if pid > 0:
            try:
                self._pid_fd = os.pidfd_open(pid)
            except ProcessLookupError:
                raise VdusefastError(f"{path.name}: the process that asked for it (pid {pid}) has ended") from None
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise

    def close(self) -> None:
        """Close its descriptor. Idempotent."""
        if self._pid_fd >= 0:
            os.close(self._pid_fd)
            self._pid_fd = -1

    def wait(self, stop_fd: int, keep_alive: Callable[[], None] = lambda: None) -> str:
        """Wait until it serves. Returns "" then, else why it does not: it has ended, or is killed after its limit.

        stop_fd: readable once this process is to end; "" is returned then, too. keep_alive: called again and again.
        """
        deadline = time.monotonic() + self._limit_s
        poll = select.poll()
        poll.register(stop_fd, select.POLLIN)
        if self._pid_fd >= 0:
            poll.register(self._pid_fd, select.POLLIN)
        while True:
            keep_alive()
            ready = [fd for fd, _events in poll.poll(SUCCESSOR_LOOK_S * 1000)]
            if stop_fd in ready or self._serves():
                return ""
            if self._pid_fd in ready:
                return f"its new server ({containers.pid_text(self.pid)}) has ended before it served"
            if time.monotonic() > deadline:
                return self._end()

    def _serves(self) -> bool:
        return serving_pid(self._path) not in (None, os.getpid())

    def _end(self) -> str:
        """Kill it. Returns why."""
        why = f"its new server ({containers.pid_text(self.pid)}) did not serve within {self._limit_s:g} s"
        if self._pid_fd < 0:
            return why
        try:
            signal.pidfd_send_signal(self._pid_fd, signal.SIGKILL)
        except ProcessLookupError:
            return why
        select.select([self._pid_fd], [], [], KILL_TIMEOUT_S)
        return f"{why} and was killed"
