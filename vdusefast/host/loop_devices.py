"""Loop devices and their backing files, by the numbers of devices and inodes, never by a path.

The path in sysfs is the file's name in the mount namespace of the process that attached it. kubelet, for
example, attaches a device's node through a bind mount that has another name.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vdusefast.host import device_nodes, mounts, processes

# linux/loop.h
LOOP_GET_STATUS64 = 0x4C05
LO_FLAGS_READ_ONLY = 1
_INFO = struct.Struct("=QQQQQIIII")  # the head of struct loop_info64
_INFO_BYTES = 232


@dataclass(frozen=True)
class LoopDevice:
    """A loop device that is attached to something."""

    name: str
    file_device: int  # st_dev of the file or node behind it
    inode: int
    block_device: int  # st_rdev of the block device behind it, 0 for a file
    read_only: bool


def find(root: Path = Path("/"), near: str = "") -> Iterator[LoopDevice]:
    """Return all loop devices that are attached, but those over a file that is on another machine.

    The kernel asks the file system for their status, which may take for ever there. near: a path whose file system
    answers.
    """
    remote = tuple(point for point in mounts.remote_points(root / "proc/self") if not near.startswith(point))
    for entry in sorted((root / "sys/block").glob("loop*/loop/backing_file")):
        path, name = processes.read(entry).removesuffix("\n"), entry.parts[-3]
        if path and not path.startswith(remote):
            found = _ask(name, root) or _by_path(name, path)
            if found is not None:
                yield found


def _ask(name: str, root: Path) -> LoopDevice | None:
    """Return the driver's status of a loop device; None if it was detached meanwhile, or cannot be asked."""
    number = device_nodes.number_of(root / "sys/block" / name)
    if number is None:
        return None
    try:
        fd = device_nodes.open_block(f"/dev/{name}", number, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        info = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(_INFO_BYTES))
    except OSError:
        return None
    finally:
        os.close(fd)
    device, inode, block_device, _, _, _, _, _, flags = _INFO.unpack_from(info)
    return LoopDevice(name, device, inode, block_device, bool(flags & LO_FLAGS_READ_ONLY))


def _by_path(name: str, path: str) -> LoopDevice | None:
    """Return the file behind a path in this namespace, where the driver cannot be asked."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    is_block = stat.S_ISBLK(status.st_mode)
    return LoopDevice(name, status.st_dev, status.st_ino, status.st_rdev if is_block else 0, False)
