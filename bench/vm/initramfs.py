"""The guest's initramfs: a cpio archive, made for each boot, since it also carries the command."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping

EXECUTABLE = stat.S_IFREG | 0o755
REGULAR = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755
CONSOLE = stat.S_IFCHR | 0o600


def archive(files: Mapping[str, bytes], executables: Iterable[str]) -> bytes:
    """Return a cpio archive ("newc") of files by path, without leading slash, with /dev/console and directories.

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    directories = sorted({path.rpartition("/")[0] for path in files if "/" in path} | {"dev"})
    runnable = set(executables)
    entries = [_entry(name, DIRECTORY, b"") for name in directories]
    entries.append(_entry("dev/console", CONSOLE, b"", device=(5, 1)))
    entries += [_entry(name, EXECUTABLE if name in runnable else REGULAR, data) for name, data in files.items()]
    return b"".join([*entries, _entry("TRAILER!!!", 0, b"")])


def _entry(name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0]
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
