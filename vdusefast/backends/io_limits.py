"""The alignment that a store's I/O should have, as the kernel reports it for block devices and file systems.

Of a block device these are the limits of its queue. A file has the unit in which its file system allocates, and the
stripes that this was made for: `mkfs.xfs` and `mkfs.ext4` take them from the disks, and allocate by them.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

from vdusefast.backends.direct import queue_limit

# linux/fs.h
BLKIOMIN = 0x1278
BLKIOOPT = 0x1279
BLKALIGNOFF = 0x127A

# xfs_fs.h: struct xfs_fsop_geom_v1
_XFS_IOC_FSGEOMETRY_V1 = 0x80705864
_XFS_GEOMETRY = struct.Struct("=7I4x4Q16s2I")  # blocksize comes first, sunit and swidth (in blocks) last
_XFS_GEOMETRY_BYTES = 112

DISCARD_UNIT_MAX_BYTES = 2 << 20  # of a file: a network file system calls its request size a block


class IoLimits(NamedTuple):
    """Sizes in bytes; 0: unknown, or nothing to align to."""

    min_io_bytes: int = 0  # smaller requests cost more
    opt_io_bytes: int = 0  # as do sizes that are no multiple of this
    alignment_offset_bytes: int = 0  # where the first physical block begins
    discard_granularity_bytes: int = 0  # bytes that are freed at a time
    discard_offset_bytes: int = 0  # where the first such unit begins
    rotational: int = -1  # 1 or 0, -1: not known


def of_block_device(fd: int, sysfs: Path = Path("/sys")) -> IoLimits:
    """Return the limits of an open block device, which may be a partition. Raises OSError."""
    rdev = os.fstat(fd).st_rdev
    node = sysfs / f"dev/block/{os.major(rdev)}:{os.minor(rdev)}"
    granularity = queue_limit(rdev, "discard_granularity", sysfs)
    return IoLimits(
        min_io_bytes=_ioctl_int(fd, BLKIOMIN),
        opt_io_bytes=_ioctl_int(fd, BLKIOOPT),
        alignment_offset_bytes=max(0, _ioctl_int(fd, BLKALIGNOFF)),  # -1: its blocks lie across those of a disk below
        discard_granularity_bytes=granularity,
        discard_offset_bytes=discard_offset(node, granularity),
        rotational=_rotational(rdev, sysfs),
    )


def of_file(fd: int, sysfs: Path = Path("/sys"), mounts: Path = Path("/proc/self/mountinfo")) -> IoLimits:
    """Return the limits of an open regular file. Raises OSError."""
    status, file_system = os.fstat(fd), os.fstatvfs(fd)
    stripe_unit, stripe = _ask_xfs(fd) or _mounted_stripe(status.st_dev, file_system.f_bsize, mounts)
    unit = file_system.f_bsize
    return IoLimits(
        min_io_bytes=stripe_unit,
        opt_io_bytes=stripe,
        discard_granularity_bytes=unit if unit & (unit - 1) == 0 and unit <= DISCARD_UNIT_MAX_BYTES else 0,
        rotational=_rotational(status.st_dev, sysfs),
    )


def discard_offset(node: Path, granularity_bytes: int) -> int:
    """Return where the first discard unit of a block device begins, counted from the start of the device or partition.

    node: its directory in sysfs. A stacked device reports -1 if the units of its parts do not match: 0 then.
    """
    alignment = _read_number(node / "discard_alignment", 0)
    return alignment % granularity_bytes if granularity_bytes and alignment > 0 else 0


def _ioctl_int(fd: int, request: int) -> int:
    (value,) = struct.unpack("=i", fcntl.ioctl(fd, request, bytes(4)))
    return int(value)


def _read_number(path: Path, otherwise: int) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return otherwise


def _rotational(device: int, sysfs: Path) -> int:
    """Return whether the disk of a device number rotates, -1 where that is none of a disk."""
    node = (sysfs / f"dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return max(_read_number(directory / "queue/rotational", -1) for directory in (node, node.parent))


def _ask_xfs(fd: int) -> tuple[int, int] | None:
    """Return stripe unit and stripe of an XFS, None of any other file system."""
    try:
        geometry = fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, bytes(_XFS_GEOMETRY_BYTES))
    except OSError:
        return None
    block, *_, unit, stripe = _XFS_GEOMETRY.unpack_from(geometry)
    return block * unit, block * stripe


def _mounted_stripe(device: int, block: int, mounts: Path) -> tuple[int, int]:
    """Return the stripe that ext4 is mounted with; it does not report the stripe unit."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        if line.split(" ", 3)[2] == number and (found := re.search(r" - ext4 .*[ ,]stripe=(\d+)\b", line)):
            return 0, int(found[1]) * block
    return 0, 0
