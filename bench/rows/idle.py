"""The cost of an idle device, and the time that it takes to start."""

from __future__ import annotations

import os
import time
from collections import defaultdict

from rows.contestants import Setup

IDLE_S = 5.0


def measure_idle(setup: Setup, repeats: int) -> dict[str, list[float]]:
    """Return, per repetition: start of a device with 2 queues, and its workers' CPU share and resident memory."""
    import psutil

    from vdusefast.api import Device
    from vdusefast.config import make_config

    out: dict[str, list[float]] = defaultdict(list)
    for number in range(repeats):
        begin = time.monotonic()
        config = make_config(name=f"idle-{os.getpid()}-{number}", uri=f"file:{setup.disk_file}", queues=2)
        with Device(config) as device, device.driver() as driver:
            out["start, 2 queues (s)"].append(time.monotonic() - begin)
            for queue in range(2):
                driver.read(0, 1 << 20, queue=queue)
            workers = [psutil.Process(queue.pid) for queue in device.queues()]
            time.sleep(0.5)
            before = [sum(worker.cpu_times()[:2]) for worker in workers]
            time.sleep(IDLE_S)
            used = [sum(w.cpu_times()[:2]) - b for w, b in zip(workers, before, strict=True)]
            out["idle worker, CPU (%)"].append(100 * max(used) / IDLE_S)
            out["worker, resident (MiB)"].append(max(w.memory_info().rss for w in workers) / (1 << 20))
    return out
