"""Block devices by their numbers: their names in sysfs, and opening them where /dev has no node."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def number_of(directory: Path) -> int | None:
    """Return the number of a device by its directory in sysfs, None when it is gone."""
    try:
        major, minor = (directory / "dev").read_text().split(":")
        return os.makedev(int(major), int(minor))
    except (OSError, ValueError):
        return None


def open_block(node: str, number: int, flags: int) -> int:
    """Open the block device of that number, by its node if the number matches, else by a temporary node.

    The /dev of a container has few nodes. Raises OSError when it cannot be opened, or no node can be made.
    """
    flags |= os.O_CLOEXEC
    try:
        status = os.stat(node)
    except OSError:
        status = None
    if status is not None and stat.S_ISBLK(status.st_mode) and status.st_rdev == number:
        return os.open(node, flags)
    import tempfile  # only where it is needed: every command loads this module

    with tempfile.TemporaryDirectory(prefix=".vdusefast-", dir="/dev") as directory:
        path = f"{directory}/node"
        os.mknod(path, stat.S_IFBLK | 0o600, number)
        return os.open(path, flags)
