"""Facts about a block device from the kernel, by its node."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from vdusefast.errors import TimedOutError

SECTOR_BYTES = 512
LOOK_S = 0.02


def size_bytes(node: str, sysfs: Path = Path("/sys")) -> int:
    """Return the capacity of `node`, 0 when there is no such block device (yet)."""
    return _number(node, "size", sysfs) * SECTOR_BYTES


def logical_block_bytes(node: str, sysfs: Path = Path("/sys")) -> int:
    """Return the smallest unit that `node` reads and writes."""
    return _number(node, "queue/logical_block_size", sysfs) or SECTOR_BYTES


def discard_max_bytes(node: str, sysfs: Path = Path("/sys")) -> int:
    """Return how much one discard may take, 0 when `node` cannot discard."""
    return _number(node, "queue/discard_max_bytes", sysfs)


def is_read_only(node: str, sysfs: Path = Path("/sys")) -> bool:
    """Return whether `node` takes no writes."""
    return bool(_number(node, "ro", sysfs))


def wait_for(node: str, wanted_bytes: int, timeout_s: float) -> None:
    """Wait until `node` is there and holds `wanted_bytes`. Raises TimedOutError that says how far it has come."""
    end = time.monotonic() + timeout_s
    while True:
        found = size_bytes(node)
        if found == wanted_bytes and Path(node).exists() and stat.S_ISBLK(os.stat(node).st_mode):
            return
        if time.monotonic() > end:
            raise TimedOutError(f"{node}: has {found} bytes after {timeout_s:g} s, expected {wanted_bytes}")
        time.sleep(LOOK_S)


def _number(node: str, attribute: str, sysfs: Path) -> int:
    try:
        return int((sysfs / "class/block" / Path(node).name / attribute).read_text())
    except (OSError, ValueError):
        return 0
