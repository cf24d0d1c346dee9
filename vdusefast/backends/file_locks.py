"""Locks on a store, by QEMU's convention, so that two programs never write to one image at once.

QEMU (block/file-posix.c), qemu-img and qemu-storage-daemon take shared OFD locks on single bytes of an
image. A lock on byte 100 + N says "I use permission N", one on byte 200 + N says "nobody else may have
permission N". A program first takes its locks, then checks that nobody holds an opposite one. Nothing
waits; when two programs start at the same time, one or both give up.

An OFD lock belongs to the open file description. The workers inherit it, it ends with the last of them,
and closing another descriptor of the file does not release it. It does not disturb udev, which uses
flock(2) on block devices.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

from vdusefast.backends.statx import file_system_type
from vdusefast.errors import BackendError, DeviceBusyError
from vdusefast.host import processes

# block/file-posix.c and include/block/block-common.h of QEMU
PERM_BASE = 100
SHARED_BASE = 200
CONSISTENT_READ, WRITE, RESIZE = 0, 1, 3  # log2 of BLK_PERM_*

TRIES = 12
FIRST_PAUSE_S = 0.005
PAUSE_MAX_S = 0.08

_FLOCK = struct.Struct("@hhqqi4x")  # struct flock
_BUSY = (errno.EAGAIN, errno.EACCES)
# linux/magic.h: where the client carries out flock(2) as a lock on all bytes, which would meet those above.
_FLOCK_IS_RECORD_LOCK = (0x6969, 0x517B, 0xFF534D42, 0xFE534D42)  # NFS, SMB, CIFS, SMB2


class _Claim(NamedTuple):
    """Permissions of QEMU's on a store: those that we use, and those that nobody else may have meanwhile."""

    uses: tuple[int, ...]
    excludes: tuple[int, ...]


_WRITER = _Claim((CONSISTENT_READ, WRITE, RESIZE), (WRITE, RESIZE))
_READER = _Claim((CONSISTENT_READ,), (WRITE, RESIZE))


def claim(fd: int, uri: str, *, read_only: bool, is_block: bool) -> None:
    """Lock an open store until the last copy of `fd` is closed. Waits for a program that locks it for a moment only.

    A file gets a flock(2) as well, against programs that know no other lock. Raises DeviceBusyError, which names the
    holder, and BackendError where the file system has no locks.
    """
    pause_s = FIRST_PAUSE_S
    has_flock = not is_block and file_system_type(fd) not in _FLOCK_IS_RECORD_LOCK
    for left in reversed(range(TRIES)):
        try:
            if has_flock:
                fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _try_claim(fd, _READER if read_only else _WRITER):
                return
        except BlockingIOError:
            pass
        except OSError as error:
            raise BackendError(f"{uri}: {_no_locks_text(error)}") from None
        if left:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
    raise DeviceBusyError(f"{uri}: in use by {_holders_text(fd)}; end that first")


def _try_claim(fd: int, wanted: _Claim) -> bool:
    """Try to take all locks. Returns whether that worked; if not, none is kept."""
    mine = [PERM_BASE + bit for bit in wanted.uses] + [SHARED_BASE + bit for bit in wanted.excludes]
    against = [SHARED_BASE + bit for bit in wanted.uses] + [PERM_BASE + bit for bit in wanted.excludes]
    done = False
    try:
        for byte in mine:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        done = not any(_is_locked(fd, byte) for byte in against)
    except OSError as error:
        if error.errno not in _BUSY:
            raise
    finally:
        if not done:
            # All at once, also those that no step above has locked.
            span = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, PERM_BASE, SHARED_BASE + RESIZE + 1 - PERM_BASE, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, span)
    return done


def _is_locked(fd: int, byte: int) -> bool:
    """Return whether another open file has a lock on a byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _no_locks_text(error: OSError) -> str:
    """Return the message for a file that cannot be locked, with the remedy."""
    text = f"cannot be locked against other programs: {error.strerror}"
    if error.errno == errno.ENOLCK:
        return (
            f"{text}. On NFS version 3 both hosts need rpc.statd, and the server its lock manager; or mount it with "
            "vers=4; or with nolock, if no other host ever uses it"
        )
    return f"{text}; store it on a file system with locks"


def _holders_text(fd: int) -> str:
    from vdusefast.host.node_users import describe

    return describe(find_holders(fd)) or "a program that cannot be seen from here, in a container or on another host"


def find_holders(fd: int, root: Path = processes.ROOT) -> list[str]:
    """Return the holders of locks on the file that is open as `fd`, except locks by that descriptor itself.

    The kernel does not say whose an OFD lock is, but shows each process's own in fdinfo. Of processes that have
    inherited it only the parent is named.
    """
    status = os.fstat(fd)
    found: dict[int, Path] = {}
    for process in processes.list_processes(root):
        own = fd if process.name == str(os.getpid()) else -1
        if any(int(entry.name) != own and _has_lock(entry, status) for entry in _descriptors(process)):
            found[int(process.name)] = process
    devices = _served_by() if found else {}
    heads = [process for process in found.values() if processes.parent_pid(process) not in found]
    return [devices.get(int(process.name)) or processes.command(process) for process in heads]


def _descriptors(process: Path) -> list[Path]:
    try:
        return list((process / "fdinfo").iterdir())
    except OSError:
        return []  # it has ended, or belongs to another user


def _has_lock(entry: Path, status: os.stat_result) -> bool:
    """Return whether a descriptor's fdinfo has a line such as "lock: 1: OFDLCK ADVISORY READ -1 fd:00:1234 100 100"."""
    for line in processes.read(entry).splitlines():
        fields = line.split()
        if len(fields) < 8 or fields[0] != "lock:" or not fields[6].endswith(f":{status.st_ino}"):
            continue
        major, minor, _ = fields[6].split(":")
        if os.makedev(int(major, 16), int(minor, 16)) == status.st_dev:
            return True
        try:  # btrfs and others tell programs another number than the kernel shows there
            return os.path.samestat(os.stat(entry.parent.parent / "fd" / entry.name), status)
        except OSError:
            continue
    return False


def _served_by() -> dict[int, str]:
    """Return the servers of this machine's devices by their pids, as far as we may look."""
    from vdusefast.host import run_dirs

    base = run_dirs.base_directory()
    if base is None:
        return {}
    held = [base / name for name in run_dirs.device_names(base) if run_dirs.is_held(base / name)]
    return {pid: f"the vdusefast device {path.name} (pid {pid})" for path in held if (pid := run_dirs.holder_pid(path))}
