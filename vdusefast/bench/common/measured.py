"""The counters of a device under load, and the CPU time of its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vdusefast.base.json_types import Json
from vdusefast.bench.common.host import host

if TYPE_CHECKING:
    from vdusefast.api import Device
    from vdusefast.config import Config
    from vdusefast.control.stats import DeviceStats

COUNTERS = ("requests", "bytes_read", "bytes_written", "errors", "kicks", "irqs", "batches")


def cpu_seconds(device: Device) -> dict[int, float]:
    """Return the CPU time that each worker has used, by pid."""
    import psutil

    out = {}
    for queue in device.queues():
        try:
            times = psutil.Process(queue.pid).cpu_times()
            out[queue.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue  # the device's failure names it
    return out


def queue_figures(
    stats: DeviceStats,
    used_before_s: Mapping[int, float],
    used_after_s: Mapping[int, float],
    passed_s: float,
    counted_before: DeviceStats | None = None,
) -> list[Json]:
    """Return an object for each queue: worker, CPU use, counters since `counted_before` (None: since the start)."""
    queues = []
    for place, now in enumerate(stats.queues):
        used_s = used_after_s.get(now.pid, 0.0) - used_before_s.get(now.pid, 0.0)
        before = counted_before.queues[place] if counted_before is not None else None
        queue: Json = {"index": now.index, "pid": now.pid, "cpu": now.cpu}
        queue["cpu_percent"] = 100 * used_s / passed_s if passed_s else 0.0
        for name in COUNTERS:
            queue[name] = getattr(now, name) - (getattr(before, name) if before is not None else 0)
        queues.append(queue)
    return queues


def device_member(
    config: Config, transport: str, *, engine_used: str, queues: Sequence[Json], stopped_by: str, **more: object
) -> Json:
    """Return the object `vdusefast` of a JSON report: the device, `more`, its queues, and the signal that ended it."""
    return {
        "transport": transport,
        "backend": config.backend.uri,
        "cache": config.backend.cache,
        "engine": config.backend.engine,
        "engine_used": engine_used,
        "queue_size": config.device.effective_queue_size,
        "host": host(),
        **more,
        "queues": queues,
        "stopped_by": stopped_by,
    }


def queue_lines(device: Device) -> list[str]:
    """Return a line for each queue: which process serves it, and where."""
    return [
        f"  queue {queue.index}: worker process {queue.pid}, "
        + (f"pinned to CPU {queue.cpu}" if queue.cpu >= 0 else "on any CPU")
        for queue in device.queues()
    ]
