"""The kernel's side of `bench fio`: the real fio on the node of a device made for it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence

from vdusefast.api import Device
from vdusefast.backends import keeps_data
from vdusefast.base.json_types import Json
from vdusefast.base.kinds import Bus
from vdusefast.bench.common import block_node
from vdusefast.bench.common.measured import cpu_seconds, queue_figures, queue_lines
from vdusefast.bench.common.real_fio import KILL_S, FioOutcome, FioStuckError, choose_engine, find_fio, problem, run_fio
from vdusefast.bench.common.tables import bytes_text
from vdusefast.bench.fio.fio_words import device_words
from vdusefast.bench.raw.jobs import JobSpec, Plan
from vdusefast.bench.raw.measured import Outcome, job_lines
from vdusefast.bench.raw.plan import place_jobs
from vdusefast.bench.raw.report import ProgressLine
from vdusefast.bench.raw.run import Progress, driver_cpus
from vdusefast.config import Config
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.host.cpu_topology import parse_cpu_list
from vdusefast.server.signals import StopSignals

Say = Callable[[str], None]

MARGIN_S = 600.0  # beyond the jobs' own time: emulated machines are slow
SIZED_JOB_S = 3600.0  # for a job that ends with its size
FAULTS_SHOWN_MAX = 3


def run_on_kernel(plan: Plan, config: Config, say: Say, signals: StopSignals) -> Outcome:
    """Make the device, load it by fio, remove it. A signal lets fio finish and report what it has.

    Raises VdusefastError: what the device or fio failed of; the device is gone then, too.
    """
    if config.device.bus != Bus.VIRTIO:
        raise ConfigError(f'device.bus: {config.device.bus} gives no block device to load; use bus = "virtio"')
    fio = find_fio("--transport=kernel")
    engine = choose_engine(fio, plan.run.ioengine)
    outcome = Outcome()
    with Device(config) as device:
        try:
            _load(plan, device, fio, engine, outcome, say, signals)
        except BaseException:
            # Nobody waits for requests any more, and those of a failed queue would be waited for in vain.
            device.stop(force=True)
            raise
    outcome.failure = device.failure  # the drain at the end can fail, too
    assert outcome.fio is not None
    if not outcome.fio.report and outcome.failure is None and not outcome.stopped_by:
        raise VdusefastError(f"{outcome.node}: {problem(outcome.fio)}")
    return outcome


def _load(plan: Plan, device: Device, fio: str, engine: str, outcome: Outcome, say: Say, signals: StopSignals) -> None:
    """Run fio on the node and fill in `outcome`."""
    outcome.node = device.node
    outcome.fio_words = _fio_words(plan, device, fio, engine)
    outcome.engine_used = device.queues()[0].engine
    _describe(device, plan, engine, say)
    used, counted, begin = cpu_seconds(device), device.stats(), time.monotonic()
    outcome.fio = _run(device, outcome.fio_words, plan.jobs, signals)
    passed, used_after = time.monotonic() - begin, cpu_seconds(device)
    outcome.queues = queue_figures(device.stats(), used, used_after, passed, counted)
    outcome.stopped_by = signals.received.name if signals.received is not None else ""


def kernel_report(plan: Plan, outcome: Outcome, extra: Json) -> Json:
    """Return fio's own report with the object "vdusefast"."""
    fio = outcome.fio or FioOutcome(0, {}, [])
    report = {"jobs": [], **fio.report}
    report["vdusefast"] = extra | {
        "node": outcome.node,
        "fio_command": outcome.fio_words,
        "fio_messages": fio.messages,
        "verify": verification(plan.jobs, report["jobs"], fio.messages),
    }
    return report


def has_failed(outcome: Outcome) -> bool:
    """Return whether a request or a verification of fio's failed; being stopped by a signal is no failure."""
    if outcome.fio is None:
        return False
    errors = [job["error"] for job in outcome.fio.report.get("jobs", [])]
    if outcome.stopped_by:
        return any(error not in (0, errno.EINTR) for error in errors)
    return bool(outcome.fio.status) or any(errors)


def verification(specs: Sequence[JobSpec], jobs: Sequence[Json], messages: Sequence[str]) -> list[Json]:
    """Return per job of fio's report what it verified; blocks_verified is None where fio does not count that apart."""
    by_name = {spec.name: spec for spec in specs}
    faults = [line for line in messages if line.startswith(("verify", "fio: io_u error", "crc32c", "pattern"))]
    checks = []
    for job in jobs:
        spec = by_name.get(job["jobname"])
        verified: int | None = 0
        if spec is not None and spec.verify != "none":
            verified = None if spec.kind == "mixed" else job["read"]["total_ios"]
        wrong = job["error"] == errno.EILSEQ
        checks.append(
            {
                "jobname": job["jobname"],
                "verify": spec.verify if spec is not None else "none",
                "blocks_verified": verified,
                "verify_errors": int(wrong),
                "request_errors": int(job["error"] not in (0, errno.EILSEQ, errno.EINTR)),
                "error": os.strerror(job["error"]) if job["error"] else "",
                "messages": faults[:FAULTS_SHOWN_MAX] if job["error"] else [],
                "faults": [],
            }
        )
    return checks


def _fio_words(plan: Plan, device: Device, fio: str, engine: str) -> list[str]:
    node = device.node
    _check_abilities(plan.jobs, node, keeps_data=keeps_data(device.config.backend.uri))
    groups = place_jobs(plan.jobs, block_node.size_bytes(node), block_node.logical_block_bytes(node))
    worker_cpus = [queue.cpu for queue in device.queues() if queue.cpu >= 0]
    wanted = parse_cpu_list(plan.run.driver_cpus) if plan.run.driver_cpus else None
    cpus = driver_cpus(wanted, worker_cpus, os.sched_getaffinity(0))
    return device_words(fio, node, groups, engine=engine, direct=plan.run.direct is not False, cpus=cpus)


def _check_abilities(jobs: Sequence[JobSpec], node: str, *, keeps_data: bool) -> None:
    """Refuse jobs that this device cannot serve, before anything runs. Raises ConfigError."""
    for job in jobs:
        if job.verify != "none" and not keeps_data:
            raise ConfigError(f"job {job.name}: verify={job.verify}, but a null store keeps nothing")
        if job.writes and block_node.is_read_only(node):
            raise ConfigError(f"job {job.name}: rw={job.rw}, but the device is read-only")
        if job.kind == "trim" and not block_node.discard_max_bytes(node):
            raise ConfigError(f"job {job.name}: rw={job.rw}, but the store cannot discard")


def _describe(device: Device, plan: Plan, engine: str, say: Say) -> None:
    node, config, queues = device.node, device.config, device.queues()
    backend = config.backend
    capacity_bytes = block_node.size_bytes(node)
    say(
        f"device: {node}, {bytes_text(capacity_bytes)} on {backend.uri}, cache {backend.cache}, "
        f"engine {queues[0].engine}, {len(queues)} queue(s) of {config.device.effective_queue_size}"
    )
    for line in [*queue_lines(device), *job_lines(plan.jobs, capacity_bytes)]:
        say(line)
    say(f"load: fio, ioengine {engine}, direct={int(plan.run.direct is not False)}")


def _limit_s(jobs: Sequence[JobSpec]) -> float:
    return MARGIN_S + sum(job.ramp_time + (job.runtime or SIZED_JOB_S) for job in jobs)


def _run(device: Device, words: list[str], jobs: Sequence[JobSpec], signals: StopSignals) -> FioOutcome:
    """Run fio while the device lives. Raises the device's failure; requests that nobody answers are failed then."""
    expected_s = sum(job.ramp_time + job.runtime for job in jobs if job.stonewall or job is jobs[0])
    with ProgressLine() as line:

        def look(passed_s: float) -> None:
            if device.failure is not None:
                raise device.failure
            queues = device.stats().queues
            moved = sum(queue.bytes_read + queue.bytes_written for queue in queues)
            line.update(Progress(passed_s, expected_s, sum(queue.requests for queue in queues), moved, checking=False))

        try:
            return run_fio(words, limit_s=_limit_s(jobs), stop_fd=signals.fileno(), finish=True, tick=look)
        except FioStuckError as stuck:
            device.stop(force=True)
            stuck.fio.reap(KILL_S)
            raise stuck.cause or VdusefastError(f"device {device.name}: {stuck}") from None
