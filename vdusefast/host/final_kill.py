"""Let our processes survive the last kill of a shutdown, as file systems on their devices are unmounted after it.

systemd-shutdown kills everything but processes of root whose first argument begins with "@", which serve storage.
Source: systemd, docs/ROOT_STORAGE_DAEMONS.md and src/shared/killall.c. Workers import this: it imports little.
"""

from __future__ import annotations

import os

MARK = b"@"
_ARG_START_FIELD = 48  # of /proc/PID/stat; proc(5)
_FIRST_FIELD = 3  # of those after the name, which may hold anything


def survive() -> None:
    """Mark this process as one that serves storage.

    The argument is changed in place, because an interpreter finds its files by the argument that it is started with.
    Without the right to do so, the process ends a moment before the machine does, as any other.
    """
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    try:
        fd = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.pwrite(fd, MARK, int(fields[_ARG_START_FIELD - _FIRST_FIELD]))
    except OSError:
        return
    finally:
        os.close(fd)


def survive_with(pid: int) -> None:
    """Mark this process if the process `pid`, for which it works, is marked."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            marked = file.read(len(MARK)) == MARK
    except OSError:
        return  # it has ended, and so will this one
    if marked:
        survive()
