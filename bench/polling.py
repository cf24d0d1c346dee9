"""Polling end to end: what a request costs beside its work when driver, device and fio all poll; counted, not timed.

    bench/vm/run --kernel 6.12 --module vduse --module virtio_vdpa --module 'virtio_blk poll_queues=1' -- \\
        python bench/polling.py [--set KEY=VALUE,...] [--runtime 2] [--json FILE]

A device in memory has two queues; the driver makes its last one a queue for polling (virtio_blk.poll_queues), which fio
uses by io_uring with --hipri. strace counts the system calls of that queue's worker, the worker itself kicks,
interrupts and sleeps. The row is reached when all of them together are fewer than one in a thousand requests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import msgspec  # noqa: E402 (needs the path set above)

from vdusefast.api import Device  # noqa: E402
from vdusefast.base.json_types import Json  # noqa: E402
from vdusefast.bench.peers.variants import parse_settings  # noqa: E402
from vdusefast.config import Config, QueueConfig, make_config, validate  # noqa: E402
from vdusefast.control.stats import QueueStats  # noqa: E402
from vdusefast.errors import VdusefastError  # noqa: E402

PARAMETER = Path("/sys/module/virtio_blk/parameters/poll_queues")
COUNTERS = ("requests", "kicks", "irqs", "sleeps")
QUEUES = 2  # the last one is the driver's for polling
DEVICE_BYTES = 64 << 20
ATTACH_S = 20.0
SHARE_MAX = 0.001  # of requests that take a kick, an interrupt or a system call


def device_config(settings: Json) -> Config:
    """Return a device in memory; the settings of a queue are for its last one. The other sleeps, and leaves its CPU."""
    mine = {key: value for key, value in settings.items() if key in QueueConfig.__struct_fields__}
    others = {key: value for key, value in settings.items() if key not in mine}
    fixed = {"name": f"polling-{os.getpid()}", "uri": f"memory:{DEVICE_BYTES}", "transport": "kernel", "queues": QUEUES}
    config = make_config(**(others | fixed))
    queues = [QueueConfig(poll_us=0) for _ in range(QUEUES - 1)] + [QueueConfig(**mine)]
    config = msgspec.structs.replace(config, queue=queues)
    validate(config)
    return config


def missing() -> str:
    """Return what keeps it from running here, with the remedy; "" when nothing does."""
    for tool in ("strace", "fio"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed; type: sudo apt-get install {tool}"
    if not PARAMETER.exists() or int(PARAMETER.read_text()) < 1:
        return "the driver has no queue for polling: modprobe -r virtio_blk; modprobe virtio_blk poll_queues=1"
    return ""


def load(node: str, iodepth: int, runtime_s: float) -> Json:
    """Poll the device by fio and return its report of the job. Raises VdusefastError."""
    arguments = [
        "fio",
        "--name=poll",
        "--thread",
        "--ioengine=io_uring",
        "--hipri=1",
        "--direct=1",
        "--rw=randread",
        "--bs=4k",
    ]
    arguments += [
        f"--iodepth={iodepth}",
        "--time_based",
        f"--runtime={runtime_s * 1000:.0f}ms",
        f"--size={DEVICE_BYTES}",
    ]
    arguments += ["--allow_file_create=0", f"--filename={node}", "--output-format=json"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=ATTACH_S + 10 * runtime_s + 60, check=False
    )
    start = done.stdout.find("{")
    if done.returncode or start < 0:
        raise VdusefastError(f"fio: status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    job: Json = json.loads(done.stdout[start:])["jobs"][0]
    return job


@contextmanager
def traced(pid: int, directory: Path) -> Iterator[dict[str, int]]:
    """Count the system calls of a process meanwhile; at the end the given dictionary has them by name."""
    found: dict[str, int] = {}
    table = directory / "strace"
    arguments = ["strace", "-c", "-U", "name,calls", "-o", str(table), "-p", str(pid)]
    tracer = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + ATTACH_S
        while _tracer_of(pid) != tracer.pid:
            if tracer.poll() is not None or time.monotonic() > end:
                tracer.kill()
                raise VdusefastError(f"strace does not attach to the worker: {tracer.communicate()[1].strip()}")
            time.sleep(0.05)
        yield found
        tracer.send_signal(signal.SIGINT)
        tracer.wait(ATTACH_S)
    finally:
        tracer.kill()
        tracer.communicate()
    found.update(parse_calls(table.read_text()))


def parse_calls(text: str) -> dict[str, int]:
    """Return the calls by name in a table of `strace -c -U name,calls`."""
    rows = re.findall(r"^\s*(\w+)\s+(\d+)\s*$", text, re.MULTILINE)
    return {name: int(calls) for name, calls in rows if name != "total"}


def _tracer_of(pid: int) -> int:
    match = re.search(r"TracerPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) if match else 0


def counted(queue: QueueStats) -> dict[str, int]:
    """Return the counters that the report has."""
    return {name: queue.counters[name] for name in COUNTERS}


def run(settings: Json, iodepth: int, runtime_s: float) -> Json:
    """Make the device, load and count, and return the figures. Raises VdusefastError."""
    with Device(device_config(settings)) as device, tempfile.TemporaryDirectory() as directory:
        load(device.node, iodepth, min(1.0, runtime_s))  # maps what the worker has not seen yet
        before = device.stats().queues[-1]
        with traced(before.pid, Path(directory)) as calls:
            job = load(device.node, iodepth, runtime_s)
        after = counted(device.stats().queues[-1])
    grown = {name: after[name] - count for name, count in counted(before).items()}
    return summary(grown, calls, int(job["read"]["total_ios"]), float(job["read"]["iops"]))


def summary(grown: dict[str, int], calls: dict[str, int], made: int, iops: float) -> Json:
    """Return the figures as one object. Raises VdusefastError when requests went by another queue."""
    requests = grown["requests"]
    if not requests or requests < made:
        raise VdusefastError(f"of {made} requests {requests} came by the queue for polling")
    total = sum(calls.values())
    share = (grown["kicks"] + grown["irqs"] + total) / requests
    figures = {"iops": iops, **grown, "system_calls": total, "calls": calls}
    return figures | {"share": share, "reached": share < SHARE_MAX}


def print_figures(figures: Json) -> None:
    """Print a Markdown table."""
    print("| polling end to end | count | a request |\n|---|---:|---:|")
    for name in (*COUNTERS, "system_calls"):
        print(f"| {name.replace('_', ' ')} | {figures[name]} | {figures[name] / figures['requests']:.6f} |")
    verdict = "reached" if figures["reached"] else "missed"
    print(
        f"\n{verdict}: {figures['share']:.6f} kicks, interrupts and system calls a request; {figures['iops']:.0f} IOPS"
    )


def main() -> int:
    """Parse options, measure, print; 1 when the row is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set", default="poll=always", metavar="KEY=VALUE,...", help="of the queue; default: %(default)s"
    )
    parser.add_argument("--iodepth", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--runtime", type=float, default=2.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if reason := missing():
        sys.exit(f"polling.py: {reason}")
    try:
        figures = run(parse_settings("--set", options.set), options.iodepth, options.runtime)
    except VdusefastError as error:
        sys.exit(f"polling.py: {error}")
    print_figures(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
