"""A block device whose requests can be made to wait for ever, and to go on: nbd, served from memory by this file.

The kernel's nbd driver and a socket pair are enough; no program and no network.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import guest

SET_SOCK, SET_BLKSIZE, DO_IT, CLEAR_SOCK, SET_SIZE_BLOCKS, DISCONNECT, SET_FLAGS = (
    0xAB00, 0xAB01, 0xAB03, 0xAB04, 0xAB07, 0xAB08, 0xAB0A,
)  # fmt: skip
_REQUEST = struct.Struct(">II8sQI")
_REPLY = struct.Struct(">II8s")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
READ, WRITE, DISC = 0, 1, 2
NAMES = ("nbd0", "nbd1", "nbd2", "nbd3")
_SO_SNDBUFFORCE = 32


def _serve(connection: socket.socket, size_bytes: int) -> None:
    memory = bytearray(size_bytes)
    stream = connection.makefile("rwb", buffering=1 << 16)
    while len(header := stream.read(_REQUEST.size)) == _REQUEST.size:
        magic, kind, handle, offset, length = _REQUEST.unpack(header)
        assert magic == _REQUEST_MAGIC
        if kind & 0xFFFF == DISC:
            return
        if kind & 0xFFFF == WRITE:
            memory[offset : offset + length] = stream.read(length)
        stream.write(_REPLY.pack(_REPLY_MAGIC, 0, handle))
        if kind & 0xFFFF == READ:
            stream.write(memory[offset : offset + length])
        stream.flush()


class HangingStore:
    """A device node. `hang` stops its server, `go_on` continues it."""

    def __init__(self, node: str, server_pid: int):
        self.node = node
        self._server_pid = server_pid

    def hang(self) -> None:
        """Let every request wait from now on."""
        os.kill(self._server_pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer what waits, and what comes."""
        os.kill(self._server_pid, signal.SIGCONT)


def _child(work: object, *arguments: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*arguments)  # type: ignore[operator]
    finally:
        os._exit(0)


def _open_unused(ours: socket.socket, size_bytes: int) -> tuple[int, str]:
    """Give `ours` to an nbd device that was never used; returns its descriptor and name.

    A used one fails its requests until its last close, which a process that was killed may not have come to yet.
    """
    name = next(name for name in NAMES if not (guest.WORK / f"used-{name}").exists())
    (guest.WORK / f"used-{name}").touch()
    fd = os.open(f"/dev/{name}", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, SET_BLKSIZE, 4096)
    fcntl.ioctl(fd, SET_SIZE_BLOCKS, size_bytes // 4096)
    fcntl.ioctl(fd, SET_SOCK, ours.fileno())
    return fd, name


@contextlib.contextmanager
def hanging_store(size_bytes: int) -> Iterator[HangingStore]:
    """Make the store; at the end it continues, and is removed."""
    if not Path("/dev", NAMES[0]).exists():
        guest.sh("modprobe", "nbd", f"nbds_max={len(NAMES)}", "max_part=0")
    ours, theirs = socket.socketpair()
    # Room for every request: nbd must never wait for it, since a killed process would spin there.
    ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * size_bytes)
    server = _child(lambda: (ours.close(), _serve(theirs, size_bytes)))
    theirs.close()
    fd, name = _open_unused(ours, size_bytes)
    try:
        holder = _child(lambda: fcntl.ioctl(fd, DO_IT))
        sysfs = Path("/sys/block", name)
        guest.wait_for("nbd's size", lambda: guest.read_int(sysfs / "size") == size_bytes // 512)
        guest.wait_for("nbd's process", (sysfs / "pid").exists)
        store = HangingStore(f"/dev/{name}", server)
        try:
            yield store
        finally:
            store.go_on()
            fcntl.ioctl(fd, DISCONNECT)
            for pid in (holder, server):
                os.waitpid(pid, 0)
            fcntl.ioctl(fd, CLEAR_SOCK)
    finally:
        os.close(fd)
        ours.close()
