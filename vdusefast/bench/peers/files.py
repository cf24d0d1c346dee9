"""Where the peers' files are made."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vdusefast.bench.common.tables import bytes_text
from vdusefast.errors import ConfigError

SHM = Path("/dev/shm")  # noqa: S108 (a directory of our own is made there)
ROOM = 1.1  # of a file system, as a multiple of what the files take


@contextmanager
def backing_directory(parent: Path | None, size_bytes: int, file_count: int) -> Iterator[Path]:
    """Yield a directory for the peers' files, removed with all that is in it.

    parent: where it is made; None = on a tmpfs. Raises ConfigError without room.
    """
    needed = int(file_count * size_bytes * ROOM)
    if parent is None:
        candidates = [SHM, Path(tempfile.gettempdir())]
        fitting = [path for path in candidates if file_system(path) == "tmpfs" and _room_bytes(path) >= needed]
        if not fitting:
            raise ConfigError(
                f"no tmpfs has {bytes_text(needed)} free for the peers' files; give --backing DIR or --size"
            )
        parent = fitting[0]
    if not parent.is_dir():
        raise ConfigError(f"--backing {parent}: no such directory; the peers' files are made in it")
    if _room_bytes(parent) < needed:
        raise ConfigError(f"--backing {parent}: less than {bytes_text(needed)} free for the peers' files; see --size")
    with tempfile.TemporaryDirectory(prefix="vdusefast-peers-", dir=parent) as directory:
        yield Path(directory)


def file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, "" when the kernel does not show it."""
    place, kind = Path("/"), ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, point, name, *_rest = line.split()
        here = Path(point.replace("\\040", " "))
        if path.resolve().is_relative_to(here) and len(here.parts) >= len(place.parts):
            place, kind = here, name
    return kind


def _room_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0
