"""How many dirty pages a machine may have while buffered writes are timed.

By default that is a fifth of its memory, so that seconds of writes are only copied. With a small limit the writer waits
for pages that are cleaned, which is what it comes down to in the end, and what a server over a file makes twice: pages
of its device become pages of its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT_BYTES = 32 << 20
SYSCTL = Path("/proc/sys/vm")


@contextmanager
def limited(wanted: bool, sysctl: Path = SYSCTL) -> Iterator[None]:
    """Keep to LIMIT_BYTES if that is `wanted`, and put back what was set before. Raises OSError."""
    if not wanted:
        yield
        return
    names = ("dirty_background_bytes", "dirty_bytes", "dirty_background_ratio", "dirty_ratio")
    before = {name: (sysctl / name).read_text().strip() for name in names}
    try:
        (sysctl / "dirty_background_bytes").write_text(str(LIMIT_BYTES // 2))
        (sysctl / "dirty_bytes").write_text(str(LIMIT_BYTES))
        yield
    finally:
        for name, text in before.items():
            if int(text):  # of bytes and ratio, the one that is set makes the other 0
                (sysctl / name).write_text(text)
