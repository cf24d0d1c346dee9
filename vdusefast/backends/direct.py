"""Find the alignment that O_DIRECT needs: the kernel's answer, else the largest that any layer above the disk can need.

A trial read alone is no answer: a hole, or a range that is allocated but not yet written, is read without the disk, by
any alignment. The same file would be refused once it has data there.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path

from vdusefast.backends.statx import statx
from vdusefast.errors import BackendError
from vdusefast.units import SECTOR_BYTES

ALIGN_MAX_BYTES = 65536
CAUTIOUS_ALIGN_BYTES = 4096  # if the kernel does not say
XFS_IOC_DIOINFO = 0x800C581E  # xfs_fs.h
_DIOATTR = struct.Struct("=III")  # struct dioattr: d_mem, d_miniosz, d_maxiosz


def find_align(fd: int, uri: str, logical_bytes: int = 0, sysfs: Path = Path("/sys")) -> int:
    """Return the alignment that O_DIRECT needs of offset, length and memory, a power of two.

    fd: of a file or a block device, opened with O_DIRECT. logical_bytes: the logical block size of a block device, 0
    for a file. Raises BackendError where it is larger than can be served, OSError.
    """
    told = statx(fd).dio_align or logical_bytes or _ask_xfs(fd) or _device_align(fd, sysfs) or _align_of_data(fd)
    align = max(SECTOR_BYTES, logical_bytes, told)
    while align <= ALIGN_MAX_BYTES:
        if align & (align - 1) == 0 and _reads(fd, align, align):
            return align
        align = 1 << align.bit_length()
    raise BackendError(f"{uri}: O_DIRECT needs more than {ALIGN_MAX_BYTES} bytes of alignment; use another cache")


def queue_limit(rdev: int, name: str, sysfs: Path = Path("/sys")) -> int:
    """Return a limit of the block device's queue. A partition has no queue of its own; its disk is the parent."""
    node = (sysfs / f"dev/block/{os.major(rdev)}:{os.minor(rdev)}").resolve()
    for directory in (node, node.parent):
        limit = directory / "queue" / name
        if limit.exists():
            return int(limit.read_text())
    return 0


def _ask_xfs(fd: int) -> int:
    """Return XFS's own answer (much older than statx's), 0 for any other file system."""
    try:
        memory_align, smallest, _ = _DIOATTR.unpack(fcntl.ioctl(fd, XFS_IOC_DIOINFO, bytes(_DIOATTR.size)))
    except OSError:
        return 0
    return int(max(memory_align, smallest))


def _device_align(fd: int, sysfs: Path) -> int:
    """Return the sector size of the block device beneath the file system, 0 when that is on none, or on several."""
    return queue_limit(os.fstat(fd).st_dev, "logical_block_size", sysfs)


def _align_of_data(fd: int) -> int:
    """Return the smallest alignment by which data of the file can be read, a cautious one while it has none."""
    try:
        start = os.lseek(fd, 0, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing but a hole
        return CAUTIOUS_ALIGN_BYTES
    finally:
        os.lseek(fd, 0, os.SEEK_SET)
    at = -(-start // CAUTIOUS_ALIGN_BYTES) * CAUTIOUS_ALIGN_BYTES + SECTOR_BYTES
    try:
        within = os.lseek(fd, at, os.SEEK_DATA) == at and os.lseek(fd, at, os.SEEK_HOLE) >= at + SECTOR_BYTES
    except OSError:
        within = False
    finally:
        os.lseek(fd, 0, os.SEEK_SET)
    return SECTOR_BYTES if within and _reads(fd, SECTOR_BYTES, at) else CAUTIOUS_ALIGN_BYTES


def _reads(fd: int, align: int, at: int) -> bool:
    """Return whether the file can be read at `at` by no more than that alignment. Raises OSError."""
    with mmap.mmap(-1, 2 * align) as memory, memoryview(memory) as view, view[align : 2 * align] as buffer:
        try:
            os.preadv(fd, [buffer], at)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
    return True
