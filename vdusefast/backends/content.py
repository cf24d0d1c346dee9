"""Find the sector size that the contents of a disk were made for: they are readable in that size only.

Partition tables count sectors, and file systems refuse a disk whose sectors are larger than theirs. An image that was
made on sectors of 512 bytes would be unreadable in blocks of 4096, whatever its store has. The contents are the
driver's own, so they decide nothing but the block size that is offered when a device is made.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib

from vdusefast.units import SECTOR_BYTES

LARGE_BYTES = 4096
LOOK_BYTES = 64 << 10

_GPT = struct.Struct("<8s4sIIIQ")  # signature, revision, header size, CRC, reserved, the header's own LBA
_GPT_CRC_OFFSET = 16
_GPT_SIZE_MAX_BYTES = 512
_MBR_ENTRIES, _MBR_SIGNATURE = 446, 510
_PROTECTIVE = 0xEE
_XFS_SECTOR_OFFSET = 102
_EXT_MAGIC_OFFSET, _EXT_BLOCK_OFFSET = 1024 + 56, 1024 + 24
_FAT_SECTOR_OFFSET = 11


def made_for(fd: int, size_bytes: int, *, unknown_bytes: int = 0) -> int:
    """Return 512 or 4096, the sectors that the contents of an open store need; 0 for a blank one, which needs none.

    unknown_bytes: returned for contents of an unknown kind. Raises OSError.
    """
    if size_bytes % LARGE_BYTES:
        return SECTOR_BYTES
    with mmap.mmap(-1, LOOK_BYTES) as memory:  # page-aligned, as O_DIRECT may want it
        with memoryview(memory) as view:
            length = os.preadv(fd, [view], 0)
        head = memory[:length].ljust(LOOK_BYTES, b"\0")
    if not any(head):
        return 0
    return _of_gpt(head) or _of_file_system(head) or _of_mbr(head, size_bytes) or unknown_bytes


def _small_or_large(sector_bytes: int) -> int:
    return SECTOR_BYTES if sector_bytes < LARGE_BYTES else LARGE_BYTES


def _of_gpt(head: bytes) -> int:
    return next((size for size in (SECTOR_BYTES, LARGE_BYTES) if _is_gpt(head[size : 2 * size])), 0)


def _is_gpt(sector: bytes) -> bool:
    signature, _, length, crc, _, own = _GPT.unpack_from(sector)
    if signature != b"EFI PART" or own != 1 or not _GPT.size <= length <= _GPT_SIZE_MAX_BYTES:
        return False
    return zlib.crc32(sector[:_GPT_CRC_OFFSET] + bytes(4) + sector[_GPT_CRC_OFFSET + 4 : length]) == int(crc)


def _of_file_system(head: bytes) -> int:
    """Return the sector size that XFS, ext2 to ext4, FAT or NTFS has recorded."""
    if head.startswith(b"XFSB"):
        return _small_or_large(int.from_bytes(head[_XFS_SECTOR_OFFSET : _XFS_SECTOR_OFFSET + 2], "big"))
    if head[_EXT_MAGIC_OFFSET : _EXT_MAGIC_OFFSET + 2] == b"\x53\xef":
        return _small_or_large(1024 << min(head[_EXT_BLOCK_OFFSET], 6))
    if head[0] in (0xEB, 0xE9) and head[_MBR_SIGNATURE : _MBR_SIGNATURE + 2] == b"\x55\xaa":
        sector = int.from_bytes(head[_FAT_SECTOR_OFFSET : _FAT_SECTOR_OFFSET + 2], "little")
        return _small_or_large(sector) if sector in (512, 1024, 2048, 4096) else 0
    return 0


def _of_mbr(head: bytes, size_bytes: int) -> int:
    """Return a partition table's sector size: the larger if the table fits then, as tables rather fill a disk."""
    if head[_MBR_SIGNATURE : _MBR_SIGNATURE + 2] != b"\x55\xaa":
        return 0
    end = 0
    for at in range(_MBR_ENTRIES, _MBR_SIGNATURE, 16):
        kind, (first, count) = head[at + 4], struct.unpack_from("<II", head, at + 8)
        if kind == _PROTECTIVE or head[at] not in (0, 0x80):
            return 0  # of a GPT that is damaged, or no table
        end = max(end, first + count if kind else 0)
    if not end:
        return 0
    return LARGE_BYTES if end * LARGE_BYTES <= size_bytes else SECTOR_BYTES
