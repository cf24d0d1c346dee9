"""Attach VDUSE devices to the kernel's vDPA bus, and detach them: the generic netlink family `vdpa`.

Both calls return when the kernel is done, which means that the bus driver has probed or let go of the device: its
control messages must be answered meanwhile, by another thread. Needs CAP_NET_ADMIN.

Source: Linux 7.3, include/uapi/linux/vdpa.h, genetlink.h and netlink.h.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess

from vdusefast.errors import KernelSupportError

MGMTDEV_NAME = "vduse"

_NETLINK_GENERIC = 16  # the socket module has no name for it before Python 3.12
_GENL_ID_CTRL = 0x10
_CTRL_CMD_GETFAMILY = 3
_CTRL_ATTR_FAMILY_ID = 1
_CTRL_ATTR_FAMILY_NAME = 2

_VDPA_GENL_VERSION = 1
_VDPA_CMD_DEV_NEW = 3
_VDPA_CMD_DEV_DEL = 4
_VDPA_ATTR_MGMTDEV_DEV_NAME = 2
_VDPA_ATTR_DEV_NAME = 4

_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_NLMSG_ERROR = 2
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10  # do not send our message back
_NETLINK_EXT_ACK = 11  # but say in words what was wrong with it

_NLMSGHDR = struct.Struct("=IHHII")  # len, type, flags, seq, pid
_GENLMSGHDR = struct.Struct("=BBH")  # cmd, version, reserved
_NLATTR = struct.Struct("=HH")  # len, type
_ERROR = struct.Struct("=i")  # -errno, then the header of the message that it is about
_ANSWER_MAX_BYTES = 16384
# What says that netlink cannot be used here, rather than that it refuses something.
_NO_NETLINK = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EPERM, errno.EACCES)


def device_new(name: str) -> None:
    """Attach the VDUSE device `name` to the bus. Blocks until a driver has probed it, if there is one.

    Raises OSError with the kernel's words (EPERM, EINVAL: no such device or a queue is not set up, EEXIST, ...),
    KernelSupportError when the kernel has no vDPA.
    """
    _run(_VDPA_CMD_DEV_NEW, [(_VDPA_ATTR_DEV_NAME, name), (_VDPA_ATTR_MGMTDEV_DEV_NAME, MGMTDEV_NAME)])


def device_delete(name: str) -> None:
    """Detach the device `name` from the bus. Blocks until its driver has let go of it.

    Raises OSError (ENODEV: it is not attached), KernelSupportError.
    """
    _run(_VDPA_CMD_DEV_DEL, [(_VDPA_ATTR_DEV_NAME, name)])


def family_id() -> int:
    """Return the number of the netlink family `vdpa`.

    Raises KernelSupportError when there is none, OSError when netlink is not allowed.
    """
    with _open() as sock:
        return _family_id(sock)


def _run(command: int, attributes: list[tuple[int, str]]) -> None:
    try:
        sock = _open()
    except OSError as error:
        tool = shutil.which("vdpa", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if error.errno not in _NO_NETLINK or tool is None:
            raise
        _run_tool(tool, command, dict(attributes)[_VDPA_ATTR_DEV_NAME])
        return
    with sock:
        family = _family_id(sock)
        _ask(sock, family, _GENLMSGHDR.pack(command, _VDPA_GENL_VERSION, 0) + b"".join(map(_attribute, attributes)))


def _run_tool(tool: str, command: int, name: str) -> None:
    """Do the same by iproute2's `vdpa`, where a sandbox keeps netlink from this process but not from that one."""
    words = ["add", "name", name, "mgmtdev", MGMTDEV_NAME] if command == _VDPA_CMD_DEV_NEW else ["del", name]
    done = subprocess.run([tool, "dev", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise OSError(errno.EIO, f"{tool} dev {' '.join(words)}: {'; '.join(lines)}")


def _open() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
    try:
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):
            sock.setsockopt(_SOL_NETLINK, option, 1)
        sock.bind((0, 0))
    except OSError:
        sock.close()
        raise
    return sock


def _family_id(sock: socket.socket) -> int:
    request = _GENLMSGHDR.pack(_CTRL_CMD_GETFAMILY, 1, 0) + _attribute((_CTRL_ATTR_FAMILY_NAME, "vdpa"))
    try:
        answer = _ask(sock, _GENL_ID_CTRL, request)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise KernelSupportError("the kernel has no vDPA bus: modprobe vduse") from None
        raise
    family = _attributes(answer[_GENLMSGHDR.size :]).get(_CTRL_ATTR_FAMILY_ID)
    if family is None or len(family) < 2:
        raise OSError(errno.EPROTO, "netlink: no number for the family vdpa")
    return int.from_bytes(family[:2], "little")


def _ask(sock: socket.socket, kind: int, body: bytes) -> bytes:
    """Send one message; return the body of its answer, empty when there is only the acknowledgement.

    Raises OSError with the kernel's errno, and its words where it has any.
    """
    sock.send(_NLMSGHDR.pack(_NLMSGHDR.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0) + body)
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
            return answer


def _raise_error(content: bytes, flags: int) -> None:
    (negative,) = _ERROR.unpack_from(content)
    if negative == 0:
        return
    words = os.strerror(-negative)
    if flags & _NLM_F_ACK_TLVS:
        extra = _attributes(content[_ERROR.size + _NLMSGHDR.size :]).get(_NLMSGERR_ATTR_MSG, b"")
        words = f"{words} ({extra.rstrip(bytes(1)).decode(errors='replace')})" if extra else words
    raise OSError(-negative, words)


def _attribute(attribute: tuple[int, str]) -> bytes:
    kind, text = attribute
    value = text.encode() + b"\0"
    size = _NLATTR.size + len(value)
    return (_NLATTR.pack(size, kind) + value).ljust(_aligned(size), b"\0")


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= _NLATTR.size:
        size, kind = _NLATTR.unpack_from(data)
        if not _NLATTR.size <= size <= len(data):
            break
        found[kind] = data[_NLATTR.size : size]
        data = data[_aligned(size) :]
    return found


def _aligned(size: int) -> int:
    return (size + 3) & ~3
