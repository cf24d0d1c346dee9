"""A process that has attached to a disk, as the attach server sees it, and the messages between the two."""

from __future__ import annotations

import os
import select
import socket
import struct
from dataclasses import dataclass, field

MESSAGE = struct.Struct("=IiIIQQ")  # struct vf_attach_message: op, error, arg, reserved, a, b
HELLO, EVENTS, NEW_USER, END_USER, ADD_REGION, REMOVE_REGION = range(1, 7)
CREDENTIALS = struct.Struct("iII")  # struct ucred


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
        if self.pidfd >= 0 and select.select([self.pidfd], [], [], 0)[0]:
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
