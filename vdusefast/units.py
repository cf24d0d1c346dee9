"""Sizes and times as people write them."""

from __future__ import annotations

import re

from vdusefast.errors import ConfigError

BLOCK_SIZE_MIN_BYTES = 512  # of a block that a driver is shown
BLOCK_SIZE_MAX_BYTES = 4096
SECTOR_BYTES = 512  # of virtio-blk, whatever the block size is, and of sysfs

_SIZE = re.compile(r"(\d+)\s*(?:([KMGTP])(?:IB)?|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that `text` stands for: "4096", "64M", "1GiB"; K, M, G, T and P are powers of 1024.

    Raises ConfigError; "64MB" is refused because it is read in two ways.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"{text!r} is not a size; write for example 4096, 64M or 1GiB")
    digits, unit = match.groups()
    size_bytes = int(digits[:20]) << (10 * " KMGTP".index((unit or " ").upper()))
    if size_bytes >= 1 << 63 or len(digits) > 20:
        raise ConfigError(f"{text!r}: a size is below 2^63 bytes")
    return size_bytes


def size_text(size_bytes: int) -> str:
    """Return a size as people write it: 512 B, 64 MiB, 1.5 GiB."""
    value, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = int(seconds)
    first = next((place for place, (_, length) in enumerate(units) if left >= length), len(units) - 1)
    parts = []
    for unit, length in units[first : first + 2]:
        parts.append(f"{left // length} {unit}")
        left %= length
    return " ".join(parts)
