"""A process that has attached to a disk, as the attach server sees it, and the messages between the two."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MESSAGE = struct.Struct("=IiIIQQ")  # struct vf_attach_message: op, error, arg, reserved, a, b
HELLO, EVENTS, NEW_USER, END_USER, ADD_REGION, REMOVE_REGION = range(1, 7)
CREDENTIALS = struct.Struct("iII")  # struct ucred
BACKLOG = 512
REGION_MAX_BYTES = 1 << 40
REGIONS_MAX = 1024  # of one process
FDS_MAX = 4  # that are taken with a message: one is due at most
FDS_SPARE = 64  # so many are free below the limit, before a process attaches


class ProtocolError(Exception):
    """A client sent something that is no message."""


@dataclass(eq=False)
class Client:
    """One process that has attached."""

    sock: socket.socket
    pid: int
    pidfd: int  # -1 where the kernel has none, or the process is in another namespace
    users: list[int] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)  # IOVAs
    deaf: bool = False  # it broke the protocol: nothing is read from it any more

    def has_ended(self) -> bool:
        """Return True when the process has ended, or given up its connection."""
        if self.pidfd >= 0:
            poll = select.poll()  # not select(), which takes no descriptor above 1023
            poll.register(self.pidfd, select.POLLIN)
            if poll.poll(0):
                return True
        try:
            return self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"" and not self.deaf
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the descriptors."""
        self.sock.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def refuses_region(self, size_bytes: int, offset_bytes: int, fd: int) -> int:
        """Return why a part of the memory `fd` cannot be a region: 0, or an errno. Raises OSError."""
        if not 0 < size_bytes <= REGION_MAX_BYTES or len(self.regions) >= REGIONS_MAX:
            return errno.ENOSPC
        return errno.EINVAL if offset_bytes + size_bytes > os.fstat(fd).st_size else 0

    def receive(self) -> tuple[bytes, list[int], bool]:
        """Return a message, b"" at the end, its descriptors, and whether descriptors are missing.

        Raises BlockingIOError when there is none.
        """
        try:
            packet, fds, flags, _peer = socket.recv_fds(self.sock, MESSAGE.size + 1, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise
        except OSError:
            return b"", [], False
        return packet, fds, bool(flags & socket.MSG_CTRUNC)


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Return the process at the other end, and its user of the machine."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    pid, uid, _gid = CREDENTIALS.unpack(raw)
    return pid, uid


def listen(path: Path) -> socket.socket:
    """Return a listening socket at `path`, for this user of the machine. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def accept(listener: socket.socket) -> socket.socket:
    """Return the next connection. Raises OSError."""
    sock, _address = listener.accept()
    sock.setblocking(False)
    return sock


def make_room(highest_fd: int) -> None:
    """Raise the limit of descriptors, if one as high as this is close to it, and the hard limit allows more.

    Only when it is needed: processes that were started before have the limit that they may count on.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or highest_fd + FDS_SPARE < soft:
        return
    wanted = 2 * soft if hard == resource.RLIM_INFINITY else min(2 * soft, hard)
    with suppress(OSError, ValueError):  # of a kernel with a lower limit of its own: then there is no more
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
