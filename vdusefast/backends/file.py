"""`file:PATH[?format=raw]`: a regular file or a block device, locked against servers, QEMU and other writers.

A block device that is written to is opened with O_EXCL, as mount, swapon, LVM and MD do. flock(2) is
never used on one: udev takes that lock itself, and would finish no event of the device while we have it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shlex
import stat
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vdusefast.backends import Store, content, file_locks, identity, io_limits
from vdusefast.backends.direct import find_align, queue_limit
from vdusefast.backends.image_format import RAW, split_path
from vdusefast.base.kinds import StoreKind
from vdusefast.errors import BackendError, DeviceBusyError
from vdusefast.units import BLOCK_SIZE_MAX_BYTES, SECTOR_BYTES

if TYPE_CHECKING:
    from vdusefast.config import BackendConfig

# linux/fs.h
BLKROGET = 0x125E
BLKSSZGET = 0x1268
BLKPBSZGET = 0x127B

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

PHYSICAL_BLOCK_MAX_BYTES = 4096  # of a file: st_blksize is a hint, some file systems say a megabyte
FULL = (errno.ENOSPC, errno.EDQUOT)
BUSY_TRIES = 25
BUSY_PAUSE_S = 0.02


def open_store(rest: str, backend: BackendConfig, read_only: bool, claim: bool = True) -> Store:
    """Open the file or block device that `rest` names (see image_format.split_path), and lock it with `claim`.

    Raises BackendError when it cannot be used, DeviceBusyError when it is mounted or another device's store.
    """
    uri = backend.uri
    path, said_raw = split_path(rest)
    is_block = _check_type(path, uri)
    exclusive = claim and is_block and not read_only
    fd = _open(path, uri, read_only=read_only, exclusive=exclusive, direct=backend.is_direct)
    try:
        if claim:
            file_locks.claim(fd, uri, read_only=read_only, is_block=is_block)
        store = (_describe_block if is_block else _describe_file)(fd, backend, read_only)
        store.path, store.said_raw = path, said_raw
        return store
    except OSError as error:
        os.close(fd)
        raise BackendError(f"{uri}: {error.strerror}") from None
    except BaseException:
        os.close(fd)
        raise


def absolute_uri(uri: str) -> str:
    """See backends.absolute_uri."""
    scheme, _, rest = uri.partition(":")
    path, said_raw = split_path(rest)
    return f"{scheme}:{Path(path).absolute()}{RAW if said_raw else ''}" if path else uri


def _check_type(path: str, uri: str) -> bool:
    """Return whether `path` is a block device. Checked before it is opened, because opening some nodes has effects."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise BackendError(f"{uri}: no such file; make it, for example by truncate -s 1G {shlex.quote(path)}") from None
    except (OSError, ValueError) as error:
        raise BackendError(f"{uri}: {getattr(error, 'strerror', None) or error}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BackendError(f"{uri}: neither a regular file nor a block device")
    return stat.S_ISBLK(mode)


def _open(path: str, uri: str, *, read_only: bool, exclusive: bool, direct: bool) -> int:
    """Return a descriptor. exclusive: O_EXCL on a block device makes the kernel refuse it if mounted or claimed.

    Another program may claim it for a moment only, and the claim of an ended one lasts as long as its last I/O: hence
    more than one try.
    """
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    flags |= os.O_DIRECT if direct else 0
    flags |= os.O_EXCL if exclusive else 0
    for left in reversed(range(BUSY_TRIES)):
        try:
            return os.open(path, flags)
        except OSError as error:
            if error.errno == errno.EBUSY and left:
                time.sleep(BUSY_PAUSE_S)
                continue
            if error.errno == errno.EBUSY:
                raise DeviceBusyError(f"{uri}: in use: {_users_text(path)}; end that first") from None
            if error.errno == errno.EINVAL and direct:
                raise BackendError(
                    f"{uri}: its file system has no O_DIRECT; use another cache mode than none"
                ) from None
            hint = "; or set read_only" if error.errno in (errno.EACCES, errno.EROFS) and not read_only else ""
            raise BackendError(f"{uri}: cannot be opened: {error.strerror}{hint}") from None
    raise AssertionError("not reached")


def _users_text(path: str) -> str:
    """Return who uses a block device, for people."""
    from vdusefast.host import node_users

    users = node_users.find_users_of_number(os.stat(path).st_rdev)
    return node_users.describe(users) or "mounted, or part of another device, where it cannot be seen from here"


def find_loops(store: Store) -> list[str]:
    """Return the loop devices through which other programs may write to an open store, or read it.

    The loop driver takes no lock that would keep us out, and none keeps it out.
    """
    from vdusefast.host import loop_devices, node_users

    if store.fd < 0 or not store.is_on_disk:
        return []
    status = os.fstat(store.fd)
    numbers = node_users.related_numbers(status.st_rdev) if store.is_block_device else ()
    return [
        loop.name
        for loop in loop_devices.find(near=store.path)
        if not (store.read_only and loop.read_only)
        and (
            loop.block_device in numbers
            if store.is_block_device
            else (loop.file_device, loop.inode) == (status.st_dev, status.st_ino)
        )
    ]


def _describe_file(fd: int, backend: BackendConfig, read_only: bool) -> Store:
    status = os.fstat(fd)
    direct_align = find_align(fd, backend.uri) if backend.is_direct else 0
    granule = max(SECTOR_BYTES, direct_align)
    block = min(granule, BLOCK_SIZE_MAX_BYTES)
    limits = io_limits.of_file(fd)
    preferred = status.st_blksize if status.st_blksize & (status.st_blksize - 1) == 0 else block
    return Store(
        uri=backend.uri,
        kind=StoreKind.FILE,
        fd=fd,
        size_bytes=status.st_size,
        block_size_bytes=block,
        physical_block_size_bytes=max(granule, min(preferred, PHYSICAL_BLOCK_MAX_BYTES)),
        opt_io_size_bytes=limits.opt_io_bytes or (preferred if preferred > PHYSICAL_BLOCK_MAX_BYTES else 0),
        min_io_size_bytes=limits.min_io_bytes,
        discard_granularity_bytes=limits.discard_granularity_bytes,
        rotational=limits.rotational,
        read_only=read_only,
        can_discard=not read_only and _probe_fallocate(fd, status.st_size, FALLOC_FL_PUNCH_HOLE),
        can_write_zeroes=not read_only,
        zeroes_cheaply=not read_only and _probe_fallocate(fd, status.st_size, FALLOC_FL_ZERO_RANGE),
        direct_align=direct_align,
        cache=backend.cache,
        granule_bytes=granule,
        content_block_bytes=_content_block(fd, status.st_size, granule, SECTOR_BYTES),
        identity=identity.of_file(fd),
    )


def _describe_block(fd: int, backend: BackendConfig, read_only: bool) -> Store:
    if not read_only and _ioctl_int(fd, BLKROGET):
        raise BackendError(f"{backend.uri}: the block device is read-only; set read_only")
    logical, size_bytes = _ioctl_int(fd, BLKSSZGET), os.lseek(fd, 0, os.SEEK_END)
    limits = io_limits.of_block_device(fd)
    direct_align = find_align(fd, backend.uri, logical) if backend.is_direct else 0
    granule = max(logical, direct_align)
    block = min(granule, BLOCK_SIZE_MAX_BYTES)
    return Store(
        uri=backend.uri,
        kind=StoreKind.BLOCKDEV,
        fd=fd,
        size_bytes=size_bytes,
        block_size_bytes=block,
        physical_block_size_bytes=max(granule, _ioctl_int(fd, BLKPBSZGET)),
        opt_io_size_bytes=limits.opt_io_bytes,
        min_io_size_bytes=limits.min_io_bytes,
        alignment_offset_bytes=limits.alignment_offset_bytes,
        discard_granularity_bytes=limits.discard_granularity_bytes,
        discard_offset_bytes=limits.discard_offset_bytes,
        rotational=limits.rotational,
        read_only=read_only,
        can_discard=not read_only and queue_limit(os.fstat(fd).st_rdev, "discard_max_bytes") > 0,
        can_write_zeroes=not read_only,
        zeroes_cheaply=not read_only and queue_limit(os.fstat(fd).st_rdev, "write_zeroes_max_bytes") > 0,
        direct_align=direct_align,
        cache=backend.cache,
        granule_bytes=granule,
        content_block_bytes=_content_block(fd, size_bytes, granule, 0),
        identity=identity.of_block_device(fd),
    )


def _content_block(fd: int, size_bytes: int, granule: int, unknown_bytes: int) -> int:
    """Return the block size that the contents need if the store's is larger than a sector, as content.made_for().

    A disk was written in its own blocks. A file may come from anywhere, and is readable in small ones in any case.
    """
    return content.made_for(fd, size_bytes, unknown_bytes=unknown_bytes) if granule > SECTOR_BYTES else 0


def _ioctl_int(fd: int, request: int) -> int:
    """Return the unsigned int that an ioctl of a block device reports."""
    (value,) = struct.unpack("=I", fcntl.ioctl(fd, request, bytes(4)))
    return int(value)


def _probe_fallocate(fd: int, size_bytes: int, mode: int) -> bool:
    """Return whether the file system supports fallocate `mode`, by a trial after the end of the file.

    A full file system supports it, too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    offset = -(-size_bytes // 4096) * 4096
    done = libc.fallocate64(fd, mode | FALLOC_FL_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(4096)) == 0
    error = 0 if done else ctypes.get_errno()
    if done and mode == FALLOC_FL_ZERO_RANGE:  # the trial has allocated blocks: free them
        hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        libc.fallocate64(fd, hole, ctypes.c_int64(offset), ctypes.c_int64(4096))
    return bool(done) or error in FULL
