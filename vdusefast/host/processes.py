"""The machine's processes as /proc shows them: their names, their namespaces, and whether all can be seen from here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
# linux/proc_ns.h: the number of the first PID namespace, whose processes are all that there are.
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
_PF_EXITING = 0x4  # linux/sched.h


def sees_all(root: Path = ROOT) -> bool:
    """Return whether /proc shows every process of the machine, rather than those of one PID namespace.

    A process in a PID namespace of its own may have the machine's /proc: then process 1 is the machine's.
    """
    return _FIRST_PID_NAMESPACE in (_link(root / "proc/self/ns/pid"), _link(root / "proc/1/ns/pid"))


def is_in_first_namespace(pid: int, root: Path = ROOT) -> bool:
    """Return whether a process, by its number in our own PID namespace, sees every process of the machine."""
    return pid > 0 and _link(root / f"proc/{pid}/ns/pid") == _FIRST_PID_NAMESPACE


def list_processes(root: Path = ROOT) -> Iterator[Path]:
    """Return the directories of all processes in /proc."""
    for entry in os.listdir(root / "proc"):
        if entry.isdecimal():
            yield root / "proc" / entry


def command(process: Path) -> str:
    """Return "pid N (command)" for a directory of /proc."""
    name = read(process / "comm").strip()
    return f"pid {process.name} ({name})" if name else f"pid {process.name}"


def parent_pid(process: Path) -> int:
    """Return the parent of a process, 0 where it has ended."""
    fields = read(process / "stat").rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def is_ending(pid: int, root: Path = ROOT) -> bool:
    """Return whether a process that we may see has ended, is just ending, or has a SIGKILL that waits for it.

    False for 0, which stands for a process that we do not know.
    """
    if pid <= 0:
        return False
    process = root / f"proc/{pid}"
    fields = read(process / "stat").rpartition(")")[2].split()
    if not fields:  # it has gone, or /proc hides it
        return not _exists(pid)
    killed = any(
        int(mask, 16) >> (signal.SIGKILL - 1) & 1
        for name, _, mask in (line.partition(":") for line in read(process / "status").splitlines())
        if name in ("SigPnd", "ShdPnd")
    )
    return killed or fields[0] in "ZX" or bool(int(fields[6]) & _PF_EXITING)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def mount_namespace(process: Path) -> str:
    """Return which mount namespace a process is in; its pid where that is hidden."""
    return _link(process / "ns/mnt") or process.name


def read(path: Path) -> str:
    """Return a file's text, "" when the process or device is gone or hides it."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
