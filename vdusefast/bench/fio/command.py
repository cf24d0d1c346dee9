"""`python -m vdusefast.bench fio`: the real fio on a device made for it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vdusefast.api import Device
from vdusefast.backends import keeps_data
from vdusefast.base.json_types import Json
from vdusefast.base.kinds import TransportKind
from vdusefast.bench.common.device_options import (
    KIND,
    build_config,
    check_driver_cpus,
    driver_cpus,
    store_uri,
)
from vdusefast.bench.common.measured import cpu_seconds, device_member, queue_figures, queue_lines
from vdusefast.bench.common.real_fio import (
    SIGNAL_BASE,
    TICK_S,
    FioProcess,
    FioStuckError,
    choose_engine,
    exit_status,
    find_fio,
)
from vdusefast.bench.common.store import BenchStore, StoppedError
from vdusefast.bench.common.tables import bytes_text
from vdusefast.bench.common.transport import choose_transport
from vdusefast.bench.fio.arguments import ANSWERED, REFUSED, Knowledge, names, read_arguments
from vdusefast.bench.fio.baseline import Baseline, check_baseline
from vdusefast.bench.fio.device import Reachable, check_bus, served
from vdusefast.bench.fio.options import FLAGS, NAMES, FioOptions, option_help, read_options
from vdusefast.bench.fio.report import INTRODUCTION, baseline_text, device_text, unseen_errors
from vdusefast.bench.fio.script import Script, read_script
from vdusefast.bench.fio.shown import Shown, run_shown
from vdusefast.bench.fio.target import Retargeting, Target
from vdusefast.config import Config
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.server.signals import PatientStopSignals
from vdusefast.state.dead_runs import remove_dead

OF_OUTPUT = names("output append-terse")  # a file would be made
CAPACITY_MAX = 1 << 62  # of a device that does not exist yet
STOPPED_STATUS = 128  # of a fio that a signal has stopped
UNBEGUN_STATUS = -signal.SIGINT  # of one that did not handle signals yet


def run_command(arguments: Sequence[str]) -> int:
    """Run fio with these arguments on a device made for it, and return the exit status.

    Raises VdusefastError for everything that keeps it from running, and for a failure of the device.
    """
    if not arguments or {"--help", "-h", "-help"} & set(arguments):
        print(option_help())
        return 0
    fio = find_fio("bench fio")
    know = Knowledge(fio)
    script = read_script(read_arguments(arguments, NAMES, FLAGS, know), NAMES, FLAGS)
    for name, reason in REFUSED.items():
        if script.option(name) is not None:
            raise ConfigError(f"--{name}: {reason}")
    # A second signal must not leave a disk without its server, or processes and directories without us.
    with PatientStopSignals() as signals, tempfile.TemporaryDirectory(prefix="vdusefast-fio-") as name:
        if any(script.option(one) is not None for one in ANSWERED):
            return _answer([fio, *script.arguments(Path(name))], signals)
        options = read_options(script)
        run = Run(fio, know, script, options, Path(name), signals)
        return run.check() or run.run()


def _answer(command: Sequence[str], signals: PatientStopSignals) -> int:
    """Let fio answer by itself, and return its exit status."""
    sys.stdout.flush()
    with FioProcess(command, out_fd=1) as fio:
        while not fio.wait(TICK_S, signals.fileno()):
            if signals.received is not None:
                return SIGNAL_BASE + signals.received
        return exit_status(fio.status())


@dataclass
class Outcome:
    """What is known once fio has ended."""

    queues: list[Json] = field(default_factory=list)
    engine_used: str = ""
    stopped_by: str = ""
    arguments: list[str] = field(default_factory=list)  # the complete command
    replaced: list[str] = field(default_factory=list)
    baselines: list[Json] = field(default_factory=list)


class Run:
    """One command: a store, a device, fio on it, and the reports."""

    def __init__(
        self,
        fio: str,
        know: Knowledge,
        script: Script,
        options: FioOptions,
        directory: Path,
        signals: PatientStopSignals,
    ):
        """Check everything that can be checked before anything is made. Raises ConfigError, KernelSupportError."""
        self._fio, self._know, self._options, self._directory, self._signals = fio, know, options, directory, signals
        self._transport, self._reason = choose_transport(options.device.transport)
        kernel = self._transport == TransportKind.KERNEL
        self._jobs = Retargeting(script, know, self._transport, choose_engine(fio) if kernel else "libaio")
        self._shown = Shown(script)
        self._say = self._shown.say
        self._outcome = Outcome()
        self._late: VdusefastError | None = None
        self._uri = store_uri(options.device)
        _check(options, self._jobs, self._uri, self._transport, self._shown.file)

    def check(self) -> int:
        """Let fio check its options, before anything is made. Returns fio's exit status, once fio's words are shown."""
        target = Target("disk", self._transport, self._jobs.asynchronous)
        script = self._jobs.turn_to(target, max(self._jobs.required_bytes, CAPACITY_MAX)).without(OF_OUTPUT, names(""))
        directory = self._directory / "check"
        directory.mkdir()
        status, said = self._know.parse(*script.arguments(directory))
        if status:
            print(said, end="", file=sys.stderr, flush=True)
        return status

    def run(self) -> int:
        """Carry it out and return the exit status."""
        if self._options.explain:
            self._say(INTRODUCTION)
        self._say(f"transport: {self._transport} ({self._reason})")
        try:
            return self._on_store()
        except StoppedError as error:
            self._say(str(error))
            return 0

    def _on_store(self) -> int:
        with BenchStore(
            self._uri,
            self._jobs.required_bytes,
            reads=self._jobs.reads(),
            say=self._say,
            stopped=lambda: self._signals.requested,
        ) as store:
            remove_dead(KIND)
            config = build_config(self._options.device, store.uri, self._transport)
            check_bus(config, self._transport)
            asynchronous = self._jobs.asynchronous
            with served(config, self._transport, asynchronous, self._options.route, self._signals) as reachable:
                _check_abilities(self._jobs, reachable)
                status = self._load(reachable, config, store.path)
            _raise_failure(reachable.device)  # the drain at the end can fail, too
        if self._late is not None:
            raise self._late
        unseen = unseen_errors(self._outcome.queues, tolerated=self._jobs.tolerates_errors())
        if unseen is not None and not status:
            raise unseen
        return status

    def _load(self, reachable: Reachable, config: Config, path: Path | None) -> int:
        device, outcome = reachable.device, self._outcome
        script = self._jobs.turn_to(reachable.target, reachable.capacity_bytes)
        outcome.arguments = [self._fio, *script.arguments(self._directory)]
        outcome.replaced = self._jobs.notes  # of this run: the baselines have notes of their own
        self._describe(reachable, config)
        cpus = self._driver_cpus(device)
        used, counted, begin = cpu_seconds(device), device.stats(), time.monotonic()

        def member(status: int) -> Json:
            passed, used_after = time.monotonic() - begin, cpu_seconds(device)
            outcome.queues = queue_figures(device.stats(), used, used_after, passed, counted)
            outcome.engine_used = device.queues()[0].engine
            if self._options.baseline and not status and not self._signals.requested:
                self._compare(reachable, config, path, cpus)
            outcome.stopped_by = self._signals.received.name if self._signals.received is not None else ""
            return self._member(reachable, config)

        status = run_shown(
            outcome.arguments,
            self._shown,
            environment=reachable.environment,
            cpus=cpus,
            signals=self._signals,
            tick=lambda: _raise_failure(device),
            say=self._say,
            member=member,
        )
        _raise_failure(device)
        width = self._shown.width
        text = device_text(outcome.queues, self._early_end(status), width, explain=self._options.explain)
        self._shown.append(text + baseline_text(outcome.baselines, width))
        return 0 if outcome.stopped_by and status in (STOPPED_STATUS, UNBEGUN_STATUS) else exit_status(status)

    def _early_end(self, status: int) -> str:
        """Return what a signal has done, "" when there was none."""
        signal_name = self._outcome.stopped_by
        if not signal_name:
            return ""
        if status == UNBEGUN_STATUS:
            return f"stopped by {signal_name} before fio had begun"
        if status >= STOPPED_STATUS:  # more: so many jobs had errors
            return f"stopped early by {signal_name}; the requests in flight were finished"
        return f"stopped by {signal_name} after fio had ended"

    def _describe(self, reachable: Reachable, config: Config) -> None:
        device, backend = reachable.device, config.backend
        queues = device.queues()
        node = f"{reachable.target.path}, " if self._transport == TransportKind.KERNEL else ""
        self._say(
            f"device: {node}{bytes_text(reachable.capacity_bytes)} on {backend.uri}, cache {backend.cache}, "
            f"engine {queues[0].engine}, {len(queues)} queue(s) of {config.device.effective_queue_size}"
        )
        for line in queue_lines(device):
            self._say(line)
        replaced = "; ".join(self._outcome.replaced)
        self._say(f"jobs: all on this device{', in place of ' if replaced else ''}{replaced}\n")

    def _driver_cpus(self, device: Device) -> list[int]:
        workers = [queue.cpu for queue in device.queues() if queue.cpu >= 0]
        return driver_cpus(self._options.device, workers, os.sched_getaffinity(0))

    def _member(self, reachable: Reachable, config: Config) -> Json:
        outcome = self._outcome
        return device_member(
            config,
            self._transport,
            engine_used=outcome.engine_used,
            node=reachable.target.path if self._transport == TransportKind.KERNEL else "",
            fio_command=outcome.arguments,
            replaced=outcome.replaced,
            baseline=outcome.baselines,
            queues=outcome.queues,
            stopped_by=outcome.stopped_by,
        )

    def _compare(self, reachable: Reachable, config: Config, path: Path | None, cpus: list[int]) -> None:
        """Run the baselines; what fails in them does not cost the report."""
        baseline = Baseline(
            self._fio,
            self._jobs,
            reachable,
            path,
            self._directory,
            cpus=cpus,
            direct=config.backend.cache == "none",
            stop_fd=self._signals.fileno(),
            say=self._say,
        )
        try:
            self._outcome.baselines = baseline.run(self._options.baseline)
        except FioStuckError:
            raise
        except VdusefastError as error:
            if not self._signals.requested:  # else it was ended as asked for
                self._late = error


def _raise_failure(device: Device) -> None:
    if device.failure is not None:
        raise device.failure


def _check_abilities(jobs: Retargeting, reachable: Reachable) -> None:
    """Refuse jobs that this device cannot serve. Raises ConfigError."""
    for job in jobs.loads:
        rw = job.get("rw") or "read"
        if reachable.read_only and ("write" in rw or "rw" in rw or "trim" in rw):
            raise ConfigError(f"job {job.name}: rw={rw}, but the device is read-only")
        if "trim" in rw and not reachable.can_discard:
            raise ConfigError(f"job {job.name}: rw={rw}, but the store cannot discard")


def _check(options: FioOptions, jobs: Retargeting, uri: str | None, transport: str, output: Path | None) -> None:
    """Refuse wrong options before anything is made. Raises ConfigError."""
    config = build_config(options.device, uri or "file:temporary", transport)
    check_driver_cpus(options.device)
    if options.route == "cross" and transport == TransportKind.LOOPBACK and len(config.queue) < 2:
        raise ConfigError("--route=cross: there is one queue; use --queues=2 or more")
    for job in jobs.verifies() if uri is not None and not keeps_data(uri) else []:
        raise ConfigError(f"job {job.name}: verify={job.get('verify')}, but a null store keeps nothing")
    if output is not None and output.is_dir():
        raise ConfigError(f"--output={output}: it is a directory")
    if output is not None and not os.access(output.absolute().parent, os.W_OK):
        raise ConfigError(f"--output={output}: cannot write into {output.absolute().parent}")
    check_baseline(options.baseline, uri)
