"""The CPU of a queue's worker: the one it belongs on, and the one it can be on now."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection

from vdusefast.control.worker_process import WorkerProcess
from vdusefast.host import cpu_topology

_log = logging.getLogger("vdusefast")


class WorkerCpu:
    """The CPU of one queue's worker, and of those that replace it."""

    def __init__(self, where: str, cpu: int):
        """Begin. where: what messages call the queue. cpu: where the worker belongs, -1 = on any CPU."""
        self.wanted = cpu
        self._where = where
        self._is_missing = False

    @property
    def missing(self) -> int:
        """The CPU that the worker belongs on and cannot be on now, -1 when there is none."""
        return self.wanted if self._is_missing else -1

    def choose(self, allowed: Collection[int]) -> int:
        """Return the CPU to pin the worker to when these are allowed, -1 = it is not pinned. Logs a change."""
        was_missing, cpu = self._is_missing, self.wanted if self.wanted in allowed else -1
        self._is_missing = cpu != self.wanted
        if self._is_missing and not was_missing:
            left = cpu_topology.format_cpu_list(allowed)
            _log.warning("%s: CPU %d is gone: its worker is not pinned, and runs on %s", self._where, self.wanted, left)
        elif was_missing and cpu >= 0:
            _log.warning("%s: CPU %d is back: its worker is pinned again", self._where, cpu)
        return cpu


def move(worker: WorkerProcess, cpu: int, allowed: Collection[int]) -> None:
    """Pin a living worker to `cpu`, or let it run on all that are `allowed` for -1. A refusal is logged."""
    try:
        os.sched_setaffinity(worker.pid, {cpu} if cpu >= 0 else allowed)
    except ProcessLookupError:
        return  # it has just died: the next one gets its CPU at its start
    except OSError as error:
        _log.warning("%s: stays on its CPU, as CPU %d is refused: %s", worker.title, cpu, error.strerror)
