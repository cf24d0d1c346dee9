"""The configuration of a server that systemd starts and restarts: a file of root's, not properties of the unit.

Everybody may read properties, and an environment may hold secrets. The first start reports to its waiting caller
through a socket that the file names. A later start finds nobody there, and adopts the orphan.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import msgspec

from vdusefast.base.decoding import decode_json
from vdusefast.config import Config
from vdusefast.errors import VdusefastError

DIRECTORY = Path("/run/vdusefast-launch")


class Launch(msgspec.Struct):
    """How a server is started. waiting: the abstract address of the socket of the caller, who waits for it."""

    config: Config
    mode: str
    waiting: str
    working_directory: str
    environment: dict[str, str]


def path_of(name: str) -> Path:
    """Return where a device's file is."""
    return DIRECTORY / f"{name}.json"


def write(launch: Launch) -> None:
    """Write a device's file, whole or not at all. Raises VdusefastError."""
    path = path_of(launch.config.device.name)
    new = path.with_suffix(".new")
    try:
        DIRECTORY.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(launch))
        new.rename(path)
    except OSError as error:
        raise VdusefastError(f"{launch.config.device.name}: {new} cannot be written: {error.strerror}") from None


def read(name: str) -> Launch:
    """Return what a device's file says. Raises VdusefastError."""
    path = path_of(name)
    try:
        return decode_json(path.read_bytes(), Launch)
    except OSError as error:
        raise VdusefastError(f"{name}: {path} cannot be read: {error.strerror}: vdusefast recover {name}") from None
    except msgspec.DecodeError as error:
        raise VdusefastError(f"{name}: {path} was written by another version: {error}") from None


def remove(name: str) -> None:
    """Remove a device's file; nothing where there is none."""
    with contextlib.suppress(OSError):
        path_of(name).unlink()


def listen() -> tuple[socket.socket, str]:
    """Return a socket to wait at, and its abstract address."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("")  # the kernel chooses a name
    listener.listen(1)
    return listener, os.fsdecode(listener.getsockname()[1:])


def connect(address: str) -> socket.socket | None:
    """Return a connection to the caller that waits at an address, None when nobody does, or somebody else."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect("\0" + address)
        if peer_ids(connection)[1] == 0:
            return connection
    except OSError:
        pass  # a later start
    connection.close()
    return None


def peer_ids(connection: socket.socket) -> tuple[int, int]:
    """Return the process and user id at the other end."""
    import struct

    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _gid = struct.unpack("3i", packed)
    return pid, uid
