"""A keeper: a small process that keeps the connections of a device to its store when all other processes have ended.

A store's server may still process requests of a connection whose client has died. The next worker waits for the end of
that connection, so its socket must stay open somewhere. Workers leave sockets in *holds*, datagram sockets that are
connected to themselves. The supervisor has these open, and so has its keeper, which outlives it. The next supervisor
gets them from the keeper.

Without a supervisor, a keeper shuts down each connection and waits until the server has closed it. It notes that for
the next worker (csrc/nbd/nbd_fence.c), and ends. Started by keeper_control.py, with the listening socket and the file
of notes. Only the standard library is imported.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from contextlib import suppress

NOTES_BYTES = 512  # as backends.plugin has it
NOTE_ENDED, NOTE_OPEN, NOTE_DOUBT = 1, 2, 3  # enum vf_nbd_note

# Commands of a supervisor; holds come with the first and go with the second. A keeper outlives the files that it was
# started from, so the meaning of a command never changes.
KEEP, TAKE, END = b"keep", b"take", b"end"
HOLDS_MAX = 250  # descriptors of one message
GRACE_S = 0.5  # until the workers of a dead supervisor have died, too
READ_BYTES = 1 << 16


def receive_fds(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Return a message and the descriptors in it, now owned. Raises OSError.

    `socket.recv_fds` ignores its flags.
    """
    fds = array.array("i")
    room_bytes = socket.CMSG_SPACE(HOLDS_MAX * fds.itemsize)
    message, parts, _, _ = sock.recvmsg(32, room_bytes, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in parts:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds)


class Keeper:
    """The holds, and the work on them."""

    def __init__(self, listener: socket.socket, notes_fd: int) -> None:
        """Begin with no holds. Consumes the socket and the descriptor."""
        self._listener = listener
        self._notes_fd = notes_fd
        self._holds: list[socket.socket] = []
        self._line: socket.socket | None = None  # to the supervisor
        self._alone_since_s = time.monotonic()
        self._ending: dict[int, tuple[int, socket.socket]] = {}  # by descriptor: the index of the hold, the connection

    def run(self) -> None:
        """Run until no connection is left, or a supervisor ends it."""
        while True:
            if self._line is None and time.monotonic() - self._alone_since_s >= GRACE_S:
                self._end_connections()
                if not self._ending:
                    return
            poll = select.poll()
            for fd in (self._listener.fileno(), *([self._line.fileno()] if self._line else []), *self._ending):
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(GRACE_S * 1000 if self._line is None and not self._ending else None):
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._ending:
                    self._look(fd)
                elif self._line is not None and fd == self._line.fileno() and self._hear(self._line) == END:
                    return

    def _accept(self) -> None:
        """Serve a new supervisor; the previous one has ended or is about to end."""
        line, _ = self._listener.accept()
        self._leave_line()
        self._line = line

    def _hear(self, line: socket.socket) -> bytes:
        try:
            message, fds = receive_fds(line)
            holds = [socket.socket(fileno=fd) for fd in fds]
            if message == KEEP:
                self._drop_holds()
                self._holds = holds
                socket.send_fds(line, [str(os.getpid()).encode()], [])
            elif message == TAKE:
                self._forget_ending()
                socket.send_fds(line, [str(os.getpid()).encode()], [hold.fileno() for hold in self._holds])
        except OSError:
            message = b""
        if not message:
            self._leave_line()
        return message

    def _leave_line(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
        self._alone_since_s = time.monotonic()

    def _drop_holds(self) -> None:
        self._forget_ending()
        for hold in self._holds:
            hold.close()

    def _forget_ending(self) -> None:
        """Leave the connections to the next owner of the holds."""
        for _, connection in self._ending.values():
            connection.close()
        self._ending.clear()

    def _end_connections(self) -> None:
        """Shut down our half of every connection in the holds, so that its server finishes."""
        for index, hold in enumerate(self._holds):
            if any(index == known for known, _ in self._ending.values()):
                continue
            with suppress(BlockingIOError):
                _, fds = receive_fds(hold, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                for fd in fds:
                    connection = socket.socket(fileno=fd)
                    connection.setblocking(False)
                    with suppress(OSError):  # it has ended already
                        connection.shutdown(socket.SHUT_WR)
                    self._ending[connection.fileno()] = index, connection

    def _look(self, fd: int) -> None:
        """Drop what a server sends, as nobody waits for it, and check whether it has closed its end."""
        index, connection = self._ending[fd]
        try:
            if connection.recv(READ_BYTES):
                return
            note = NOTE_ENDED
        except BlockingIOError:
            return
        except (ConnectionResetError, BrokenPipeError):
            note = NOTE_ENDED
        except OSError:  # the kernel has ended the connection: the server's state is unknown
            note = NOTE_DOUBT
        before = os.pread(self._notes_fd, 1, index * NOTES_BYTES)
        if before != bytes([NOTE_DOUBT]):
            os.pwrite(self._notes_fd, bytes([note]), index * NOTES_BYTES)
        with suppress(BlockingIOError):
            _, fds = receive_fds(self._holds[index], socket.MSG_DONTWAIT)
            for held in fds:
                os.close(held)
        del self._ending[fd]
        connection.close()


def main(argv: list[str]) -> None:
    """Run a keeper, as a process without a parent of ours."""
    if os.fork():
        return
    os.setsid()
    listen_fd, notes_fd = map(int, argv)
    Keeper(socket.socket(fileno=listen_fd), notes_fd).run()
