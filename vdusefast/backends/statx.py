"""System calls about open files that Python's os module lacks: statx(2), statfs(2), name_to_handle_at(2)."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

# linux/stat.h
STATX_BTIME = 0x0800
STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_MASK = struct.Struct("=I")
_BTIME = struct.Struct("=qI")  # of struct statx, at 80
_BTIME_OFFSET = 80
_DIOALIGN = struct.Struct("=II")  # stx_dio_mem_align, stx_dio_offset_align
_DIOALIGN_OFFSET = 152
_STATFS_BYTES = 256
_STATFS_TYPE = struct.Struct("@l")  # f_type, the first of struct statfs
# linux/fcntl.h
_AT_EMPTY_PATH = 0x1000
# linux/exportfs.h
_HANDLE = struct.Struct("=Ii")  # struct file_handle: bytes that follow, type
_HANDLE_MAX_BYTES = 128


class Statx(NamedTuple):
    """The fields that statx(2) adds to os.fstat(). 0 and "": the kernel does not say."""

    dio_align: int = 0  # O_DIRECT: of offset, length and memory
    born: str = ""  # when the file was made, in seconds


def statx(fd: int) -> Statx:
    """Return the kernel's answer for the open file `fd`."""
    libc = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if not hasattr(libc, "statx") or libc.statx(fd, b"", _AT_EMPTY_PATH, STATX_BTIME | STATX_DIOALIGN, buffer):
        return Statx()
    (mask,) = _MASK.unpack_from(buffer)
    found = Statx()
    if mask & STATX_DIOALIGN:
        memory_align, offset_align = _DIOALIGN.unpack_from(buffer, _DIOALIGN_OFFSET)
        # An offset_align of 0: this file has no direct I/O, so O_DIRECT goes through the page cache.
        found = found._replace(dio_align=max(memory_align, offset_align) if offset_align else 0)
    if mask & STATX_BTIME:
        seconds, nanoseconds = _BTIME.unpack_from(buffer, _BTIME_OFFSET)
        found = found._replace(born=f"{seconds}.{nanoseconds:09}")
    return found


def file_system_type(fd: int) -> int:
    """Return the number of an open file's file system (linux/magic.h), 0 where the kernel does not say."""
    libc = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    return int(_STATFS_TYPE.unpack_from(buffer)[0]) & 0xFFFFFFFF if libc.fstatfs(fd, buffer) == 0 else 0


def file_handle(fd: int) -> str:
    """Return the handle by which the file system itself names the file, "" where it has none.

    In most that is the number of the inode with its generation, which no later file in the same inode shares.
    """
    libc = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(_HANDLE.size + _HANDLE_MAX_BYTES)
    _HANDLE.pack_into(buffer, 0, _HANDLE_MAX_BYTES, 0)
    mount = ctypes.c_int()
    if not hasattr(libc, "name_to_handle_at") or libc.name_to_handle_at(
        fd, b"", buffer, ctypes.byref(mount), _AT_EMPTY_PATH
    ):
        return ""
    length_bytes, kind = _HANDLE.unpack_from(buffer)
    return f"{kind}:{buffer.raw[_HANDLE.size : _HANDLE.size + length_bytes].hex()}"
