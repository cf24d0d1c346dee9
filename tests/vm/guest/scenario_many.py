"""Made and removed many times on each kernel: what the machine has, and a process that does it, is as before."""

from __future__ import annotations

import os
import time
from pathlib import Path

import guest
import psutil
from checks import check, times
from guest import MIB

BY_COMMAND = times(2, 3)
BY_API = times(11, 47)


def held() -> dict[str, object]:
    """Return what this process holds: descriptors, mappings, threads, children."""
    mappings = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": sorted(os.listdir("/proc/self/fd"), key=int),
        "shared mappings": sorted(line.split(maxsplit=5)[-1] for line in mappings if line.split()[1].endswith("s")),
        "threads": len(os.listdir("/proc/self/task")),
        "children": [child.pid for child in psutil.Process().children(recursive=True)],
    }


def kernel_objects() -> int:
    """Return how many devices sysfs knows of in every place where one of ours has something."""
    return sum(
        1
        for path in ("/sys/class/vduse", "/sys/bus/vdpa/devices", "/sys/bus/virtio/devices", "/sys/block")
        for _ in os.scandir(path)
    )


@check(limit_s=180)
def by_command() -> dict[str, float]:
    before, started_s = guest.Resources.now(), time.monotonic()
    path = guest.image("many.img", 16 * MIB)
    for turn in range(BY_COMMAND):
        with guest.device("vd0", f"file:{path}", queues=1 + turn % 2, by_command=True) as node:
            fd = os.open(node, os.O_RDONLY | os.O_DIRECT)
            os.close(fd)
    guest.wait_for("all to be as before", lambda: not guest.Resources.now().beyond(before))
    return {"each_s": round((time.monotonic() - started_s) / BY_COMMAND, 2)}


@check(limit_s=300)
def by_the_api() -> dict[str, float]:
    """In one process, whose own descriptors, mappings, threads and children must come back too."""
    from vdusefast.api import Device
    from vdusefast.config import make_config

    def once(turn: int) -> None:
        config = make_config(
            name=f"vd{turn % 3}", uri="memory:16M", transport="kernel", bus="vhost" if turn % 8 == 7 else "virtio",
        )  # fmt: skip
        with Device(config, run_dir=guest.RUN_BASE) as device:
            if turn % 8 != 7:
                with open(device.node, "rb", buffering=0) as disk:
                    assert disk.read(512) == bytes(512)

    once(0)  # imports and caches
    once(7)
    guest.wait_for("threads to end", lambda: len(os.listdir("/proc/self/task")) == 1)
    before, machine = held(), (guest.Resources.now(), kernel_objects())
    started_s = time.monotonic()
    for turn in range(BY_API):
        once(turn)
    took_s = time.monotonic() - started_s
    deadline = time.monotonic() + 5
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    after = held()
    assert after == before, {what: (before[what], after[what]) for what in before if before[what] != after[what]}
    assert guest.Resources.now().beyond(machine[0]) == []
    assert kernel_objects() == machine[1]
    return {"each_s": round(took_s / BY_API, 2)}
