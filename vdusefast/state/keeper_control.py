"""The supervisor's side of a keeper (keeper.py): the holds of a device, shared with a process that outlives us.

A hold is a datagram socket that is connected to itself: a descriptor that a worker sends there stays open, also when
the worker dies, until somebody reads it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from vdusefast.base import spawn
from vdusefast.base.guard import Guard, Part
from vdusefast.state.keeper import END, KEEP, NOTE_ENDED, NOTES_BYTES, TAKE, receive_fds

NAME = "keeper"  # of its socket, in the run directory
ANSWER_S = 2.0
PAUSE_S = 1.0  # before the next keeper, if one dies

_log = logging.getLogger("vdusefast")


class KeeperControl:
    """The holds of one device, and its keeper."""

    def __init__(self, device: str, directory: Path, count: int, notes_fd: int, guard: Guard, *, adopt: bool) -> None:
        """Make `count` holds and a keeper, or with `adopt` get those of the last supervisor.

        directory: the run directory, locked by us. notes_fd: borrowed, the file of notes of the store's module. guard:
        starts our callbacks in the event loop. Raises OSError.
        """
        self._device = device
        self._directory = directory
        self._notes_fd = notes_fd
        self._guard = guard
        self._line: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self._holds: list[socket.socket] = []
        try:
            if adopt and self._take(count):
                return
            if not adopt:
                for index in range(count):  # no worker has been before
                    os.pwrite(notes_fd, bytes([NOTE_ENDED]), index * NOTES_BYTES)
            self._holds = [_socket_to_itself() for _ in range(count)]
            self._spawn()
        except BaseException:
            self.close(keep=adopt)
            raise

    def hold_fd(self, index: int) -> int:
        """Return the descriptor of a hold, borrowed."""
        return self._holds[index].fileno()

    def watch(self) -> None:
        """Watch the keeper, and replace it when it dies; in the supervisor's event loop."""
        self._loop = asyncio.get_running_loop()
        self._listen()

    def close(self, *, keep: bool) -> None:
        """Close the holds. keep: leave the keeper to the next supervisor; else end it. A second call does nothing.

        The event loop runs no more, or does not matter.
        """
        if self._line is not None:
            if not keep:
                end(self._directory, self._line)
            self._line.close()
            self._line = None
        self._reap()
        for hold in self._holds:
            hold.close()
        self._holds = []

    def unwatch(self) -> None:
        """Remove our readers from the event loop; called in it."""
        if self._loop is not None and self._line is not None:
            self._loop.remove_reader(self._line)
        self._loop = None

    # -- inside

    def _take(self, count: int) -> bool:
        """Get the holds of a living keeper. Returns whether there is one."""
        try:
            line = _connect(self._directory)
        except OSError:
            return False  # it has ended: the notes say whether its work was done
        try:
            line.send(TAKE)
            pid, fds = receive_fds(line)
            self._holds = [socket.socket(fileno=fd) for fd in fds]
            if len(self._holds) != count:
                raise ConnectionError("not the holds of this device")
            self.pid = int(pid)
        except (OSError, ValueError) as error:
            _log.warning("device %s: its keeper does not hand its connections over: %s", self._device, error)
            for hold in self._holds:
                hold.close()
            self._holds = []
            line.close()
            return False
        self._line = line
        return True

    def _spawn(self) -> None:
        """Start a keeper for the current holds."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener:
            (self._directory / NAME).unlink(missing_ok=True)
            with _Named(self._directory) as name:
                listener.bind(name)
            listener.listen(4)
            self._process = subprocess.Popen(
                [*spawn.command("state.keeper", options=("-S",)), str(listener.fileno()), str(self._notes_fd)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(listener.fileno(), self._notes_fd),
                cwd="/",
                start_new_session=True,
            )
            self._line = _connect(self._directory)
        socket.send_fds(self._line, [KEEP], [hold.fileno() for hold in self._holds])

    def _reap(self) -> None:
        """Reap the process that has started the keeper, which has no parent of ours from then on."""
        if self._process is not None:
            try:
                self._process.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _listen(self) -> None:
        if self._loop is not None and self._line is not None:
            self._guard.reader(self._line.fileno(), Part.KEEPER, self._hear, self._replace)

    def _hear(self) -> None:
        """Read the keeper's answer, which is its pid, or notice its end."""
        assert self._line is not None
        try:
            message = self._line.recv(32)
        except OSError:
            message = b""
        if message:
            self.pid = int(message)
            self._reap()
            return
        _log.warning(
            "device %s: the keeper of its connections (pid %d) has ended; another one follows", self._device, self.pid
        )
        self._replace()

    def _replace(self) -> None:
        """Start another keeper soon. The old one, if it still lives, leaves the connections alone."""
        line, self._line = self._line, None
        if line is not None and self._loop is not None:
            self._loop.remove_reader(line)
            with suppress(OSError):
                line.send(END, socket.MSG_DONTWAIT)
            self._loop.call_later(PAUSE_S, line.close)  # closed with an answer unread, it would lose what was sent
        self._reap()
        self._later()

    def _later(self) -> None:
        if self._loop is not None:
            self._loop.call_later(PAUSE_S, self._guard.call, Part.KEEPER, self._again, self._later)

    def _again(self) -> None:
        if self._loop is None:
            return
        try:
            self._spawn()
        except OSError as error:
            _log.warning("device %s: no keeper of its connections can be started: %s", self._device, error)
            self._later()
            return
        self._listen()


def end(directory: Path, line: socket.socket | None = None) -> None:
    """End the keeper of a run directory, if there is one, and wait for its end."""
    try:
        with line or _connect(directory) as to:
            to.settimeout(ANSWER_S)
            to.send(END)
            while to.recv(32):
                pass
    except OSError:
        pass  # it has ended already
    (directory / NAME).unlink(missing_ok=True)


class _Named:
    """The name of the socket in a directory whose own path may be too long for a socket's. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> str:
        return f"/proc/self/fd/{self._fd}/{NAME}"

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _connect(directory: Path) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        line.settimeout(ANSWER_S)
        with _Named(directory) as name:
            line.connect(name)
    except BaseException:
        line.close()
        raise
    return line


def _socket_to_itself() -> socket.socket:
    hold = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        hold.bind("")  # a name of the kernel's choice
        hold.connect(hold.getsockname())
    except OSError:
        hold.close()
        raise
    return hold
