"""The same job by the real fio, on the same file and as many CPUs, for comparison."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from vdusefast.affinity import format_cpu_list
from vdusefast.bench.jobs import JobSpec
from vdusefast.errors import ConfigError, VdusefastError

MARGIN_S = 120.0
NULL_ENGINE = "null"


def find_fio() -> str:
    """Return the path of fio. Raises ConfigError that says how to get it."""
    path = shutil.which("fio")
    if path is None:
        raise ConfigError("--baseline needs the real fio, which is not installed; type: sudo apt-get install fio")
    return path


def command(
    fio: str, engine: str, jobs: Sequence[JobSpec], path: Path | None, cpus: list[int], direct: bool
) -> list[str]:
    """Return fio's command line for `jobs`. With more CPUs than processes, fio gets one process a CPU."""
    words = [fio, "--output-format=json", "--group_reporting", f"--ioengine={engine}", f"--direct={int(direct)}"]
    if path is not None:  # fio takes a colon for the end of one file's name
        escaped = str(path).replace("\\", "\\\\").replace(":", "\\:")
        words += [f"--filename={escaped}"]
    if cpus:
        words += [f"--cpus_allowed={format_cpu_list(cpus)}", "--cpus_allowed_policy=split"]
    for job in jobs:
        clones = max(job.numjobs, len(set(cpus)) if len(jobs) == 1 else 1)
        words += [f"--name={job.name}", f"--rw={job.rw}", f"--bs={job.bs}", f"--iodepth={job.iodepth}"]
        words += [f"--numjobs={clones}", f"--offset={job.offset}"]
        words += [f"--size={job.size}"] if job.size else []
        words += [f"--rwmixread={job.rwmixread}"] if job.kind == "mixed" else []
        words += [f"--runtime={job.runtime:g}"] if job.runtime else []
        words += ["--time_based"] if job.time_based else []
        words += [f"--ramp_time={job.ramp_time:g}"] if job.ramp_time else []
        words += [f"--fsync={job.fsync}"] if job.fsync else []
        words += ["--norandommap"] if job.norandommap else []
        words += ["--stonewall"] if job.stonewall else []
    return words


def _run(words: list[str], out: IO[str], limit_s: float, stop_fd: int) -> int:
    """Run fio in a process group of its own, which is gone afterwards. Returns its status. Raises VdusefastError."""
    process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, process_group=0)
    pid_fd = os.pidfd_open(process.pid)
    try:
        ready, _, _ = select.select([pid_fd, *([stop_fd] if stop_fd >= 0 else [])], [], [], limit_s)
        if pid_fd in ready:
            return process.wait()
        raise VdusefastError("fio was stopped by a signal" if ready else f"fio did not end within {limit_s:g} s")
    finally:
        os.close(pid_fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
    words = command(find_fio(), engine, jobs, path, cpus, direct)
    limit_s = MARGIN_S + sum(job.runtime + job.ramp_time for job in jobs) * (1 if jobs[0].time_based else 10)
    with tempfile.TemporaryFile("w+") as out:
        status = _run(words, out, limit_s, stop_fd)
        out.seek(0)
        printed = out.read()
    start = printed.find("{")
    if status or start < 0:
        said = (printed.strip() or "nothing").splitlines()
        raise VdusefastError(f"fio --ioengine={engine} failed with status {status}: {said[-1]}")
    results = json.loads(printed[start : printed.rfind("}") + 1])["jobs"]
    iops = sum(job[op]["iops"] for job in results for op in ("read", "write", "trim"))
    total = sum(job[op]["bw_bytes"] for job in results for op in ("read", "write", "trim"))
    weighed = [(job[op]["clat_ns"]["mean"], job[op]["total_ios"]) for job in results for op in ("read", "write")]
    count = sum(n for _mean, n in weighed)
    return {
        "engine": engine,
        "iops": iops,
        "bw_bytes": total,
        "clat_mean_ns": sum(mean * n for mean, n in weighed) / count if count else 0.0,
        "usr_cpu": sum(job["usr_cpu"] for job in results) / len(results),
        "sys_cpu": sum(job["sys_cpu"] for job in results) / len(results),
        "ratio": ours_iops / iops if iops else 0.0,
        "command": words,
    }
