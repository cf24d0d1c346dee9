"""`python -m vdusefast.bench peers`: one job after another, side by side on several ways to serve a file."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from vdusefast.base.columns import terminal_width, wrap
from vdusefast.base.json_types import Json
from vdusefast.bench.common import rounds
from vdusefast.bench.common.device_options import parse_bool
from vdusefast.bench.common.host import host
from vdusefast.bench.common.real_fio import (
    KILL_S,
    FioOutcome,
    FioStuckError,
    choose_engine,
    find_fio,
    job_figures,
    problem,
    run_fio,
)
from vdusefast.bench.common.tables import count_text
from vdusefast.bench.peers import data_check, dirty_pages
from vdusefast.bench.peers import variants as peers_variants
from vdusefast.bench.peers.awake import Awake
from vdusefast.bench.peers.files import backing_directory, file_system
from vdusefast.bench.peers.fio_arguments import measure_arguments, verify_arguments
from vdusefast.bench.peers.peer import Peer, PeerSetup, first_line, load_modules
from vdusefast.bench.peers.report import print_peers
from vdusefast.bench.raw.jobs import JOB_OPTIONS, JobSpec, make_job, option_values
from vdusefast.errors import BackendError, ConfigError, KernelSupportError, VdusefastError
from vdusefast.host.cpu_topology import check_cpu, parse_cpu_list, read_topology
from vdusefast.server.signals import PatientStopSignals

Say = Callable[[str], None]

MARGIN_S = 120.0  # for fio to start and to end on a slow machine
BUFFERED_MIN_BYTES_S = 1 << 20  # a peer that is slower is given up
CHECK_DEPTH = 32
CHECK_BYTES = 2 << 20
SEED = 0x5EED
DEFAULT_SIZE_BYTES = 64 << 20


@dataclass(frozen=True)
class PeersOptions:
    """The options of one command. peers: None = all that can run here. backing: None = a tmpfs."""

    jobs: tuple[JobSpec, ...]
    peers: tuple[str, ...] | None = None
    variants: str = ""  # of ourselves, in place of all peers unless `peers` names some; see peers_variants
    runtime_s: float = 2.0
    ramp_s: float = 0.3
    rounds: int = 5
    size_bytes: int = DEFAULT_SIZE_BYTES
    backing: Path | None = None
    queues: int = 0  # 0 = two where there are two CPUs, else one
    server_cpus: str = ""
    driver_cpus: str = ""
    ioengine: str | None = None
    load_modules: bool = False
    json: Path | None = None
    plot: Path | None = None
    markdown: bool = False
    note: str = ""
    keep_awake: bool = False  # see `awake`


PEER_OPTIONS = JOB_OPTIONS | {"direct": parse_bool}


def standard_jobs() -> tuple[JobSpec, ...]:
    """Return the eight jobs that are run unless others are given."""
    return tuple(
        named(JobSpec(rw=rw, iodepth=iodepth, numjobs=numjobs))
        for rw in ("randread", "randwrite")
        for iodepth in (1, 32)
        for numjobs in (1, 2)
    )


def parse_job(text: str) -> JobSpec:
    """Return the job that `text` describes: "rw=randread bs=4k iodepth=32 numjobs=2". Raises ConfigError.

    With "direct=0" writes go through the page cache, all of the device once; see `dirty_pages`.
    """
    try:
        job = make_job(option_values([f"--{word}" for word in shlex.split(text)], PEER_OPTIONS), PEER_OPTIONS)
    except ConfigError as error:
        wanted = "write one job's own options, such as rw=randread bs=4k iodepth=32"
        raise ConfigError(f"--job {text!r}: {error}; {wanted}") from None
    buffered = job.buffered
    if buffered and job.rw != "write":
        raise ConfigError(
            f"--job {text!r}: direct=0 is for rw=write: what is timed is how fast dirty pages are written"
        )
    if job.verify != "none" or job.kind == "trim":
        raise ConfigError(f"--job {text!r}: only reads and writes are timed; data is verified apart from that")
    if job.runtime or job.time_based or job.ramp_time:
        raise ConfigError(f"--job {text!r}: --runtime and --ramp of the command say how long all jobs run")
    return named(job)


def named(job: JobSpec) -> JobSpec:
    """Return `job` with the name that tables show: "randread 4k qd32 x2" for 32 in flight in each of two jobs."""
    size = f"{job.bs >> 10}k" if job.bs % 1024 == 0 else f"{job.bs}"
    mix = f" {job.rwmixread}%" if job.kind == "mixed" else ""
    how = "buffered" if job.buffered else f"qd{job.iodepth}"
    return replace(job, name=f"{job.rw}{mix} {size} {how} x{job.numjobs}")


def job_limit_s(job: JobSpec, options: PeersOptions) -> float:
    """Return the seconds that one run of `job` may take."""
    if job.buffered:
        return MARGIN_S + options.size_bytes / BUFFERED_MIN_BYTES_S
    return MARGIN_S + options.runtime_s + options.ramp_s


def run_peers(options: PeersOptions) -> int:
    """Run everything, print and write the report; return 1 when a peer failed, or one that was named did not run.

    Raises VdusefastError for what keeps it from running at all.
    """
    if os.geteuid() != 0:
        raise KernelSupportError("bench peers makes block devices, which needs root: use sudo")
    check_outputs(options)
    with PatientStopSignals() as signals, Awake(options.keep_awake) as awake:
        report = _compare(options, signals, awake)
    emit(report, options)
    named_absent = options.peers is not None and bool(report["not_run"])
    return 1 if report["failed"] or named_absent else 0


def _compare(options: PeersOptions, signals: PatientStopSignals, awake: Awake) -> Json:
    """Find out what can run, run it, and return the report. Raises VdusefastError when nothing can."""
    fio = find_fio("bench peers")
    engine = choose_engine(fio, options.ioengine)
    wanted = peers_variants.kinds(options.peers, options.variants)
    if options.load_modules:
        load_modules([module for peer in wanted for module in peer.modules])
    absent = {peer.name: reason for peer in wanted if (reason := peer.missing())}
    runnable = [peer for peer in wanted if peer.name not in absent]
    if not runnable:
        raise KernelSupportError("no peer can run here: " + "; ".join(f"{k}: {v}" for k, v in absent.items()))
    with backing_directory(options.backing, options.size_bytes, len(runnable)) as directory:
        return Session(options, fio, engine, directory, signals, awake).run(runnable, absent)


def check_outputs(options: PeersOptions) -> None:
    """Refuse, before anything runs, what could not be written afterwards. Raises ConfigError."""
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise ConfigError(f"{option} {path}: cannot write into {path.absolute().parent}")
    if options.plot is not None:
        from vdusefast.bench.peers.plot import check_plot

        check_plot(options.plot)
    for option, text in (("--server-cpus", options.server_cpus), ("--driver-cpus", options.driver_cpus)):
        for cpu in parse_cpu_list(text, f"{option}: ") if text else []:
            check_cpu(cpu, read_topology(), option)


def emit(report: Json, options: PeersOptions) -> None:
    """Print the tables, write JSON and plot. Raises BackendError."""
    print_peers(report, sys.stdout, markdown=options.markdown)
    try:
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if options.plot is not None:
            from vdusefast.bench.peers.plot import plot

            plot(report, options.plot)
    except OSError as error:
        raise BackendError(f"{error.filename}: cannot write the report: {error.strerror}") from None


@dataclass
class Session:
    """One run of the comparison: which peers live, what has been measured, what failed."""

    options: PeersOptions
    fio: str
    engine: str
    directory: Path
    signals: PatientStopSignals
    awake: Awake
    peers: dict[str, Peer] = field(default_factory=dict)
    described: list[Json] = field(default_factory=list)
    runs: list[Json] = field(default_factory=list)
    failed: list[Json] = field(default_factory=list)

    def run(self, kinds: Sequence[type[Peer]], absent: dict[str, str]) -> Json:
        """Start, check, time and remove the peers, and return the report. Nothing of them is left, whatever happens."""
        with ExitStack() as stack:
            stack.callback(self._stop_all)
            for number, kind in enumerate(kinds):
                if self.signals.requested:
                    break
                self._start(kind, number)
            for peer in self.peers.values():
                peer.rest()
            if self.peers and not self.signals.requested:
                self._measure()
                self._check_again()
        return self._report(absent)

    def _start(self, kind: type[Peer], number: int) -> None:
        """Make a peer with its file, and look whether its data is right. One that fails is noted and removed."""
        options = self.options
        path = self.directory / f"{kind.name}.img"
        peer: Peer | None = None
        try:
            if kind.keeps_data:
                data_check.make_file(path, options.size_bytes, SEED)
            cpus = tuple(parse_cpu_list(options.server_cpus)) if options.server_cpus else ()
            tag = f"{os.getpid()}-{number}"
            peer = kind(PeerSetup(path, options.size_bytes, self.queues, cpus, self.directory, tag))
            peer.start()
            self.peers[kind.name] = peer
            say(f"{kind.name}: {peer.node}" + ("" if kind.keeps_data else ", which keeps no data to check"))
            description = peer.describe()
            self.described.append(description)
            if kind.keeps_data:
                self._check(peer)
                description["checked"] = True
        except (VdusefastError, OSError) as error:
            self._give_up(kind.name, "", error)

    def _check(self, peer: Peer) -> None:
        setup = peer.setup
        data_check.compare(peer.node, setup.path, setup.size_bytes)
        data_check.check_writes(peer.node, setup.path, setup.size_bytes, SEED)
        size = min(CHECK_BYTES, setup.size_bytes)
        arguments = verify_arguments(
            self.fio, peer.node, engine=self.engine, size_bytes=size, iodepth=CHECK_DEPTH, cpus=self._driver_cpus()
        )
        outcome = self._fio(peer, arguments, MARGIN_S)
        if why := problem(outcome):
            raise data_check.DataError(f"{peer.node}: verification: {why}")

    def _measure(self) -> None:
        options = self.options
        names = list(self.peers)
        for number, job, order in rounds.schedule(options.jobs, names, options.rounds):
            line = []
            for name in order:
                if self.signals.requested:
                    return
                if name not in self.peers:
                    continue
                run = self._measure_one(self.peers[name], job, number)
                if run is not None:
                    self.runs.append(run)
                    line.append(f"{name} {count_text(run['iops'])}")
            say(f"{job.name}, round {number + 1} of {options.rounds}: {', '.join(line)}")

    def _measure_one(self, peer: Peer, job: JobSpec, number: int) -> Json | None:
        """Time one job on one peer. Returns None when it failed, which is noted, or was stopped by a signal."""
        options = self.options
        arguments = measure_arguments(
            self.fio,
            peer.node,
            job,
            engine=self.engine,
            direct=not job.buffered,
            cpus=self._driver_cpus(),
            size_bytes=options.size_bytes,
            runtime_s=options.runtime_s,
            ramp_s=options.ramp_s,
        )
        try:
            self._settle(peer)
            with self._woken(peer):
                before = peer.counters()
                with self.awake.paused(), dirty_pages.limited(job.buffered):
                    outcome = self._fio(peer, arguments, job_limit_s(job, options))
                counted = {name: value - before[name] for name, value in peer.counters().items()}
            self._settle(peer)
            if why := problem(outcome):
                raise VdusefastError(why)
            figures_of_run = job_figures(outcome.report["jobs"])
            if not figures_of_run["total_ios"]:
                raise VdusefastError("fio finished no request")
        except (VdusefastError, OSError) as error:
            if not self.signals.requested:
                self._give_up(peer.name, job.name, error)
            return None
        return {"job": job.name, "peer": peer.name, "round": number, **figures_of_run, "counted": counted}

    @contextmanager
    def _woken(self, peer: Peer) -> Iterator[None]:
        """Let one peer run; the others rest."""
        peer.wake()
        try:
            yield
        finally:
            if peer.name in self.peers and peer.node:
                peer.rest()

    def _settle(self, peer: Peer) -> None:
        """Write back what the peer's file has in the page cache: it must not be written in the next one's time."""
        if peer.keeps_data:
            fd = os.open(peer.setup.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _fio(self, peer: Peer, arguments: list[str], limit_s: float) -> FioOutcome:
        """Run fio on a peer. One whose requests are never answered loses its device, so that fio can end."""
        try:
            return run_fio(arguments, limit_s=limit_s, stop_fd=self.signals.fileno(), tick=lambda _passed: peer.check())
        except FioStuckError as stuck:
            peer.stop(force=True)
            stuck.fio.reap(KILL_S)
            raise VdusefastError(str(stuck.cause or stuck)) from None

    def _check_again(self) -> None:
        """Look whether the devices still return what their files hold, now that they have been written to."""
        for peer in list(self.peers.values()):
            if not peer.keeps_data or self.signals.requested:
                continue
            try:
                with self._woken(peer):
                    data_check.compare(peer.node, peer.setup.path, peer.setup.size_bytes)
            except (VdusefastError, OSError) as error:
                self._give_up(peer.name, "the check after the last job", error)

    def _give_up(self, name: str, job: str, error: Exception) -> None:
        """Note why a peer is out, and remove it."""
        reason = f"{error.strerror or error}" if isinstance(error, OSError) else str(error)
        self.failed.append({"peer": name, "job": job, "reason": reason})
        say(f"{name}: failed{f' in {job}' if job else ''}: {reason}")
        peer = self.peers.pop(name, None)
        if peer is not None:
            self._stop(peer, force=True)

    def _stop_all(self) -> None:
        while self.peers:
            self._stop(self.peers.popitem()[1], force=False)

    def _stop(self, peer: Peer, *, force: bool) -> None:
        try:
            peer.stop(force=force)
        except (VdusefastError, OSError) as error:
            self.failed.append({"peer": peer.name, "job": "its removal", "reason": str(error)})
            say(f"{peer.name}: cannot be removed: {error}")

    @property
    def queues(self) -> int:
        """How many queues each peer gets."""
        return self.options.queues or min(2, len(os.sched_getaffinity(0)))

    def _driver_cpus(self) -> list[int]:
        return parse_cpu_list(self.options.driver_cpus) if self.options.driver_cpus else []

    def _report(self, absent: dict[str, str]) -> Json:
        options = self.options
        names = [peer["name"] for peer in self.described]
        kinds = peers_variants.kinds(options.peers, options.variants)
        base = peers_variants.base_of([kind.name for kind in kinds], options.variants)
        jobs = [job.name for job in options.jobs]
        backing = file_system(self.directory) or "unknown file system"
        return {
            "host": host(),
            "method": {
                "fio": first_line([self.fio, "--version"]),
                "ioengine": self.engine,
                "direct": True,
                "jobs": jobs,
                "rounds": options.rounds,
                "runtime_s": options.runtime_s,
                "ramp_s": options.ramp_s,
                "size_bytes": options.size_bytes,
                "backing": backing,
                "queues": self.queues,
                "cpu_count": os.cpu_count() or 1,
                "server_cpus": options.server_cpus,
                "driver_cpus": options.driver_cpus,
                "note": options.note,
                "variants": options.variants,
                "base": base,
                "counted": options.keep_awake,
            },
            "peers": self.described,
            "not_run": [{"name": name, "reason": reason} for name, reason in absent.items()],
            "failed": self.failed,
            "runs": self.runs,
            "table": rounds.table(self.runs, jobs, names, base, over_base=bool(options.variants)),
            "stopped_by": self.signals.received.name if self.signals.received is not None else "",
        }


def say(text: str) -> None:
    """Tell how far it has come."""
    print(wrap(text, terminal_width(sys.stderr)), file=sys.stderr, flush=True)
