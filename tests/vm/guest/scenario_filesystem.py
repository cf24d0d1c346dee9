"""File systems: made, filled, unmounted, mounted again, compared, and checked."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import guest
from checks import check
from guest import MIB

MOUNT = guest.WORK / "mount"


def fill(directory: Path, size_bytes: int) -> dict[str, str]:
    """Write files of many sizes, some of them twice, delete some; returns the digest of each that stays."""
    choose = random.Random(7)
    files: dict[str, str] = {}
    left, number = size_bytes, 0
    while left > 0:
        size = choose.choice((0, 1, 511, 4096, 65537, 300_000, 3 * MIB))
        path = directory / f"d{number % 5}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(choose.randbytes(size))
        if number % 7 == 3:
            with path.open("r+b") as file:
                file.seek(size // 2)
                file.write(choose.randbytes(1000))
                os.fsync(file.fileno())
        if number % 5 == 4:
            path.unlink()
        else:
            files[str(path.relative_to(directory))] = guest.checksum(path)
        left -= size + 4096
        number += 1
    return files


def differences(directory: Path, files: dict[str, str]) -> list[str]:
    """Return the files that are not what they were."""
    return [name for name, digest in files.items() if guest.checksum(directory / name) != digest]


@contextlib.contextmanager
def mounted(node: str) -> Iterator[None]:
    """Have the file system of a disk at MOUNT."""
    MOUNT.mkdir(exist_ok=True)
    guest.sh("mount", node, MOUNT)
    try:
        yield
    finally:
        guest.sh("umount", MOUNT, timeout_s=60)


def live_on(node: str, make: list[object], check_words: list[object], fill_bytes: int) -> int:
    """Make a file system on a disk, fill it, and see that a fresh mount holds the same. Returns how many files."""
    guest.sh(*make, node, timeout_s=60)
    with mounted(node):
        files = fill(MOUNT, fill_bytes)
    guest.sh("blockdev", "--flushbufs", node)
    with mounted(node):
        assert differences(MOUNT, files) == []
        guest.sh("fstrim", MOUNT)
        assert differences(MOUNT, files) == []
    guest.sh(*check_words, node, timeout_s=60)
    return len(files)


def live_through(make: list[object], check_words: list[object], size_bytes: int, **settings: object) -> None:
    """Do that on a new device over a file."""
    path = guest.image("fs.img", size_bytes)
    with guest.device("vd0", f"file:{path}", **settings) as node:
        live_on(node, make, check_words, 16 * MIB)
    # And without us: the image is what was written to the disk.
    guest.sh(*check_words, path, timeout_s=60)


@check(limit_s=120)
def ext4() -> None:
    live_through(["mkfs.ext4", "-q", "-F"], ["e2fsck", "-f", "-n"], 64 * MIB, queues=2)


@check(limit_s=120)
def xfs() -> None:
    live_through(["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n"], 320 * MIB, queues=1)
