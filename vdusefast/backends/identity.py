"""The identity of an open store, by which the next server recognises another store of the same name.

An identity is of an open descriptor and not of a path. It need not outlive the machine's uptime, as no device does.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

BLKGETDISKSEQ = 0x80081280  # linux/fs.h, since 5.15
# Names that a disk keeps when it is plugged in again, in the order of their weight: below /sys/block/DISK.
_DISK_NAMES = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "device/serial", "serial")

Identity = dict[str, str]  # empty: nothing is known


def of_file(fd: int) -> Identity:
    """Return the identity of an open regular file."""
    from vdusefast.backends.statx import file_handle, statx  # which load ctypes: not for a command that only compares

    status = os.fstat(fd)
    found = {
        "kind": "file",
        "device": f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}",
        "inode": str(status.st_ino),
        "made": statx(fd).born,
        "handle": file_handle(fd),
    }
    return {key: value for key, value in found.items() if value}


def of_block_device(fd: int, sysfs: Path = Path("/sys")) -> Identity:
    """Return the identity of an open block device."""
    rdev = os.fstat(fd).st_rdev
    number = f"{os.major(rdev)}:{os.minor(rdev)}"
    node = (sysfs / "dev/block" / number).resolve()
    start = _text(node / "start") if (node / "partition").exists() else ""
    disk = node.parent if start else node
    names = (f"{name}={text}" for name in _DISK_NAMES if (text := _text(disk / name)))
    found = {
        "kind": "block device",
        "number": number,
        "name": next(names, ""),
        "diskseq": _diskseq(fd) or _text(disk / "diskseq"),
        "start": start,
    }
    return {key: value for key, value in found.items() if value}


def is_same(old: Identity, new: Identity) -> bool:
    """Return whether two identities are of one store, as far as that is known."""
    if not old or not new:
        return True
    if old.get("kind") != new.get("kind"):
        return False
    if old.get("kind") == "file":
        return _agree(old, new, "inode", "made", "handle") and (
            _agree(old, new, "device") or _is_mounted_again(old, new)
        )
    if old.get("kind") == "block device":
        # A disk that was plugged in again is the same disk with another sequence number.
        decisive = next((key for key in ("name", "diskseq", "number") if key in old and key in new), "kind")
        return old.get("start") == new.get("start") and _agree(old, new, decisive)
    return all(_agree(old, new, key) for key in old)


def text_of(identity: Identity) -> str:
    """Return an identity as a text for people."""
    said = [f"{key} {value}" for key, value in identity.items() if key not in ("kind", "handle")]
    return f"{identity.get('kind', 'store')} ({', '.join(said)})"


def path_is_other(fd: int, path: str) -> bool:
    """Return whether `path` has become another file or block device than the open one. False if nothing is there."""
    try:
        named, served = os.stat(path), os.fstat(fd)
    except OSError:
        return False
    if served.st_rdev:
        listed = _text(Path(f"/sys/dev/block/{os.major(named.st_rdev)}:{os.minor(named.st_rdev)}/diskseq"))
        sequence = _diskseq(fd)
        return named.st_rdev != served.st_rdev or bool(listed and sequence and listed != sequence)
    return (named.st_dev, named.st_ino) != (served.st_dev, served.st_ino)


def _agree(old: Identity, new: Identity, *keys: str) -> bool:
    return all(old[key] == new[key] for key in keys if key in old and key in new)


def _is_mounted_again(old: Identity, new: Identity) -> bool:
    """Return whether a file system without a block device of its own may have got another number by a new mount.

    File handles identify the file then (NFS, btrfs); without handles nothing does.
    """
    anonymous = all(each.get("device", "").startswith("0:") for each in (old, new))
    return anonymous and "handle" in old and "handle" in new


def _diskseq(fd: int) -> str:
    try:
        (number,) = struct.unpack("=Q", fcntl.ioctl(fd, BLKGETDISKSEQ, bytes(8)))
    except OSError:
        return ""
    return str(number)


def _text(path: Path) -> str:
    """Return the text of a file of sysfs, "" when it is missing or empty."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
