"""The same job by the real fio, on the same file and as many CPUs, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdusefast.bench.common.real_fio import find_fio, job_figures, problem, run_fio
from vdusefast.bench.peers.fio_arguments import file_name, milliseconds
from vdusefast.bench.raw.jobs import JobSpec
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.host.cpu_topology import format_cpu_list

MARGIN_S = 120.0
NULL_ENGINE = "null"


def command(
    fio: str, engine: str, jobs: Sequence[JobSpec], path: Path | None, cpus: list[int], direct: bool
) -> list[str]:
    """Return fio's command line for `jobs`. With more CPUs than processes, fio gets one process a CPU."""
    words = [fio, "--output-format=json", "--group_reporting", f"--ioengine={engine}", f"--direct={int(direct)}"]
    words += [] if path is None else [file_name(path)]
    if cpus:
        words += [f"--cpus_allowed={format_cpu_list(cpus)}", "--cpus_allowed_policy=split"]
    for job in jobs:
        clones = max(job.numjobs, len(set(cpus)) if len(jobs) == 1 else 1)
        words += [f"--name={job.name}", f"--rw={job.rw}", f"--bs={job.bs}", f"--iodepth={job.iodepth}"]
        words += [f"--numjobs={clones}", f"--offset={job.offset}"]
        words += [f"--size={job.size}"] if job.size else []
        words += [f"--rwmixread={job.rwmixread}"] if job.kind == "mixed" else []
        words += [f"--runtime={milliseconds(job.runtime)}"] if job.runtime else []
        words += ["--time_based"] if job.time_based else []
        words += [f"--ramp_time={milliseconds(job.ramp_time)}"] if job.ramp_time else []
        words += [f"--fsync={job.fsync}"] if job.fsync else []
        words += ["--norandommap"] if job.norandommap else []
        words += ["--stonewall"] if job.stonewall else []
    return words


def run_baseline(
    engine: str,
    jobs: Sequence[JobSpec],
    path: Path | None,
    *,
    cpus: list[int],
    direct: bool,
    ours_iops: float,
    stop_fd: int = -1,
) -> dict[str, Any]:
    """Run fio and return its IOPS, bandwidth, latencies and our ratio to it. Verification is left out.

    Raises VdusefastError with fio's own words when it fails, and when `stop_fd` (borrowed) becomes readable; fio is
    gone then.
    """
    if path is None and engine != NULL_ENGINE:
        raise ConfigError(f"--baseline {engine} needs a file that fio can open: use --backend file:PATH")
    words = command(find_fio("--baseline"), engine, jobs, path, cpus, direct)
    limit_s = MARGIN_S + sum(job.runtime + job.ramp_time for job in jobs) * (1 if jobs[0].time_based else 10)
    outcome = run_fio(words, limit_s=limit_s, stop_fd=stop_fd)
    if why := problem(outcome):
        raise VdusefastError(f"fio --ioengine={engine}: {why}")
    figures = job_figures(outcome.report["jobs"])
    iops = figures["iops"]
    return {
        "engine": engine,
        **{key: figures[key] for key in ("iops", "bw_bytes", "clat_mean_ns", "usr_cpu", "sys_cpu")},
        "ratio": ours_iops / iops if iops else 0.0,
        "command": words,
    }
