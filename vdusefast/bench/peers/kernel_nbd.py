"""Connect the kernel's nbd driver to a server on a Unix socket, and take it off again.

The two steps of any nbd client: the handshake with the server here in user space, then the sockets go to the kernel
over the generic netlink family `nbd`.

Source: doc/proto.md of the NBD project; Linux 7.3, include/uapi/linux/nbd-netlink.h.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vdusefast.errors import KernelSupportError, TimedOutError, VdusefastError
from vdusefast.host import netlink

BLOCK_BYTES = 512
FLAG_CAN_MULTI_CONN = 1 << 8
HANDSHAKE_S = 30.0
RETRY_S = 0.05

_NBDMAGIC = b"NBDMAGIC"
_IHAVEOPT = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO = 7
_REP_ACK, _REP_INFO, _REP_ERROR = 1, 3, 1 << 31
_INFO_EXPORT = 0
_REPLY = struct.Struct(">QIII")  # magic, option, type, length
_REPLY_MAX_BYTES = 4096

_CMD_CONNECT, _CMD_DISCONNECT = 1, 2
_ATTR_INDEX, _ATTR_SIZE_BYTES, _ATTR_BLOCK_SIZE_BYTES, _ATTR_SERVER_FLAGS, _ATTR_SOCKETS = 1, 2, 3, 5, 7
_SOCK_ITEM, _SOCK_FD = 1, 1


@dataclass(frozen=True)
class Export:
    """The description of a server's default export."""

    size_bytes: int
    flags: int


def usable() -> bool:
    """Return whether the kernel has nbd with its netlink family."""
    try:
        with netlink.open_socket() as sock:
            _family(sock)
    except (OSError, KernelSupportError):
        return False
    return True


def connect(path: Path, connection_count: int) -> tuple[int, Export]:
    """Connect a free nbd device to the server at the Unix socket `path`; return its number and the export.

    connection_count: that many, if the server can serve several of one client. Raises VdusefastError, OSError.
    """
    sockets: list[socket.socket] = []
    try:
        sockets.append(dial(path))
        export = handshake(sockets[0])
        if export.flags & FLAG_CAN_MULTI_CONN:
            for _ in range(connection_count - 1):
                sockets.append(dial(path))
                handshake(sockets[-1])
        return _attach(export, [sock.fileno() for sock in sockets]), export
    finally:
        for sock in sockets:
            sock.close()  # the kernel holds its own references


def disconnect(index: int, timeout_s: float = 10.0) -> None:
    """Take /dev/nbd`index` off its server and wait until it is gone. Raises OSError, TimedOutError."""
    with netlink.open_socket() as sock:
        netlink.ask(sock, _family(sock), _CMD_DISCONNECT, _u32(_ATTR_INDEX, index))
    end = time.monotonic() + timeout_s
    while Path(f"/sys/block/nbd{index}/pid").exists():
        if time.monotonic() > end:
            raise TimedOutError(f"/dev/nbd{index}: still connected {timeout_s:g} s after it was told to disconnect")
        time.sleep(RETRY_S)


def handshake(sock: socket.socket) -> Export:
    """Negotiate the default export on a fresh connection. Raises VdusefastError for what is no nbd server."""
    greeting = receive(sock, 18)
    if greeting[:16] != _NBDMAGIC + _IHAVEOPT:
        raise VdusefastError("nbd: the server does not speak the newstyle protocol")
    sock.sendall(struct.pack(">I", (_FIXED_NEWSTYLE | _NO_ZEROES) & int.from_bytes(greeting[16:], "big")))
    data = struct.pack(">IH", 0, 0)  # no name, no further information wanted
    sock.sendall(_IHAVEOPT + struct.pack(">II", _OPT_GO, len(data)) + data)
    export: Export | None = None
    while True:
        magic, _option, kind, length = _REPLY.unpack(receive(sock, _REPLY.size))
        if magic != _REPLY_MAGIC or length > _REPLY_MAX_BYTES:
            raise VdusefastError("nbd: the server's answer makes no sense")
        body = receive(sock, length)
        if kind & _REP_ERROR:
            raise VdusefastError(f"nbd: the server refuses its export: {body.decode(errors='replace') or hex(kind)}")
        if kind == _REP_INFO and int.from_bytes(body[:2], "big") == _INFO_EXPORT:
            export = Export(*struct.unpack(">QH", body[2:12]))
        if kind == _REP_ACK:
            if export is None:
                raise VdusefastError("nbd: the server did not say how large its export is")
            return export


def dial(path: Path) -> socket.socket:
    """Connect to the server at the Unix socket `path`. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(HANDSHAKE_S)
    try:
        sock.connect(os.fspath(path))
    except OSError:
        sock.close()
        raise
    return sock


def receive(sock: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes. Raises VdusefastError when the server hangs up."""
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise VdusefastError("nbd: the server has hung up")
        data += more
    return data


def _attach(export: Export, fds: Sequence[int]) -> int:
    items = b"".join(netlink.attribute(_SOCK_ITEM | netlink.NESTED, _u32(_SOCK_FD, fd)) for fd in fds)
    body = _u64(_ATTR_SIZE_BYTES, export.size_bytes) + _u64(_ATTR_BLOCK_SIZE_BYTES, BLOCK_BYTES)
    body += _u64(_ATTR_SERVER_FLAGS, export.flags) + netlink.attribute(_ATTR_SOCKETS | netlink.NESTED, items)
    with netlink.open_socket() as sock:
        index = netlink.ask(sock, _family(sock), _CMD_CONNECT, body).get(_ATTR_INDEX)
    if index is None:
        raise VdusefastError("nbd: the kernel did not say which device it has connected")
    return int.from_bytes(index, "little")


def _family(sock: socket.socket) -> int:
    try:
        return netlink.family_id(sock, "nbd")
    except FileNotFoundError:
        raise KernelSupportError("the kernel has no nbd: modprobe nbd") from None


def _u32(kind: int, value: int) -> bytes:
    return netlink.attribute(kind, struct.pack("=I", value))


def _u64(kind: int, value: int) -> bytes:
    return netlink.attribute(kind, struct.pack("=Q", value))
