"""`file:PATH`: a regular file or a block device, locked against a second server."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from pathlib import Path

from vdusefast.backends import SECTOR_BYTES, Store
from vdusefast.config import BackendConfig
from vdusefast.errors import BackendError, DeviceBusyError

# linux/fs.h
BLKROGET = 0x125E
BLKSSZGET = 0x1268
BLKIOOPT = 0x1279
BLKPBSZGET = 0x127B

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

DIRECT_ALIGN_MAX_BYTES = 4096
PHYSICAL_BLOCK_MAX_BYTES = 4096  # of a file: st_blksize is a hint, some file systems say a megabyte
BUSY_TRIES = 10
BUSY_PAUSE_S = 0.05


def open_store(rest: str, backend: BackendConfig, read_only: bool) -> Store:
    """Open and lock the file or block device at the path `rest`.

    Raises BackendError when it cannot be used, DeviceBusyError when it is mounted or another device's store.
    """
    uri = backend.uri
    is_block = _check_type(rest, uri)
    fd = _open(rest, uri, read_only=read_only, is_block=is_block, direct=backend.cache == "none")
    try:
        _lock(fd, uri, shared=read_only, tries=BUSY_TRIES if is_block else 1)
        if is_block:
            return _describe_block(fd, backend, read_only)
        return _describe_file(fd, backend, read_only)
    except OSError as error:
        os.close(fd)
        raise BackendError(f"{uri}: {error.strerror}") from None
    except BaseException:
        os.close(fd)
        raise


def absolute_uri(uri: str) -> str:
    """See backends.absolute_uri."""
    scheme, _, path = uri.partition(":")
    return f"{scheme}:{Path(path).absolute()}" if path else uri


def _check_type(path: str, uri: str) -> bool:
    """Return whether `path` is a block device. Looked at before it is opened: opening some nodes does something."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise BackendError(f"{uri}: no such file; make it, for example by truncate -s 1G {path}") from None
    except (OSError, ValueError) as error:
        raise BackendError(f"{uri}: {getattr(error, 'strerror', None) or error}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BackendError(f"{uri}: neither a regular file nor a block device")
    return stat.S_ISBLK(mode)


def _open(path: str, uri: str, *, read_only: bool, is_block: bool, direct: bool) -> int:
    """Return a descriptor. O_EXCL on a block device makes the kernel refuse one that is mounted or claimed."""
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    flags |= os.O_DIRECT if direct else 0
    flags |= os.O_EXCL if is_block and not read_only else 0
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DeviceBusyError(f"{uri}: in use (mounted, or part of another device)") from None
        if error.errno == errno.EINVAL and direct:
            raise BackendError(f"{uri}: its file system has no O_DIRECT; use another cache mode than none") from None
        hint = "; or set read_only" if error.errno in (errno.EACCES, errno.EROFS) and not read_only else ""
        raise BackendError(f"{uri}: cannot be opened: {error.strerror}{hint}") from None


def _lock(fd: int, uri: str, *, shared: bool, tries: int) -> None:
    """Take the advisory lock. A new block device may be locked for a moment by udev: hence more than one try."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise DeviceBusyError(f"{uri}: another device serves this store, or a program has locked it") from None
            time.sleep(BUSY_PAUSE_S)


def _describe_file(fd: int, backend: BackendConfig, read_only: bool) -> Store:
    status = os.fstat(fd)
    direct_align = _probe_direct(fd, backend.uri, SECTOR_BYTES) if backend.cache == "none" else 0
    block = max(SECTOR_BYTES, direct_align)
    preferred = status.st_blksize if status.st_blksize & (status.st_blksize - 1) == 0 else block
    return Store(
        uri=backend.uri,
        kind="file",
        fd=fd,
        size_bytes=status.st_size,
        block_size_bytes=block,
        physical_block_size_bytes=max(block, min(preferred, PHYSICAL_BLOCK_MAX_BYTES)),
        opt_io_size_bytes=preferred if preferred > PHYSICAL_BLOCK_MAX_BYTES else 0,
        read_only=read_only,
        can_discard=not read_only and _probe_fallocate(fd, status.st_size, FALLOC_FL_PUNCH_HOLE),
        can_write_zeroes=not read_only,
        zeroes_cheaply=not read_only and _probe_fallocate(fd, status.st_size, FALLOC_FL_ZERO_RANGE),
        direct_align=direct_align,
        cache=backend.cache,
    )


def _describe_block(fd: int, backend: BackendConfig, read_only: bool) -> Store:
    if not read_only and _ioctl_int(fd, BLKROGET):
        raise BackendError(f"{backend.uri}: the block device is read-only; set read_only")
    logical = _ioctl_int(fd, BLKSSZGET)
    direct_align = _probe_direct(fd, backend.uri, logical) if backend.cache == "none" else 0
    block = max(logical, direct_align)
    return Store(
        uri=backend.uri,
        kind="blockdev",
        fd=fd,
        size_bytes=os.lseek(fd, 0, os.SEEK_END),
        block_size_bytes=block,
        physical_block_size_bytes=max(block, _ioctl_int(fd, BLKPBSZGET)),
        opt_io_size_bytes=_ioctl_int(fd, BLKIOOPT),
        read_only=read_only,
        can_discard=not read_only and _block_limit(os.fstat(fd).st_rdev, "discard_max_bytes") > 0,
        can_write_zeroes=not read_only,
        zeroes_cheaply=not read_only and _block_limit(os.fstat(fd).st_rdev, "write_zeroes_max_bytes") > 0,
        direct_align=direct_align,
        cache=backend.cache,
    )


def _ioctl_int(fd: int, request: int) -> int:
    """Return the unsigned int that a block device's ioctl gives."""
    (value,) = struct.unpack("=I", fcntl.ioctl(fd, request, bytes(4)))
    return int(value)


def _block_limit(rdev: int, name: str, sysfs: Path = Path("/sys")) -> int:
    """Return a limit of the block device's queue. A partition has no queue of its own; its disk is the parent."""
    node = (sysfs / f"dev/block/{os.major(rdev)}:{os.minor(rdev)}").resolve()
    for directory in (node, node.parent):
        limit = directory / "queue" / name
        if limit.exists():
            return int(limit.read_text())
    return 0


def _probe_direct(fd: int, uri: str, smallest_bytes: int) -> int:
    """Return the alignment that O_DIRECT needs, found by reading with no more than it: 512, else 4096."""
    with mmap.mmap(-1, 2 * DIRECT_ALIGN_MAX_BYTES) as memory, memoryview(memory) as view:
        for align in (SECTOR_BYTES, DIRECT_ALIGN_MAX_BYTES):
            if align < smallest_bytes:
                continue
            # Offset, length and address are odd multiples of align; past the end of a small store it reads nothing.
            with view[align : 2 * align] as buffer:
                try:
                    os.preadv(fd, [buffer], align)
                except OSError as error:
                    if error.errno == errno.EINVAL:
                        continue
                    raise
            return align
    raise BackendError(
        f"{uri}: O_DIRECT needs more than {DIRECT_ALIGN_MAX_BYTES} bytes of alignment; use another cache"
    )


def _probe_fallocate(fd: int, size_bytes: int, mode: int) -> bool:
    """Return whether the file system can do `mode` to a range, by trying it past the end, where there is nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    offset = -(-size_bytes // 4096) * 4096
    done = libc.fallocate64(fd, mode | FALLOC_FL_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(4096)) == 0
    if done and mode == FALLOC_FL_ZERO_RANGE:  # which allocates; give that back
        hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        libc.fallocate64(fd, hole, ctypes.c_int64(offset), ctypes.c_int64(4096))
    return bool(done)
