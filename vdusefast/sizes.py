"""Sizes as people write them."""

from __future__ import annotations

import re

from vdusefast.errors import ConfigError

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
