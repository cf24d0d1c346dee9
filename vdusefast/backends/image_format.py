"""Recognise disk images that have a format of their own, such as qcow2: a store's bytes are served as they are.

Served like that, the guest would see the container in place of the disk, and write over it. So a new device is not made
over such an image unless the URI says `?format=raw`.

The first sector of a raw disk is its user's: each writer to the device can make it look like any of these formats.
Hence two rules. Nothing of a header is ever used but to recognise it. And a device that continues is never looked at:
else its user could keep it from being served. LUKS is recognised, but served: dm-crypt on a device writes the same
header, and an image of that format, served as it is, is the same encrypted disk to each holder of its key.
"""

from __future__ import annotations

import mmap
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vdusefast.errors import ConfigError

if TYPE_CHECKING:
    from vdusefast.backends import Store

RAW = "?format=raw"  # at the end of a URI
SECTOR_BYTES = 512
LOOK_BYTES = 4096

# Each takes the first bytes of a store, LOOK_BYTES of them unless it is shorter.
_Test = Callable[[bytes], bool]


def _be32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")


def _le32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")


def _is_power(value: int) -> bool:
    return value > 0 and not value & (value - 1)


def _is_qcow(data: bytes) -> bool:
    return data.startswith(b"QFI\xfb") and _be32(data, 4) == 1


def _is_qcow2(data: bytes) -> bool:
    return data.startswith(b"QFI\xfb") and _be32(data, 4) in (2, 3)


def _is_vmdk(data: bytes) -> bool:
    sparse = data.startswith((b"KDMV", b"COWD")) and 1 <= _le32(data, 4) <= 3
    return sparse or data.startswith((b"# Disk DescriptorFile", b"\xbe\xba\xfe\xca\0\0\0\0"))


def _is_vdi(data: bytes) -> bool:
    return data[64:68] == b"\x7f\x10\xda\xbe" and _le32(data, 68) >> 16 == 1


def _is_vpc(data: bytes) -> bool:
    return data.startswith(b"conectix") and _vpc_checksum_fits(data[:SECTOR_BYTES])


def _is_qed(data: bytes) -> bool:
    return data.startswith(b"QED\0") and _is_power(_le32(data, 4))


def _is_bochs(data: bytes) -> bool:
    return (
        data.startswith(b"Bochs Virtual HD Image\0")
        and data[32:39] == b"Redolog"
        and data[48:55] == b"Growing"
        and data[48:55] == b"Growing"
        and _le32(data, 64) in (0x10000, 0x20000)
    )


def _is_parallels(data: bytes) -> bool:
    return data.startswith((b"WithoutFreeSpace", b"WithouFreSpacExt")) and _le32(data, 16) == 2


_BY_HEAD: dict[str, _Test] = {
    "qcow": _is_qcow,
    "qcow2": _is_qcow2,
    "vmdk": _is_vmdk,
    "vdi": _is_vdi,
    "vhdx": lambda data: data.startswith(b"vhdxfile"),
    "vpc": _is_vpc,
    "qed": _is_qed,
    "bochs": _is_bochs,
    "parallels": _is_parallels,
    "cloop": lambda data: data.startswith(b"#!/bin/sh\n#V2.0 Format\n"),
    "luks": lambda data: data.startswith(b"LUKS\xba\xbe") and data[6:8] in (b"\0\1", b"\0\2"),
}

# Formats with what marks them in the last sector.
_BY_TAIL: dict[str, _Test] = {
    "vpc": lambda data: data.startswith(b"conectix") and _vpc_checksum_fits(data),  # of a fixed size
    "dmg": lambda data: data.startswith(b"koly") and _be32(data, 8) == SECTOR_BYTES,
}

_NAMES = {"vpc": "vpc (VHD)"}  # where people do not know QEMU's name
_SERVED = ("luks",)
_READ_ONLY = ("bochs", "cloop", "dmg")  # QEMU does not write these


def _vpc_checksum_fits(footer: bytes) -> bool:
    """Return whether the checksum is right; without it, eight characters would make any disk a VHD."""
    return len(footer) == SECTOR_BYTES and _be32(footer, 64) == ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF


def find_format(fd: int, size_bytes: int, granule_bytes: int = SECTOR_BYTES) -> str:
    """Return QEMU's name of the format that a store is an image in, "" when it looks like none of them.

    granule_bytes: in which it may be read, where it is open with O_DIRECT. Raises OSError.
    """
    unit = max(LOOK_BYTES, granule_bytes)
    head = _read(fd, 0, unit)
    for name, fits in _BY_HEAD.items():
        if fits(head):
            return name
    start = max(0, size_bytes - SECTOR_BYTES)
    begin = start // unit * unit
    tail = _read(fd, begin, 2 * unit)[start - begin : size_bytes - begin]
    return next((name for name, fits in _BY_TAIL.items() if fits(tail)), "")


def check(store: Store) -> None:
    """Refuse a file or block device that is an image in another format than raw, unless its URI says that it is raw.

    Appends to the store's notes if the image is encrypted. Raises ConfigError, OSError.
    """
    if store.said_raw or not store.is_on_disk or store.size_bytes <= 0:
        return
    name = find_format(store.fd, store.size_bytes, store.granule_bytes)
    if name in _SERVED:
        store.notes.append(
            f"{store.uri} is encrypted ({name.upper()}) and is served as it is: users of the device need the key; "
            f"append {RAW} to the URI to confirm this"
        )
    elif name:
        raise ConfigError(f"backend.uri: {_refusal(store, name)}")


def split_path(rest: str) -> tuple[str, bool]:
    """Return the path in the text after `file:`, and whether the URI says that it is a raw disk.

    All but RAW at the end is the path, with any characters. Raises ConfigError for another format.
    """
    path, mark, name = rest.rpartition("?format=")
    if mark and name == "raw":
        return path, True
    if mark and name in (*_BY_HEAD, *_BY_TAIL) and not os.path.lexists(rest):
        raise ConfigError(f"backend.uri: file:{rest}: only ?format=raw is possible; {_way(path, name)}")
    return rest, False


def path_of(uri: str) -> Path:
    """Return the path in a `file:` URI. Raises ConfigError."""
    return Path(split_path(uri.removeprefix("file:"))[0])


def _refusal(store: Store, name: str) -> str:
    return (
        f"{store.uri} is a disk image in the format {_NAMES.get(name, name)}: served as a raw disk, the device would "
        f"hold that format's own tables, and writing to it would destroy the image. {_way(store.path, name)}. "
        f"If it is a raw disk nevertheless, use {store.uri}{RAW}"
    )


def _way(path: str, name: str) -> str:
    """Return how to serve the disk inside an image."""
    server, added = ("--read-only ", "--read-only ") if name in _READ_ONLY else ("", "")
    return (
        f"To serve the disk in it: qemu-nbd --fork --persistent --shared=0 {server}--format={name} "
        f"--socket=/run/disk.sock {shlex.quote(path)}, then: vdusefast add NAME {added}"
        "--backend 'nbd+unix:///?socket=/run/disk.sock'"
    )


def _read(fd: int, offset_bytes: int, length_bytes: int) -> bytes:
    """Return the bytes there, fewer at the end of the store. Reads into memory that is aligned for O_DIRECT."""
    with mmap.mmap(-1, length_bytes) as memory:
        count = os.preadv(fd, [memory], offset_bytes)
        return memory[:count]
