"""Polling end to end: fio polls the driver's queue, the driver has one without interrupts, the worker never sleeps.

Counts the cost of a request beside its own work: interrupts, kicks, and system calls by strace.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import guest
from checks import check

QUEUES = 2  # the last one is the driver's for polling
FIO = ["fio", "--name=poll", "--thread", "--ioengine=io_uring", "--hipri=1", "--direct=1", "--bs=4k", "--iodepth=8"]
FIO += ["--rw=randrw", "--size=16M", "--time_based", "--runtime=1", "--output-format=json"]
REQUESTS_MIN = 500
CALLS_MAX = 3  # what a worker does when the tracer lets it go on, and an interrupt once in 65536 requests


@contextlib.contextmanager
def poll_queues() -> Iterator[None]:
    """Have the driver make a queue for polling meanwhile."""
    guest.sh("modprobe", "-r", "virtio_blk")
    guest.sh("modprobe", "virtio_blk", "poll_queues=1")
    try:
        yield
    finally:
        guest.sh("modprobe", "-r", "virtio_blk")
        guest.sh("modprobe", "virtio_blk")


@contextlib.contextmanager
def traced(pid: int) -> Iterator[dict[str, int]]:
    """Count the system calls of a process meanwhile; at the end the given dictionary has them by name."""
    found: dict[str, int] = {}
    table = guest.WORK / "strace"
    words = ["strace", "-c", "-U", "name,calls", "-o", str(table), "-p", str(pid)]
    tracer = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        guest.wait_for("strace", lambda: _tracer_of(pid) == tracer.pid or tracer.poll() is not None)
        assert tracer.poll() is None, f"strace has ended: {tracer.communicate()[1]}"
        yield found
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)
    finally:
        tracer.kill()
        tracer.communicate()
    rows = re.findall(r"^\s*(\w+)\s+(\d+)\s*$", table.read_text(), re.MULTILINE)
    found.update((name, int(calls)) for name, calls in rows if name != "total")


def _tracer_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"TracerPid:\s+(\d+)", status)[1])  # type: ignore[index]


def load(node: str) -> int:
    """Poll the device for a second; returns how many requests fio has made."""
    text = guest.sh(*FIO, f"--filename={node}", timeout_s=60)
    job = json.loads(text[text.index("{") :])["jobs"][0]
    assert job["error"] == 0, text
    return int(job["read"]["total_ios"]) + int(job["write"]["total_ios"])


def counters(name: str) -> dict[str, int]:
    """Return what the queue for polling has counted."""
    return dict(guest.call(name, "stats")["queues"][QUEUES - 1])  # type: ignore[index]


@check(limit_s=90)
def no_interrupt_no_kick_no_system_call() -> dict[str, object]:
    polls = ['poll = "adaptive"'] * (QUEUES - 1) + ['poll = "always"']
    with poll_queues(), guest.device("vd0", "memory:16M", queues=QUEUES, queue=polls) as node:
        assert guest.read_int(guest.sysfs_of("vd0") / "queue" / "io_poll") == 1, "the driver has no queue for polling"
        load(node)  # maps what the worker has not seen yet
        worker = int(guest.info("vd0")["queues"][QUEUES - 1]["pid"])  # type: ignore[index]
        before = counters("vd0")
        with traced(worker) as calls:
            made = load(node)
        after = counters("vd0")
    grown = {name: after[name] - before[name] for name in ("requests", "kicks", "irqs", "sleeps", "iotlb_misses")}
    said = {"fio": made, **grown, "calls": calls}
    assert made >= REQUESTS_MIN, said
    assert grown["requests"] >= made, f"not all by the queue for polling: {said}"
    assert (grown["kicks"], grown["sleeps"]) == (0, 0), said
    assert grown["irqs"] <= 1 + grown["requests"] // 65536, said
    assert sum(calls.values()) <= CALLS_MAX, said
    return said


@check(limit_s=60)
def the_count_is_of_system_calls() -> dict[str, object]:
    """A worker that sleeps makes some for each request, which the same count shows."""
    with guest.device("vd0", "memory:16M", queue='poll = "never"') as node:
        worker = int(guest.info("vd0")["queues"][0]["pid"])  # type: ignore[index]
        with traced(worker) as calls:
            guest.sh("dd", f"if={node}", "of=/dev/null", "bs=4k", "count=100", "iflag=direct")
    assert sum(calls.values()) >= 100, calls
    return dict(calls)
