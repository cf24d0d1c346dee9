"""A file system on a disk written in Python, over the kernel's own bounce pages, while its workers are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import guest
from checks import check
from guest import MIB
from scenario_filesystem import MOUNT, differences, fill, mounted

DISKS = Path(__file__).resolve().parents[3] / "examples" / "disks"
KILLS = 2


def kill_workers(node: str, count: int) -> None:
    """Kill the worker of the first queue, each time after the previous one has been replaced."""
    for _ in range(count):
        guest.wait_for("a worker", lambda: guest.info("vd0")["queues"][0]["pid"] > 0, 60)  # type: ignore[index]
        with contextlib.suppress(ProcessLookupError):
            os.kill(guest.info("vd0")["queues"][0]["pid"], signal.SIGKILL)  # type: ignore[index]
        # Both CPUs, and so both queues, have been served since.
        for cpu in (0, 1):
            words = ("taskset", "-c", cpu, "dd", f"if={node}", "of=/dev/null", "bs=4k", "count=4", "iflag=direct")
            guest.sh(*words, timeout_s=60)


def live_through(name: str) -> dict[str, object]:
    path = guest.image("python.img", 64 * MIB)
    MOUNT.mkdir(exist_ok=True)
    with guest.device("vd0", f"python:{DISKS}/ram_disk.py:{name}?path={path}&size=64M", queues=2) as node:
        guest.sh("mkfs.ext4", "-q", "-F", node, timeout_s=60)
        with mounted(node):
            files: dict[str, str] = {}
            writer = threading.Thread(target=lambda: files.update(fill(MOUNT, 16 * MIB)))
            writer.start()
            kill_workers(node, KILLS)
            writer.join()
        guest.sh("blockdev", "--flushbufs", node)
        with mounted(node):
            assert files
            assert differences(MOUNT, files) == []
        guest.sh("e2fsck", "-f", "-n", node, timeout_s=60)
        assert guest.call("vd0", "stats")["total"]["errors"] == 0  # type: ignore[index,call-overload]
    guest.sh("e2fsck", "-f", "-n", path, timeout_s=60)  # and without us
    return {"files": len(files)}


@check(limit_s=120)
def ext4_on_a_class_by_calls() -> dict[str, object]:
    return live_through("RamDisk")


@check(limit_s=120)
def ext4_on_a_class_by_batches() -> dict[str, object]:
    return live_through("BatchRamDisk")
