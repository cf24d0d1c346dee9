"""A small file that can be rewritten on a full disk: two slots, allocated when the file is made.

A write replaces the older text, in place, so the newer one stays whole until the write is complete. A
checksum over each shows a slot whose writer was killed.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from pathlib import Path
from typing import NamedTuple

SLOT_MIN_BYTES = 8192
SLOT_STEP_BYTES = 4096
MAX_BYTES = 2 << 20
_MAGIC = b"vdusefast-state"
_HEADER_BYTES = len(_MAGIC) + 1 + 20 + 1 + 10 + 1 + 8 + 1


class _Slot(NamedTuple):
    number: int  # counts writes
    text: bytes


def read(path: Path) -> bytes:
    """Return the text that was written last, or the whole text of a file without slots. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
        whole = file.read(MAX_BYTES)
    if not whole.startswith(_MAGIC) and not whole[len(whole) // 2 :].startswith(_MAGIC):
        return whole
    return max(_slots(whole)).text


def write(path: Path, text: bytes) -> None:
    """Replace the text, mode 0600: a reader finds the old one or the new one. Raises OSError.

    Allocates nothing, unless the file is new, has no slots yet, or the text has outgrown them. Nothing is synced.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        fd = -1
    try:
        if fd >= 0:
            fcntl.flock(fd, fcntl.LOCK_EX)  # other writers; readers need none
            if _write_slot(fd, text):
                return
        _make(path, text)
    finally:
        if fd >= 0:
            os.close(fd)


def _write_slot(fd: int, text: bytes) -> bool:
    """Write into the slot with the older text. Returns whether there is one that `text` fits into."""
    whole = os.pread(fd, MAX_BYTES, 0)
    slots = _slots(whole)
    slot_bytes = len(whole) // 2
    if not max(slots).number or _HEADER_BYTES + len(text) > slot_bytes:
        return False
    older = slots.index(min(slots))
    os.pwrite(fd, _pack(max(slots).number + 1, text), older * slot_bytes)
    return True


def _make(path: Path, text: bytes) -> None:
    """Make the file with all the space that it will need."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    slot_bytes = max(SLOT_MIN_BYTES, -(-2 * (_HEADER_BYTES + len(text)) // SLOT_STEP_BYTES) * SLOT_STEP_BYTES)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(fd, 0, 2 * slot_bytes)
        os.pwrite(fd, _pack(1, text), 0)
        new.rename(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _pack(number: int, text: bytes) -> bytes:
    return b"%s %020d %010d %08x\n" % (_MAGIC, number, len(text), _sum(number, text)) + text


def _sum(number: int, text: bytes) -> int:
    return zlib.crc32(text, number & 0xFFFFFFFF)


def _slots(whole: bytes) -> list[_Slot]:
    """Return both slots; number 0 marks a slot without a whole text."""
    half = len(whole) // 2
    return [_unpack(whole[:half]), _unpack(whole[half:])]


def _unpack(slot: bytes) -> _Slot:
    fields = slot[:_HEADER_BYTES].split()
    try:
        magic, number, length, checksum = fields[0], int(fields[1]), int(fields[2]), int(fields[3], 16)
    except (ValueError, IndexError):
        return _Slot(0, b"")
    text = slot[_HEADER_BYTES : _HEADER_BYTES + length]
    if magic != _MAGIC or len(text) != length or _sum(number, text) != checksum:
        return _Slot(0, b"")
    return _Slot(number, text)
