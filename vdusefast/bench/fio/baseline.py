"""The same jobs by the same fio on the store's file, without vdusefast, beside a run with it: rounds in both orders."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from vdusefast.base.json_types import Json
from vdusefast.base.kinds import TransportKind
from vdusefast.bench.common.real_fio import job_figures, problem, run_fio
from vdusefast.bench.common.rounds import ratios, summarize
from vdusefast.bench.fio.arguments import names
from vdusefast.bench.fio.device import Reachable
from vdusefast.bench.fio.options import OWN_JOB
from vdusefast.bench.fio.shown import running_on
from vdusefast.bench.fio.target import Retargeting, Target
from vdusefast.errors import ConfigError, VdusefastError

ROUND_COUNT = 3
LIMIT_S = 24 * 3600.0  # a signal ends it earlier
NULL_ENGINE = "null"
OURS = "vdusefast"
FIGURES = ("iops", "bw_bytes")
# The output of these runs is read here alone, and the logs of the run before stay as they are.
NOT_TWICE = names(
    "output output-format minimal append-terse eta eta-newline eta-interval status-interval bandwidth-log"
)
LOGS = names("write_bw_log write_lat_log write_iops_log write_hist_log write_iolog exec_prerun exec_postrun")


def check_baseline(engines: Sequence[str], uri: str | None) -> None:
    """Refuse a comparison without a file for fio, before anything is made. Raises ConfigError."""
    if uri is not None and not uri.startswith("file:") and set(engines) - {NULL_ENGINE}:
        raise ConfigError(f"--baseline={','.join(engines)} needs a file that fio can open: use --backend file:PATH")


class Baseline:
    """Runs the jobs with and without vdusefast."""

    def __init__(
        self,
        fio: str,
        jobs: Retargeting,
        reachable: Reachable,
        path: Path | None,
        directory: Path,
        *,
        cpus: Sequence[int],
        direct: bool,
        stop_fd: int,
        say: Callable[[str], None],
    ):
        """Prepare it.

        path: the file of the store, None where there is none. directory: for job files. cpus: those of our driver;
        fio alone gets those of the workers, too. direct: whether our device reads past the page cache, so that fio
        does the same. stop_fd: borrowed; ends it when it becomes readable.
        """
        self._fio, self._jobs, self._reachable, self._path, self._directory = fio, jobs, reachable, path, directory
        self._direct, self._stop_fd, self._say = direct, stop_fd, say
        workers = {queue.cpu for queue in reachable.device.queues() if queue.cpu >= 0}
        self._cpus = {True: sorted(cpus), False: sorted({*cpus, *workers}) if workers else []}
        self._cold = any(job.get("invalidate") != "0" for job in jobs.loads)

    def run(self, engines: Sequence[str]) -> list[Json]:
        """Return an object for each engine: medians and spreads of both, and of the ratio of each round.

        Raises VdusefastError with fio's own words when it fails, and when a signal comes; fio is gone then.
        """
        contestants = [OURS, *engines]
        arguments = {name: self._arguments(name) for name in contestants}
        found: dict[str, list[Json]] = {name: [] for name in contestants}
        for number in range(ROUND_COUNT):
            for name in contestants if number % 2 == 0 else reversed(contestants):
                title = "vdusefast" if name == OURS else f"fio alone, ioengine {name}"
                self._say(f"round {number + 1} of {ROUND_COUNT}: {title}")
                found[name].append(self._once(name, arguments[name]))
        return [self._compared(name, found, arguments[name]) for name in engines]

    def _arguments(self, name: str) -> list[str]:
        more: dict[str, str | None] = {"invalidate": "0"}
        target = self._reachable.target
        if name != OURS:
            target = Target(str(self._path or NULL_ENGINE), TransportKind.KERNEL, target.asynchronous)
            more["direct"] = str(int(self._direct))
            more |= {} if name == OWN_JOB else {"ioengine": name}
            if name == NULL_ENGINE:
                more |= {"size": str(self._reachable.capacity_bytes)}
        script = self._jobs.turn_to(target, self._reachable.capacity_bytes, more).without(NOT_TWICE, LOGS)
        directory = self._directory / f"baseline-{name}"
        directory.mkdir()
        return [self._fio, "--output-format=json", *script.arguments(directory)]

    def _once(self, name: str, arguments: list[str]) -> Json:
        if self._cold and self._path is not None:
            _forget_pages(self._path)
        environment = self._reachable.environment if name == OURS else None
        with running_on(self._cpus[name == OURS]):
            outcome = run_fio(arguments, limit_s=LIMIT_S, stop_fd=self._stop_fd, environment=environment)
        if why := problem(outcome):
            raise VdusefastError(f"--baseline, {name}: {why}")
        return job_figures(outcome.report["jobs"])

    def _compared(self, name: str, found: dict[str, list[Json]], arguments: list[str]) -> Json:
        ours, theirs = ({n: one["iops"] for n, one in enumerate(found[who])} for who in (OURS, name))
        return {
            "engine": name,
            "rounds": ROUND_COUNT,
            "direct": self._direct,
            "cache": "dropped before each run" if self._cold else "as it was",
            "ours": _medians(found[OURS]),
            "fio": _medians(found[name]),
            "ratio": _summary(ratios(ours, theirs)),
            "command": arguments,
        }


def _medians(runs: Sequence[Json]) -> Json:
    out: Json = {name: _summary([one[name] for one in runs]) for name in FIGURES}
    for name in ("clat_mean_ns", "clat_p99_ns", "usr_cpu", "sys_cpu"):
        out[name] = statistics.median(one[name] for one in runs)
    return out


def _summary(values: Sequence[float]) -> Json:
    found = summarize(values)
    return {"median": found.median, "spread": found.spread} if found is not None else {"median": 0.0, "spread": 0.0}


def _forget_pages(path: Path) -> None:
    """Write a file's pages out and drop them from the page cache, as fio does by invalidate=1 before it reads.

    Raises VdusefastError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise VdusefastError(f"--baseline: {path}: {error.strerror}") from None
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise VdusefastError(f"--baseline: {path}: {error.strerror}") from None
    finally:
        os.close(fd)
