"""The comparisons of bench/README.md: run side by side, interleaved, medians with their spread, as a Markdown table.

    python bench/speed.py [--repeats 5] [--seconds 3] [--only null,tmpfs,disk,idle] [--worker-cpu N] [--disk-dir DIR]

One worker on the first CPU, the driver on the second, as the two processes of the bare ring exchange. Each round runs
every contestant once, so that a change of the machine's mood meets all of them. fio runs on the worker's CPU alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MICRO = ROOT / "build" / "bench"
FILE_BYTES = 512 << 20
IODEPTH = 32
IDLE_S = 5.0


@dataclass
class Setup:
    """What all measurements share."""

    seconds: float
    repeats: int
    worker_cpu: int
    driver_cpu: int
    tmpfs_file: Path
    disk_file: Path


@dataclass
class Row:
    """A line of the table: a figure and what it is compared with, by name of the measurement."""

    what: str
    figure: str
    reference: str
    floor: float
    moonshot: float | None = None


Measure = Callable[[Setup], float]


def _json(words: list[str]) -> Any:
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    start = done.stdout.find("{")
    if done.returncode or start < 0:
        sys.exit(f"{' '.join(words)}: status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return json.loads(done.stdout[start:])


def vdusefast(setup: Setup, backend: str, *options: str) -> float:
    """Return IOPS of our device under 4 KiB random reads, one queue."""
    words = [sys.executable, "-m", "vdusefast.bench", "fio", "--name=speed", "--rw=randread", "--bs=4k"]
    words += ["--transport=loopback"]
    words += [f"--iodepth={IODEPTH}", "--time_based", f"--runtime={setup.seconds:g}", "--ramp_time=500ms"]
    words += [f"--cpus={setup.worker_cpu}", f"--driver-cpus={setup.driver_cpu}", f"--backend={backend}"]
    report = _json([*words, "--output-format=json", *options])
    return float(report["jobs"][0]["read"]["iops"])


def fio(setup: Setup, engine: str, path: Path, *, direct: bool) -> float:
    """Return IOPS of the real fio for the same job on the worker's CPU."""
    words = ["fio", "--name=speed", "--rw=randread", "--bs=4k", f"--iodepth={IODEPTH}", "--time_based"]
    words += [f"--runtime={setup.seconds:g}", "--ramp_time=0.5", f"--filename={path}", f"--size={FILE_BYTES}"]
    words += [f"--ioengine={engine}", f"--direct={int(direct)}", f"--cpus_allowed={setup.worker_cpu}"]
    return float(_json([*words, "--output-format=json"])["jobs"][0]["read"]["iops"])


def ring_exchange(setup: Setup) -> float:
    """Return the bare ring exchange in requests a second."""
    cpus = ["-c", str(setup.driver_cpu), "-C", str(setup.worker_cpu)]
    return float(_json([str(MICRO / "ring_exchange"), "-t", f"{setup.seconds:g}", "-d", str(IODEPTH), *cpus])["iops"])


def read_loop(setup: Setup) -> float:
    """Return the bare read loop in reads a second."""
    words = [str(MICRO / "read_loop"), "-t", f"{setup.seconds:g}", "-c", str(setup.worker_cpu), str(setup.tmpfs_file)]
    return float(_json(words)["iops"])


GROUPS: dict[str, dict[str, Measure]] = {
    "null": {
        "bare ring exchange": ring_exchange,
        "null": lambda s: vdusefast(s, "null:16G"),
    },
    "tmpfs": {
        "bare read loop": read_loop,
        "fio psync, tmpfs": lambda s: fio(s, "psync", s.tmpfs_file, direct=False),
        "fio io_uring, tmpfs": lambda s: fio(s, "io_uring", s.tmpfs_file, direct=False),
        "file on tmpfs, sync": lambda s: vdusefast(s, f"file:{s.tmpfs_file}", "--engine=sync"),
        "file on tmpfs, uring": lambda s: vdusefast(s, f"file:{s.tmpfs_file}", "--engine=uring"),
    },
    "disk": {
        "fio io_uring, disk": lambda s: fio(s, "io_uring", s.disk_file, direct=True),
        "file on disk, uring, O_DIRECT": lambda s: vdusefast(
            s, f"file:{s.disk_file}", "--engine=uring", "--cache=none"
        ),
    },
}
ROWS = {
    "null": [Row("null backend / bare ring exchange", "null", "bare ring exchange", 0.5, 0.7)],
    "tmpfs": [
        Row("tmpfs, sync / bare read loop", "file on tmpfs, sync", "bare read loop", 0.7, 0.85),
        Row("tmpfs, sync / fio psync", "file on tmpfs, sync", "fio psync, tmpfs", 1.3),
        Row("tmpfs, sync / fio io_uring", "file on tmpfs, sync", "fio io_uring, tmpfs", 1.0),
        Row("tmpfs, uring / fio io_uring", "file on tmpfs, uring", "fio io_uring, tmpfs", 1.0),
    ],
    "disk": [
        Row("disk, O_DIRECT, uring / fio io_uring", "file on disk, uring, O_DIRECT", "fio io_uring, disk", 0.95, 1.0)
    ],
}


def measure_idle(setup: Setup) -> dict[str, list[float]]:
    """Return, per repetition: start of a device with 2 queues, and its workers' CPU share and resident memory."""
    import psutil

    from vdusefast.api import Device
    from vdusefast.config import make_config

    out: dict[str, list[float]] = defaultdict(list)
    for number in range(setup.repeats):
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


def spread(values: list[float]) -> str:
    """Return half the range as a percentage of the median."""
    middle = statistics.median(values)
    return f"{50 * (max(values) - min(values)) / middle:.0f} %" if middle else "-"


def print_tables(figures: dict[str, list[float]], rows: list[Row]) -> None:
    """Print medians, then ratios of medians."""
    print("| measurement | median | spread | runs |\n|---|---:|---:|---|")
    for name, values in figures.items():
        runs = ", ".join(f"{value / 1000:.0f}k" for value in values)
        print(f"| {name} | {statistics.median(values) / 1000:.0f}k IOPS | {spread(values)} | {runs} |")
    print("\n| ratio | measured | spread | wanted | moonshot |\n|---|---:|---:|---:|---:|")
    for row in rows:
        # Each round's ratio, then their median: what slows the machine for a while slows both sides of one ratio.
        ratios = [a / b for a, b in zip(figures[row.figure], figures[row.reference], strict=True)]
        goal = f"{row.moonshot:.2f}" if row.moonshot else ""
        print(f"| {row.what} | {statistics.median(ratios):.2f} | {spread(ratios)} | {row.floor:.2f} | {goal} |")
    print()


def print_idle(figures: dict[str, list[float]]) -> None:
    """Print what a device costs that does nothing."""
    print("| idle device | median | spread |\n|---|---:|---:|")
    for name, values in figures.items():
        print(f"| {name} | {statistics.median(values):.3g} | {spread(values)} |")


def make_file(path: Path) -> None:
    """Write a file of random bytes, so that no hole and no compression flatters anybody."""
    chunk = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(FILE_BYTES >> 20):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def run_group(setup: Setup, measures: dict[str, Measure]) -> dict[str, list[float]]:
    """Run every measure once a round."""
    figures: dict[str, list[float]] = defaultdict(list)
    for number in range(setup.repeats):
        for name, measure in measures.items():
            figures[name].append(measure(setup))
            print(f"round {number + 1}: {name}: {figures[name][-1]:.0f}", file=sys.stderr, flush=True)
    return figures


def main() -> None:
    """Parse options, make the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default="null,tmpfs,disk,idle", help="groups, separated by commas")
    parser.add_argument("--worker-cpu", type=int, help="of the worker and of fio; the first CPU by default")
    parser.add_argument("--disk-dir", type=Path, default=Path(tempfile.gettempdir()), help="on a disk, with O_DIRECT")
    parser.add_argument("--tmpfs-dir", type=Path, default=Path("/dev/shm"))  # noqa: S108 -- a tmpfs is what is meant
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        sys.exit("speed.py needs two CPUs: one for the worker, one for the driver")
    if shutil.which("fio") is None:
        sys.exit("speed.py needs fio: sudo apt-get install fio")
    subprocess.run(["make", "-s", "-C", str(ROOT / "bench" / "micro")], check=True)
    sys.path.insert(0, str(ROOT))
    with (
        tempfile.TemporaryDirectory(prefix="vdusefast-speed-", dir=options.tmpfs_dir) as tmpfs,
        tempfile.TemporaryDirectory(prefix="vdusefast-speed-", dir=options.disk_dir) as disk,
    ):
        paths = Path(tmpfs) / "speed.img", Path(disk) / "speed.img"
        worker_cpu = cpus[0] if options.worker_cpu is None else options.worker_cpu
        driver_cpu = next(cpu for cpu in cpus if cpu != worker_cpu)
        setup = Setup(options.seconds, options.repeats, worker_cpu, driver_cpu, *paths)
        for path in paths:
            make_file(path)
        for group in options.only.split(","):
            if group == "idle":
                print_idle(measure_idle(setup))
            else:
                print_tables(run_group(setup, GROUPS[group]), ROWS[group])


if __name__ == "__main__":
    main()
