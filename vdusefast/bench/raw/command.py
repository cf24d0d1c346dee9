"""`python -m vdusefast.bench fio`: from options to a device, its load, and a report."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vdusefast.api import Device
from vdusefast.backends import keeps_data
from vdusefast.base.columns import terminal_width, wrap
from vdusefast.base.json_types import Json
from vdusefast.base.kinds import TransportKind
from vdusefast.bench.common.device_options import build_config, check_driver_cpus, driver_cpus, store_uri
from vdusefast.bench.common.host import host
from vdusefast.bench.common.measured import cpu_seconds, queue_figures, queue_lines
from vdusefast.bench.common.real_fio import find_fio
from vdusefast.bench.common.store import BenchStore, StoppedError
from vdusefast.bench.common.tables import bytes_text
from vdusefast.bench.common.transport import choose_transport
from vdusefast.bench.raw import figures
from vdusefast.bench.raw.baseline import NULL_ENGINE, run_baseline
from vdusefast.bench.raw.jobs import JobSpec, Plan, RunOptions
from vdusefast.bench.raw.measured import Outcome, job_lines
from vdusefast.bench.raw.plan import place_jobs, required_bytes
from vdusefast.bench.raw.report import INTRODUCTION, ProgressLine, print_report
from vdusefast.bench.raw.run import Control, JobRun, run_group
from vdusefast.config import Config
from vdusefast.errors import BackendError, ConfigError, VdusefastError
from vdusefast.server.signals import StopSignals
from vdusefast.transport import uapi

if TYPE_CHECKING:
    from vdusefast.driver.loopback_driver import LoopbackDriver


def run_plan(plan: Plan) -> int:
    """Carry out a plan, print its report, and return the exit status: 1 when a request or a verification failed.

    Raises VdusefastError for everything that keeps it from running.
    """
    run = plan.run
    transport, reason = choose_transport(run.transport)
    if run.baseline:
        find_fio("--baseline")
    if run.transport == TransportKind.LOOPBACK and (run.direct is not None or run.ioengine is not None):
        raise ConfigError("direct and ioengine are the real fio's, which loads devices of --transport=kernel only")
    quiet = run.output_format == "json" and run.output is None
    notes: TextIO = sys.stderr if quiet else sys.stdout

    def say(text: str) -> None:
        print(wrap(text, terminal_width(notes)), file=notes, flush=True)

    if run.explain:
        say(INTRODUCTION)
    say(f"transport: {transport} ({reason})")
    uri = store_uri(run)
    _check_run(run, uri, transport)
    with StopSignals() as signals:
        try:
            return _run_on_store(plan, uri, transport, say, signals)
        except StoppedError as error:
            say(str(error))
            return 0


def _check_run(run: RunOptions, uri: str | None, transport: str) -> None:
    """Refuse wrong options before anything is made. Raises ConfigError."""
    build_config(run, uri or "file:temporary", transport)
    check_driver_cpus(run)
    if uri is not None and not uri.startswith("file:") and set(run.baseline) - {NULL_ENGINE}:
        raise ConfigError(
            f"--baseline={','.join(run.baseline)} needs a file that fio can open: use --backend file:PATH"
        )
    directory = Path(run.output).absolute().parent if run.output is not None else None
    if directory is not None and not os.access(directory, os.W_OK):
        raise ConfigError(f"--output={run.output}: cannot write into {directory}")


def _run_on_store(plan: Plan, uri: str | None, transport: str, say: Any, signals: StopSignals) -> int:
    """Make the store, run, report. Raises StoppedError when a signal came before the device was there."""
    run = plan.run
    reads = any(job.kind in ("read", "mixed") for job in plan.jobs)
    started_s = time.time()
    late: VdusefastError | None = None
    size_bytes = required_bytes(plan.jobs)
    with BenchStore(uri, size_bytes, reads=reads, say=say, stopped=lambda: signals.requested) as store:
        config = build_config(run, store.uri, transport)
        outcome = _run_device(plan, config, say, signals)
        report = figures.fio_report(plan, outcome.runs, started_s, _extra(config, transport, outcome))
        try:
            if not outcome.stopped_by:
                _add_baselines(plan, config, store, report, say, signals)
        except VdusefastError as error:  # the measurements are reported all the same
            late = error
        _write(report, run)
    if late is None:
        late = outcome.failure
    if late is not None:
        raise late
    failed = any(r.results["request_errors"] or r.results["verify_errors"] for r in outcome.runs)
    return 1 if failed else 0


def _run_device(plan: Plan, config: Config, say: Any, signals: StopSignals) -> Outcome:
    outcome = Outcome()
    with Device(config) as device, device.driver() as driver:
        _describe(device, driver, config, plan, say)
        groups = place_jobs(plan.jobs, driver.capacity_bytes, driver.block_size_bytes)
        _check_abilities(plan.jobs, driver, keeps_data=keeps_data(config.backend.uri))
        worker_cpus = [q.cpu for q in config.queue if q.cpu is not None]
        cpus = driver_cpus(plan.run, worker_cpus, os.sched_getaffinity(0))
        before, begin = cpu_seconds(device), time.monotonic()
        trimmed: list[tuple[int, int]] = []
        with ProgressLine() as line:
            control = Control(lambda: signals.requested, lambda: device.failure, line.update)
            for group in groups:
                outcome.runs += run_group(
                    driver,
                    group,
                    cpus=cpus,
                    worker_cpus=worker_cpus,
                    moves_no_data=not keeps_data(config.backend.uri),
                    trimmed=trimmed,
                    control=control,
                )
                trimmed = _still_trimmed(trimmed, outcome.runs[-len(group) :])
                if signals.requested:
                    break
        passed, after = time.monotonic() - begin, cpu_seconds(device)
        outcome.queues = queue_figures(device.stats(), before, after, passed)
        outcome.engine_used = device.queues()[0].engine
        outcome.stopped_by = signals.received.name if signals.received is not None else ""
    outcome.failure = device.failure  # the drain at the end can fail, too
    return outcome


def _still_trimmed(before: list[tuple[int, int]], runs: Sequence[JobRun]) -> list[tuple[int, int]]:
    """Return the windows whose content is not known after `runs`: trimmed ones that no job has written since."""
    now = list(before)
    for run in runs:
        one = run.instance
        if one.spec.kind == "trim":
            now.append((one.offset, one.size))
        elif one.spec.kind == "write" and run.results["ops"]["write"]["bytes"] >= one.size and not one.spec.norandommap:
            now = [(at, size) for at, size in now if at < one.offset or at + size > one.offset + one.size]
    return now


def _check_abilities(jobs: Sequence[JobSpec], driver: LoopbackDriver, *, keeps_data: bool) -> None:
    """Refuse jobs that this device cannot serve, before anything runs."""
    config = driver.config
    for job in jobs:
        if job.verify != "none" and not keeps_data:
            raise ConfigError(f"job {job.name}: verify={job.verify}, but a null store keeps nothing")
        if job.writes and driver.has(uapi.VIRTIO_BLK_F_RO):
            raise ConfigError(f"job {job.name}: rw={job.rw}, but the device is read-only")
        if job.kind == "trim" and not driver.has(uapi.VIRTIO_BLK_F_DISCARD):
            raise ConfigError(f"job {job.name}: rw={job.rw}, but the store cannot discard")
        if job.kind == "trim" and job.bs > config.discard_max_sectors * 512:
            raise ConfigError(f"job {job.name}: bs {job.bs} is more than one discard may take")


def _describe(device: Device, driver: LoopbackDriver, config: Config, plan: Plan, say: Any) -> None:
    queues = device.queues()
    backend = config.backend
    say(
        f"device: {bytes_text(driver.capacity_bytes)} on {backend.uri}, cache {backend.cache}, "
        f"engine {queues[0].engine}, {len(queues)} queue(s) of {driver.queue_size}"
    )
    for line in [*queue_lines(device), *job_lines(plan.jobs, driver.capacity_bytes)]:
        say(line)


def _extra(config: Config, transport: str, outcome: Outcome) -> Json:
    return {
        "transport": transport,
        "backend": config.backend.uri,
        "cache": config.backend.cache,
        "engine": config.backend.engine,
        "engine_used": outcome.engine_used,
        "queue_size": config.device.effective_queue_size,
        "host": host(),
        "queues": outcome.queues,
        "verify": figures.verification(outcome.runs),
        "baseline": [],
        "stopped_by": outcome.stopped_by,
    }


def _add_baselines(plan: Plan, config: Config, store: BenchStore, report: Json, say: Any, signals: StopSignals) -> None:
    ours = sum(job[op]["iops"] for job in report["jobs"] for op in ("read", "write", "trim"))
    cpus = sorted({q.cpu for q in config.queue if q.cpu is not None})
    for engine in plan.run.baseline:
        say(f"baseline: the same job by fio, ioengine {engine}, CPU {','.join(map(str, cpus)) or 'any'}")
        try:
            direct = config.backend.cache == "none"
            result = run_baseline(
                engine, plan.jobs, store.path, cpus=cpus, direct=direct, ours_iops=ours, stop_fd=signals.fileno()
            )
        finally:
            say("")
        report["vdusefast"]["baseline"].append(result)


def _write(report: Json, run: RunOptions) -> None:
    """Print the report, or write it to the file of --output."""
    if run.output is None:
        _emit(report, run, sys.stdout)
        return
    try:
        with open(run.output, "w", encoding="utf-8") as stream:
            _emit(report, run, stream)
    except OSError as error:
        raise BackendError(f"{run.output}: cannot write the report: {error.strerror}") from None


def _emit(report: Json, run: RunOptions, stream: TextIO) -> None:
    if run.output_format == "json":
        json.dump(report, stream, indent=2)
        print(file=stream)
    else:
        print(file=stream)
        print_report(report, stream, explain=run.explain)
