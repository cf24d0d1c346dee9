"""The work for one request, counted and not timed: instructions by callgrind, system calls by perf or strace.

The same load runs twice, each time on a new device, the second time with more requests. The difference of the two
counts is what the further requests took: start, end and all that happens once cancel out. The driver runs as it is, on
a CPU of its own. A worker under valgrind or strace is much slower, so the driver is always ahead and the worker does
not spin; the turns in which it found nothing are counted all the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rows.contestants import IODEPTH, ROOT, RowError, Setup, device_config
from vdusefast.api import Device
from vdusefast.backends import keeps_data
from vdusefast.bench.raw.jobs import parse_arguments
from vdusefast.bench.raw.plan import place_job
from vdusefast.bench.raw.run import Control, run_group
from vdusefast.config import Config
from vdusefast.control.stats import DeviceStats
from vdusefast.control.worker_process import default_command

BLOCK_BYTES = 4096
START_S = 120.0  # an interpreter under valgrind starts 50 times as slowly
FEW, MANY = 20_000, 120_000  # requests of the two runs; the blocks of both fit into the file
WARM_UP_S = 0.5
RELAX = "__builtin_ia32_pause"
PERF_EVENT = "raw_syscalls:sys_enter"


@dataclass(frozen=True)
class Instructions:
    """Of the worker, a request. idle_turns: rounds that found nothing; by_function: self cost, the largest first."""

    per_request: float
    idle_turns: float
    batch: float
    by_function: list[tuple[str, float]]


@dataclass(frozen=True)
class Calls:
    """System calls of the worker, a request, and how they were counted."""

    per_request: float
    batch: float
    how: str


def run_requests(setup: Setup, config: Config, count: int, command: list[str]) -> DeviceStats:
    """Serve `count` random reads by a worker that `command` runs, and return what it counted. Raises RowError."""
    device = Device(config, worker_command=command)
    device.start(START_S)
    try:
        with device.driver() as driver:
            _load(setup, device, driver, ["--norandommap", f"--size={count * BLOCK_BYTES}"], lambda: False)
            stats = device.stats()
    finally:
        device.stop(START_S)
    if device.failure is not None:
        raise RowError(str(device.failure))
    return stats


def _load(setup: Setup, device: Device, driver: object, arguments: list[str], stopped: Callable[[], bool]) -> None:
    fixed = ["--name=counted", "--rw=randread", f"--bs={BLOCK_BYTES}", f"--iodepth={IODEPTH}"]
    job = parse_arguments([*fixed, *arguments]).job
    group = place_job(job, driver.capacity_bytes, driver.block_size_bytes)  # type: ignore[attr-defined]
    run_group(
        driver,  # type: ignore[arg-type]
        group,
        cpus=[setup.driver_cpu],
        worker_cpus=[setup.worker_cpu],
        moves_no_data=not keeps_data(device.config.backend.uri),
        control=Control(stopped, lambda: device.failure, lambda _progress: None),
    )


def instructions(setup: Setup) -> Instructions:
    """Count the worker's instructions on the null store. Raises RowError."""
    if shutil.which("valgrind") is None:
        raise RowError("valgrind is not installed; type: sudo apt-get install valgrind")
    config = device_config(setup, "null:16G")
    with tempfile.TemporaryDirectory(prefix="vdusefast-callgrind-") as directory:
        runs: list[tuple[DeviceStats, Costs]] = []
        for count in (FEW, MANY):
            out = Path(directory) / f"{count}.out"
            arguments = ["valgrind", "--tool=callgrind", "-q", f"--callgrind-out-file={out}", "--compress-strings=no"]
            arguments += ["--compress-pos=no", "--dump-line=yes", "--", *default_command()]
            with _same_hashes():
                stats = run_requests(setup, config, count, arguments)
            runs.append((stats, parse_callgrind(out.read_text(errors="replace"))))
    return difference(runs[0], runs[1], relax_line())


@contextmanager
def _same_hashes() -> Iterator[None]:
    """Let Python's start take the same path each time."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before


Costs = Counter[tuple[str, str, int]]  # instructions by function, file and line


def parse_callgrind(text: str) -> Costs:
    """Return the self cost of each line of each function in callgrind's output (uncompressed names and positions)."""
    costs: Costs = Counter()
    function = file = ""
    skip = False
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and key in ("fl", "fi", "fe"):
            file = value
        elif equals and key == "fn":
            function = value
        elif equals and key == "calls":
            skip = True  # the next line has the cost of the called function, which is counted at its own place
        elif match := re.fullmatch(r"(\d+) (\d+)", line):
            if not skip:
                costs[function, file, int(match[1])] += int(match[2])
            skip = False
    return costs


def relax_line() -> int:
    """Return the line of barrier.h at which a turn that found nothing pauses. Raises RowError."""
    for number, line in enumerate((ROOT / "csrc" / "base" / "barrier.h").read_text().splitlines(), 1):
        if RELAX in line:
            return number
    raise RowError(f"csrc/base/barrier.h has no {RELAX}: idle turns cannot be told from work")


def difference(few: tuple[DeviceStats, Costs], many: tuple[DeviceStats, Costs], pause_line: int) -> Instructions:
    """Return what the further requests of the second run took, each. Raises RowError without any."""
    requests = many[0].requests - few[0].requests
    if requests <= 0:
        raise RowError("the longer run served no more requests than the shorter one")
    costs = many[1].copy()
    costs.subtract(few[1])
    by_function: Counter[str] = Counter()
    idle_turns = 0
    for (function, file, line), cost in costs.items():
        by_function[function] += cost
        if line == pause_line and file.endswith("barrier.h"):
            idle_turns += cost
    batches = many[0].batches - few[0].batches
    return Instructions(
        by_function.total() / requests,
        idle_turns / requests,
        requests / batches if batches else 0.0,
        [(name, cost / requests) for name, cost in by_function.most_common() if cost / requests >= 0.05],
    )


def system_calls(setup: Setup, backend: str, **changed: object) -> Calls:
    """Count the worker's system calls: by perf, which does not slow it down, else by strace. Raises RowError."""
    config = device_config(setup, backend, **changed)
    if perf_usable():
        return _by_perf(setup, config)
    if shutil.which("strace") is None:
        raise RowError(
            "neither perf may count system calls here nor is strace there; type: sudo apt-get install strace"
        )
    runs = []
    with tempfile.TemporaryDirectory(prefix="vdusefast-strace-") as directory:
        for count in (FEW, MANY):
            out = Path(directory) / f"{count}.out"
            # -D: the worker stays our child, and strace hangs on to it.
            stats = run_requests(setup, config, count, ["strace", "-D", "-c", "-o", str(out), *default_command()])
            runs.append((stats, _strace_total(out)))
    (few, few_calls), (many, many_calls) = runs
    requests = many.requests - few.requests
    batches = max(1, many.batches - few.batches)
    return Calls((many_calls - few_calls) / requests, requests / batches, "strace, which makes batches larger")


def _strace_total(path: Path) -> int:
    """Return the sum of strace's table, which it writes after the worker has ended. Raises RowError."""
    end = time.monotonic() + START_S
    while True:
        text = path.read_text() if path.exists() else ""
        if re.search(r"\btotal$", text, re.MULTILINE):
            # Share, seconds, microseconds a call, calls, errors if any, name.
            calls = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?(?!total)\w+$", text, re.MULTILINE)
            return sum(int(count) for count in calls)
        if time.monotonic() > end:
            raise RowError(f"strace left no sum: {text.strip() or 'nothing at all'}")
        time.sleep(0.05)


def perf_usable() -> bool:
    """Return whether perf is there and allowed to count system calls."""
    if shutil.which("perf") is None:
        return False
    arguments = ["perf", "stat", "-x,", "-e", PERF_EVENT, "true"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    return done.returncode == 0 and perf_count(done.stderr) is not None


def perf_count(text: str) -> int | None:
    """Return what `perf stat -x,` counted, None when it could not count."""
    for line in text.splitlines():
        fields = line.split(",")
        if len(fields) > 2 and fields[2] == PERF_EVENT and fields[0].isdigit():
            return int(fields[0])
    return None


def _by_perf(setup: Setup, config: Config) -> Calls:
    """Count for a while in the middle of a run: the rate of system calls over the rate of requests."""
    over = threading.Event()
    with Device(config) as device, device.driver() as driver:
        arguments = ["--time_based", f"--runtime={WARM_UP_S + setup.seconds + 60:g}"]
        load = threading.Thread(target=_load, args=(setup, device, driver, arguments, over.is_set))
        load.start()
        try:
            time.sleep(WARM_UP_S)
            (queue,) = device.queues()
            before, begin = device.stats(), time.monotonic()
            perf = [
                "perf",
                "stat",
                "-x,",
                "-e",
                PERF_EVENT,
                "-p",
                str(queue.pid),
                "--timeout",
                f"{setup.seconds * 1000:.0f}",
            ]
            done = subprocess.run(perf, capture_output=True, text=True, check=False)
            after, passed_s = device.stats(), time.monotonic() - begin
        finally:
            over.set()
            load.join()
    calls = perf_count(done.stderr)
    requests = after.requests - before.requests
    if calls is None or not requests:
        raise RowError(f"perf counted nothing, or the worker did nothing: {done.stderr.strip()}")
    batch = requests / max(1, after.batches - before.batches)
    return Calls(calls / setup.seconds / (requests / passed_s), batch, "perf")
