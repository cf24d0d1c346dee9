"""A keeper: a small process that holds the connections of a device to its store while nobody else does.

A server may still work on what it got by a connection whose client has died. The next worker waits for the end of that
connection, for which its socket has to be open somewhere. Workers leave sockets in *holds*, datagram sockets that are
connected to themselves; the supervisor has these open, and so has its keeper, which outlives it. The next supervisor
takes them from here.

With its supervisor gone, a keeper ends each connection and waits until the server has closed it, which it notes for the
worker that comes (csrc/nbd/nbd_fence.c). Then it ends. Started by keeper_control.py, with the listening socket and the
file of notes. Only the standard library is imported.
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

# What a supervisor asks for; holds come with the first and go with the second. A keeper outlives the files that it was
# started from: what one of these words means never changes.
KEEP, TAKE, END = b"keep", b"take", b"end"
HOLDS_MAX = 250  # descriptors of one message
GRACE_S = 0.5  # for the workers of a supervisor that has died to die, too
READ_BYTES = 1 << 16


def receive_fds(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Return a message and the descriptors in it, now owned. Raises OSError.

    `socket.recv_fds` ignores its flags.
    """
    fds = array.array("i")
    word, parts, _, _ = sock.recvmsg(32, socket.CMSG_SPACE(HOLDS_MAX * fds.itemsize), flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in parts:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return word, list(fds)


class Keeper:
    """The holds, and what is to be done about them."""

    def __init__(self, listener: socket.socket, notes_fd: int) -> None:
        """Begin with no holds. Consumes the socket and the descriptor."""
        self._listener = listener
        self._notes_fd = notes_fd
        self._holds: list[socket.socket] = []
        self._line: socket.socket | None = None  # to the supervisor
        self._alone_since_s = time.monotonic()
        self._ending: dict[int, tuple[int, socket.socket]] = {}  # by descriptor: the index of the hold, the connection

    def run(self) -> None:
        """Keep until there is nothing to keep, or a supervisor ends it."""
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
        """Have a supervisor; the previous one is gone or about to go."""
        line, _ = self._listener.accept()
        self._leave_line()
        self._line = line

    def _hear(self, line: socket.socket) -> bytes:
        try:
            word, fds = receive_fds(line)
            holds = [socket.socket(fileno=fd) for fd in fds]
            if word == KEEP:
                self._drop_holds()
                self._holds = holds
                socket.send_fds(line, [str(os.getpid()).encode()], [])
            elif word == TAKE:
                self._forget_ending()
                socket.send_fds(line, [str(os.getpid()).encode()], [hold.fileno() for hold in self._holds])
        except OSError:
            word = b""
        if not word:
            self._leave_line()
        return word

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
        """Shut our half of every connection that is held, so that its server comes to its end."""
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
        """Take what a server sends, which nobody waits for any more, and see whether it has closed its end."""
        index, connection = self._ending[fd]
        try:
            if connection.recv(READ_BYTES):
                return
            note = NOTE_ENDED
        except BlockingIOError:
            return
        except (ConnectionResetError, BrokenPipeError):
            note = NOTE_ENDED
        except OSError:  # the kernel has given it up: what the server does is not known
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
    """Keep, as a process that belongs to nobody."""
    if os.fork():
        return
    os.setsid()
    listen_fd, notes_fd = map(int, argv)
    Keeper(socket.socket(fileno=listen_fd), notes_fd).run()
