"""`python -m vdusefast.bench raw`: from options to a device, its load by the loopback driver, and a report."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vdusefast.api import Device
from vdusefast.backends import keeps_data
from vdusefast.base.columns import terminal_width, wrap
from vdusefast.base.json_types import Json
from vdusefast.base.kinds import TransportKind
from vdusefast.bench.common.device_options import KIND, build_config, check_driver_cpus, driver_cpus, store_uri
from vdusefast.bench.common.measured import cpu_seconds, device_member, queue_figures, queue_lines
from vdusefast.bench.common.store import BenchStore, StoppedError
from vdusefast.bench.common.tables import bytes_text
from vdusefast.bench.raw import figures
from vdusefast.bench.raw.jobs import JobSpec, Plan
from vdusefast.bench.raw.plan import place_job, required_bytes
from vdusefast.bench.raw.report import Outcome, ProgressLine, job_line, print_report
from vdusefast.bench.raw.run import Control, run_group
from vdusefast.config import Config
from vdusefast.errors import BackendError, ConfigError
from vdusefast.server.signals import StopSignals
from vdusefast.state.dead_runs import remove_dead
from vdusefast.transport import uapi

if TYPE_CHECKING:
    from vdusefast.driver.loopback_driver import LoopbackDriver


def run_plan(plan: Plan) -> int:
    """Carry out a plan, print its report, and return the exit status: 1 when a request or a verification failed.

    Raises VdusefastError for everything that keeps it from running.
    """
    notes: TextIO = sys.stderr if plan.output_format == "json" and plan.output is None else sys.stdout

    def say(text: str) -> None:
        print(wrap(text, terminal_width(notes)), file=notes, flush=True)

    uri = store_uri(plan.device)
    _check(plan, uri)
    with StopSignals() as signals:
        try:
            return _run_on_store(plan, uri, say, signals)
        except StoppedError as error:
            say(str(error))
            return 0


def _check(plan: Plan, uri: str | None) -> None:
    """Refuse wrong options before anything is made. Raises ConfigError."""
    if plan.device.transport == TransportKind.KERNEL:
        raise ConfigError("--transport=kernel: the loopback driver cannot load a device of the kernel; bench fio can")
    build_config(plan.device, uri or "file:temporary")
    check_driver_cpus(plan.device)
    directory = Path(plan.output).absolute().parent if plan.output is not None else None
    if directory is not None and not os.access(directory, os.W_OK):
        raise ConfigError(f"--output={plan.output}: cannot write into {directory}")


def _run_on_store(plan: Plan, uri: str | None, say: Any, signals: StopSignals) -> int:
    """Make the store, run, report. Raises StoppedError when a signal came before the device was there."""
    reads = plan.job.kind in ("read", "mixed")
    with BenchStore(uri, required_bytes(plan.job), reads=reads, say=say, stopped=lambda: signals.requested) as store:
        remove_dead(KIND)
        config = build_config(plan.device, store.uri)
        outcome = _run_device(plan, config, say, signals)
        report = {"jobs": [figures.job_report(outcome.runs)], "vdusefast": _extra(config, outcome)}
        _write(report, plan)
    if outcome.failure is not None:
        raise outcome.failure
    return int(any(r.results["request_errors"] or r.results["verify_errors"] for r in outcome.runs))


def _run_device(plan: Plan, config: Config, say: Any, signals: StopSignals) -> Outcome:
    outcome = Outcome()
    with Device(config) as device, device.driver() as driver:
        _describe(device, driver, config, plan, say)
        clones = place_job(plan.job, driver.capacity_bytes, driver.block_size_bytes)
        _check_abilities(plan.job, driver, keeps_data=keeps_data(config.backend.uri))
        worker_cpus = [q.cpu for q in config.queue if q.cpu is not None]
        before, begin = cpu_seconds(device), time.monotonic()
        with ProgressLine() as line:
            outcome.runs = run_group(
                driver,
                clones,
                cpus=driver_cpus(plan.device, worker_cpus, os.sched_getaffinity(0)),
                worker_cpus=worker_cpus,
                moves_no_data=not keeps_data(config.backend.uri),
                control=Control(lambda: signals.requested, lambda: device.failure, line.update),
            )
        passed, after = time.monotonic() - begin, cpu_seconds(device)
        outcome.queues = queue_figures(device.stats(), before, after, passed)
        outcome.engine_used = device.queues()[0].engine
        outcome.stopped_by = signals.received.name if signals.received is not None else ""
    outcome.failure = device.failure  # the drain at the end can fail, too
    return outcome


def _check_abilities(job: JobSpec, driver: LoopbackDriver, *, keeps_data: bool) -> None:
    """Refuse a job that this device cannot serve, before anything runs. Raises ConfigError."""
    if job.verify != "none" and not keeps_data:
        raise ConfigError(f"job {job.name}: verify={job.verify}, but a null store keeps nothing")
    if job.writes and driver.has(uapi.VIRTIO_BLK_F_RO):
        raise ConfigError(f"job {job.name}: rw={job.rw}, but the device is read-only")
    if job.kind == "trim" and not driver.has(uapi.VIRTIO_BLK_F_DISCARD):
        raise ConfigError(f"job {job.name}: rw={job.rw}, but the store cannot discard")
    if job.kind == "trim" and job.bs > driver.config.discard_max_sectors * 512:
        raise ConfigError(f"job {job.name}: bs {job.bs} is more than one discard may take")


def _describe(device: Device, driver: LoopbackDriver, config: Config, plan: Plan, say: Any) -> None:
    queues = device.queues()
    backend = config.backend
    say(
        f"device: {bytes_text(driver.capacity_bytes)} on {backend.uri}, cache {backend.cache}, "
        f"engine {queues[0].engine}, {len(queues)} queue(s) of {driver.queue_size}"
    )
    for line in [*queue_lines(device), job_line(plan.job, driver.capacity_bytes)]:
        say(line)


def _extra(config: Config, outcome: Outcome) -> Json:
    return device_member(
        config,
        TransportKind.LOOPBACK,
        engine_used=outcome.engine_used,
        verify=figures.verification(outcome.runs),
        queues=outcome.queues,
        stopped_by=outcome.stopped_by,
    )


def _write(report: Json, plan: Plan) -> None:
    """Print the report, or write it to the file of --output. Raises BackendError."""
    if plan.output is None:
        _emit(report, plan, sys.stdout)
        return
    try:
        with open(plan.output, "w", encoding="utf-8") as stream:
            _emit(report, plan, stream)
    except OSError as error:
        raise BackendError(f"{plan.output}: cannot write the report: {error.strerror}") from None


def _emit(report: Json, plan: Plan, stream: TextIO) -> None:
    if plan.output_format == "json":
        json.dump(report, stream, indent=2)
        print(file=stream)
    else:
        print_report(report, stream)
