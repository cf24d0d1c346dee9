"""A process that is no child of ours: watched through a descriptor, or started so that systemd adopts it.

systemd waits for the end of its own children only. If the main process of a service has another parent, systemd calls
it foreign, and at a stop sends SIGKILL right after SIGTERM. A reload starts the new server, so the new server would be
a child of the reload. A process in between therefore starts it and ends at once, and systemd becomes its parent.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from vdusefast.base import spawn
from vdusefast.errors import VdusefastError

START_LIMIT_S = 30.0  # for the process in between: one start of Python
PID_MAX_BYTES = 16
EXIT_NOT_STARTED = 127  # as of a shell that cannot start a command


class ForeignProcess:
    """A process whose parent is systemd, with the part of subprocess.Popen that `launch` uses."""

    def __init__(self, pid: int, pid_fd: int = -1) -> None:
        """Watch a process. pid_fd: a pidfd of it, consumed; -1 opens one, and raises ProcessLookupError."""
        self.pid = pid
        self.returncode: int | None = None
        self._fd = pid_fd if pid_fd >= 0 else os.pidfd_open(pid)

    def __del__(self) -> None:
        if (fd := getattr(self, "_fd", -1)) >= 0:
            os.close(fd)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            self.returncode = 0

    def wait(self, timeout_s: float) -> None:
        """Wait for its end. Only systemd knows its status. Raises subprocess.TimeoutExpired."""
        if not select.select([self._fd], [], [], timeout_s)[0]:
            raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout_s)
        self.returncode = 0


def start(
    command: Sequence[str], *, stdin: IO[bytes], pass_fds: Sequence[int], environment: Mapping[str, str]
) -> ForeignProcess:
    """Start a process in a session of its own. Its parent is systemd before the first line of the command runs.

    command: begins with the path of the program. It gets our output. Borrows `stdin` and the descriptors. Raises
    OSError, and VdusefastError when the process in between fails.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        between = spawn.command("server.foreign_process", "start_and_end", at_once=True)
        try:
            done = subprocess.run(
                [*between, str(theirs.fileno()), *command],
                stdin=stdin,
                pass_fds=[theirs.fileno(), *pass_fds],
                env=environment,
                start_new_session=True,
                check=False,
                timeout=START_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise VdusefastError(f"the process that starts it did not end within {START_LIMIT_S:g} s") from None
        theirs.close()
        pid, fds, _flags, _address = socket.recv_fds(ours, PID_MAX_BYTES, 1)
    if not pid or not fds:
        raise VdusefastError(f"the process that starts it ended with status {done.returncode}")
    return ForeignProcess(int(pid), fds[0])


def start_and_end(arguments: Sequence[str]) -> int:
    """Be the process in between: start a command, send its pid and its pidfd, and end.

    arguments: a socket, then the command. Nobody has waited for the child yet, so the pidfd is of that process for
    sure.
    """
    with socket.socket(fileno=int(arguments[0])) as connection:
        own_fd = os.pidfd_open(os.getpid())
        pid = os.fork()
        if pid == 0:
            connection.close()
            _become(arguments[1:], own_fd)
        socket.send_fds(connection, [str(pid).encode()], [os.pidfd_open(pid)])
    return 0


def _become(command: Sequence[str], parent_fd: int) -> None:
    """Wait until the parent has ended, when systemd has adopted this process, and run the command in its place."""
    try:
        select.select([parent_fd], [], [])
        os.setsid()
        os.execv(command[0], list(command))  # noqa: S606 (a list of arguments of ours)
    except OSError as error:
        os.write(2, f"vdusefast: {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(EXIT_NOT_STARTED)
