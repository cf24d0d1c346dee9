"""Which CPUs workers and interrupts may go to now: CPUs are taken offline, and cpusets shrink, while a device serves.

A worker whose CPU is gone serves on the other CPUs, and is pinned again when its own is back. The supervisor checks
about once a second, by two reads of what the kernel keeps for this process; workers pay nothing.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from vdusefast.host import sysfs


class Cpus(NamedTuple):
    """allowed: those that this process, and so its workers, may run on; they are online. online: of the machine."""

    allowed: frozenset[int]
    online: frozenset[int]


def read_cpus() -> Cpus:
    """Return the CPUs that there are now. Where sysfs is hidden, only those that are allowed are known to be online."""
    allowed = frozenset(os.sched_getaffinity(0))
    try:
        return Cpus(allowed, frozenset(sysfs.online_cpus()))
    except (OSError, ValueError):
        return Cpus(allowed, allowed)


class CpuWatch:
    """The CPUs at the last look."""

    def __init__(self) -> None:
        self.cpus = read_cpus()

    def look(self) -> bool:
        """Return whether there are other CPUs than at the last look."""
        before, self.cpus = self.cpus, read_cpus()
        return before != self.cpus
