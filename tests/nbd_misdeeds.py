"""Things that a broken server may do with a request, except to answer falsely."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

from nbd_rig import READ, STRUCTURED_MAGIC, CloseError, Request, simple_reply


def garbage(connection: socket.socket, request: Request) -> None:
    connection.sendall(b"\xa5" * 64)


def wrong_cookie(connection: socket.socket, request: Request) -> None:
    connection.sendall(simple_reply(request, 0, cookie=request.cookie ^ 1 << 40) + bytes(request.length))


def slot_out_of_range(connection: socket.socket, request: Request) -> None:
    connection.sendall(simple_reply(request, 0, cookie=1 << 16 | 0xFFFF) + bytes(request.length))


def zero_cookie(connection: socket.socket, request: Request) -> None:
    connection.sendall(simple_reply(request, 0, cookie=0) + bytes(request.length))


def half_a_header(connection: socket.socket, request: Request) -> None:
    connection.sendall(simple_reply(request, 0)[:7])
    raise CloseError


def half_of_the_data(connection: socket.socket, request: Request) -> None:
    data = b"\x5a" * (request.length // 2 if request.kind == READ else 0)
    connection.sendall(simple_reply(request, 0) + data)
    raise CloseError


def structured(connection: socket.socket, request: Request) -> None:
    chunk = struct.pack(">IHHQI", STRUCTURED_MAGIC, 1, 1, request.cookie, 8 + request.length)
    connection.sendall(chunk + struct.pack(">Q", request.offset) + bytes(request.length))


def structured_of_no_known_type(connection: socket.socket, request: Request) -> None:
    connection.sendall(struct.pack(">IHHQI", STRUCTURED_MAGIC, 1, 0x7FFF, request.cookie, 0xFFFFFFFF))


def twice(connection: socket.socket, request: Request) -> None:
    answer = simple_reply(request, 5)
    connection.sendall(answer + answer)


def shutting_down(connection: socket.socket, request: Request) -> None:
    connection.sendall(simple_reply(request, 108))


def hang_up(connection: socket.socket, request: Request) -> None:
    raise CloseError


class StaleCookies:
    """A misdeed across two connections: requests get no answer on theirs, and one with data on a later one."""

    def __init__(self) -> None:
        self.answered_count = 0
        self._kept: list[tuple[socket.socket, Request]] = []

    def keep(self, connection: socket.socket, request: Request) -> None:
        """Leave a request without an answer, and remember it."""
        self._kept.append((connection, request))

    def answer(self, connection: socket.socket) -> bool:
        """Answer all that was kept on earlier connections. Returns whether there was anything."""
        stale = [kept for kept in self._kept if kept[0] is not connection]
        for before, request in stale:
            self._kept.remove((before, request))
            self.answered_count += 1
            # One byte less than was asked for: a client that believes it waits for ever, and says nothing.
            connection.sendall(simple_reply(request, 0) + b"E" * (request.length - 1))
        return bool(stale)


MISDEEDS: list[Callable[[socket.socket, Request], None]] = [
    garbage,
    wrong_cookie,
    slot_out_of_range,
    zero_cookie,
    half_a_header,
    half_of_the_data,
    structured,
    structured_of_no_known_type,
    shutting_down,
    hang_up,
]
