"""Prepare a server for memory reclaim of this machine, which may wait for it; and report whether it is prepared.

When memory is short, the kernel writes dirty pages and swap to disks, and one of these disks may be ours. Its pages are
clean only once the server and its workers have answered, so none of these may wait for clean pages in turn:

- PR_SET_IO_FLUSHER: the kernel does not throttle the process for dirty pages of other disks, nor do its allocations
  start I/O. Without it buffered writes to a disk over a file crawl, because the worker is throttled for the very pages
  that it is to clean. Threads and children inherit it.
- Locked memory: a page that was used once need not be read from a disk again to answer a request or kernel message.
- oom_score_adj: the OOM killer takes the process last.

A relay does the same. So does a worker, by csrc/base/reclaim.c, which costs it no import; it leaves the store's bytes
and the driver's memory alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

PR_SET_IO_FLUSHER = 57  # linux/prctl.h
PR_GET_IO_FLUSHER = 58
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4  # asm-generic/mman.h
CAP_IPC_LOCK = 14  # linux/capability.h
PF_IO_FLUSHER = 0x00080000 | 0x00100000  # linux/sched.h: PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE
OOM_SCORE_ADJ = -900  # -1000 would exempt it: then a leak in somebody's class kills everything else

REMEDY = "needs CAP_SYS_RESOURCE and CAP_IPC_LOCK, or LimitMEMLOCK=infinity for the second"


class Protection(NamedTuple):
    """The kernel's settings of a process."""

    io_flusher: bool
    locked_bytes: int


def mark_io_flusher() -> None:
    """Mark the calling thread, and all that it will start. Raises OSError."""
    _check(_libc().prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0))


def can_mark_io_flusher() -> bool:
    """Return whether this process may call `mark_io_flusher`; asking needs the same right."""
    return bool(_libc().prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) >= 0)


def lock_memory() -> None:
    """Lock the current mappings: pages in use, and others as they are used. Raises OSError.

    Unused pages are not allocated: libraries map far more than they use.
    """
    _raise_limit()
    _check(_libc().mlockall(MCL_CURRENT | MCL_ONFAULT))


def lock_used_memory() -> None:
    """Lock current and later mappings, each page as it is used. Raises OSError."""
    _check(_libc().mlockall(MCL_CURRENT | MCL_ONFAULT | (MCL_FUTURE if _is_unlimited() else 0)))


def spare_from_oom() -> None:
    """Ask the OOM killer to take this process last, if that is allowed; the unit of a service asks for the same."""
    path = Path("/proc/self/oom_score_adj")
    try:
        if int(path.read_text()) > OOM_SCORE_ADJ:
            path.write_text(str(OOM_SCORE_ADJ))
    except OSError:
        return  # best effort; `describe` has the reason: the same right is missing


def begin() -> list[str]:
    """Prepare this process before it has threads. Returns a sentence for each step that is refused."""
    spare_from_oom()
    return _try({"cannot be marked as I/O flusher": mark_io_flusher, "cannot lock its memory": lock_memory})


def complete() -> list[str]:
    """Lock mappings made since `begin`, and later ones. Returns a sentence if that is refused."""
    return _try({"cannot keep its memory locked": lock_used_memory})


def look(pid: int) -> Protection | None:
    """Return the kernel's settings of a process, None when it is gone."""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, IndexError):
        return None
    locked = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmLck:")), 0)
    return Protection(flags & PF_IO_FLUSHER == PF_IO_FLUSHER, locked)


def describe(pids: Iterable[int]) -> str:
    """Return the line of `show` about the processes of a device."""
    seen = {pid: protection for pid in pids if pid > 0 and (protection := look(pid)) is not None}
    unmarked = [str(pid) for pid, protection in seen.items() if not protection.io_flusher]
    unlocked = [str(pid) for pid, protection in seen.items() if not protection.locked_bytes]
    locked_mib = sum(protection.locked_bytes for protection in seen.values()) >> 20
    parts = []
    if unmarked:
        parts.append(f"pid {', '.join(unmarked)} is no I/O flusher (needs CAP_SYS_RESOURCE): buffered writes crawl")
    if unlocked:
        parts.append(f"memory of pid {', '.join(unlocked)} is not locked (needs CAP_IPC_LOCK or LimitMEMLOCK=infinity)")
    return "; ".join(parts) or f"I/O flushers, {locked_mib} MiB locked"


def _try(steps: dict[str, Callable[[], None]]) -> list[str]:
    refused = []
    for what, step in steps.items():
        try:
            step()
        except OSError as error:
            refused.append(f"{what}: {error.strerror}")
    return refused


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        why = "this kernel does not have it" if code == errno.EINVAL else os.strerror(code)
        raise OSError(code, why)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _raise_limit() -> None:
    """Raise RLIMIT_MEMLOCK as far as we may; if that is not enough, the lock is refused."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    for limits in ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)
        except (OSError, ValueError):
            continue
        return


def _is_unlimited() -> bool:
    """Return whether RLIMIT_MEMLOCK cannot refuse us memory that is mapped later."""
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(effective >> CAP_IPC_LOCK & 1)
