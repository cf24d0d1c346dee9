"""A minimal generic netlink client: one command to one family of the kernel at a time.

Source: Linux 7.3, include/uapi/linux/genetlink.h and netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

NESTED = 1 << 15  # in the type of an attribute that holds attributes

_NETLINK_GENERIC = 16  # the socket module has no name for it before Python 3.12
_GENL_ID_CTRL = 0x10
_CTRL_CMD_GETFAMILY = 3
_CTRL_ATTR_FAMILY_ID = 1
_CTRL_ATTR_FAMILY_NAME = 2

_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_NLMSG_ERROR = 2
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10  # do not send our message back
_NETLINK_EXT_ACK = 11  # but describe the error in a text

_NLMSGHDR = struct.Struct("=IHHII")  # len, type, flags, seq, pid
_GENLMSGHDR = struct.Struct("=BBH")  # cmd, version, reserved
_NLATTR = struct.Struct("=HH")  # len, type
_ERROR = struct.Struct("=i")  # -errno, then the header of the message that it is about
_ANSWER_MAX_BYTES = 16384


def open_socket() -> socket.socket:
    """Return a socket to ask with. Raises OSError where netlink is not allowed."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
    try:
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):
            sock.setsockopt(_SOL_NETLINK, option, 1)
        sock.bind((0, 0))
    except OSError:
        sock.close()
        raise
    return sock


def family_id(sock: socket.socket, name: str) -> int:
    """Return the number of the family `name`. Raises FileNotFoundError when the kernel has none, OSError."""
    answer = ask(sock, _GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, text(_CTRL_ATTR_FAMILY_NAME, name))
    number = answer.get(_CTRL_ATTR_FAMILY_ID, b"")
    if len(number) < 2:
        raise OSError(errno.EPROTO, f"netlink: no number for the family {name}")
    return int.from_bytes(number[:2], "little")


def ask(sock: socket.socket, family: int, command: int, attributes: bytes) -> dict[int, bytes]:
    """Send `command` (version 1) with packed attributes, and return those of the answer, {} when there is none.

    Raises OSError with the kernel's errno, and its words where it has any.
    """
    body = _GENLMSGHDR.pack(command, 1, 0) + attributes
    sock.send(_NLMSGHDR.pack(_NLMSGHDR.size + len(body), family, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0) + body)
    answer = b""
    while True:
        packet = sock.recv(_ANSWER_MAX_BYTES)
        while len(packet) >= _NLMSGHDR.size:
            size, message, flags, _seq, _pid = _NLMSGHDR.unpack_from(packet)
            if not _NLMSGHDR.size <= size <= len(packet):
                raise OSError(errno.EPROTO, "netlink: a message of an impossible size")
            content, packet = packet[_NLMSGHDR.size : size], packet[_aligned(size) :]
            if message != _NLMSG_ERROR:
                answer = content
                continue
            _raise_error(content, flags)
            return _unpack(answer[_GENLMSGHDR.size :])


def attribute(kind: int, value: bytes) -> bytes:
    """Return one packed attribute."""
    size = _NLATTR.size + len(value)
    return (_NLATTR.pack(size, kind) + value).ljust(_aligned(size), b"\0")


def text(kind: int, value: str) -> bytes:
    """Return a packed attribute that holds a string."""
    return attribute(kind, value.encode() + b"\0")


def _raise_error(content: bytes, flags: int) -> None:
    (negative,) = _ERROR.unpack_from(content)
    if negative == 0:
        return
    message = os.strerror(-negative)
    if flags & _NLM_F_ACK_TLVS:
        extra = _unpack(content[_ERROR.size + _NLMSGHDR.size :]).get(_NLMSGERR_ATTR_MSG, b"")
        message = f"{message} ({extra.rstrip(bytes(1)).decode(errors='replace')})" if extra else message
    raise OSError(-negative, message)


def _unpack(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= _NLATTR.size:
        size, kind = _NLATTR.unpack_from(data)
        if not _NLATTR.size <= size <= len(data):
            break
        found[kind & ~NESTED] = data[_NLATTR.size : size]
        data = data[_aligned(size) :]
    return found


def _aligned(size: int) -> int:
    return (size + 3) & ~3
