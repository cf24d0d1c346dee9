"""The processes that hold /dev/vduse/NAME open: its server, or remaining workers of one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vdusefast.host import processes


def text(path: str) -> str:
    """Return who holds a node of VDUSE open, as a phrase: the first process that can be seen, or that none can."""
    try:
        number = os.stat(path).st_rdev
    except OSError:
        return "a process"
    for process in processes.list_processes():
        if process.name != str(os.getpid()) and _holds(process, Path(path).name, number):
            return processes.command(process)
    return "a process that cannot be seen from here, such as one in a container,"


def _holds(process: Path, name: str, number: int) -> bool:
    try:
        entries = list((process / "fd").iterdir())
    except OSError:  # it has ended, or belongs to another user
        return False
    for entry in entries:
        try:
            # The name first: a look at a file on a network may wait for ever.
            if not os.readlink(entry).endswith(f"/{name}"):
                continue
            status = entry.stat()
        except OSError:
            continue
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == number:
            return True
    return False
