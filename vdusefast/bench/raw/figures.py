"""From histograms and counters to figures, in the schema of fio's JSON output."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vdusefast import __version__
from vdusefast.base.json_types import Json
from vdusefast.bench.raw.jobs import Plan
from vdusefast.bench.raw.run import JobRun
from vdusefast.state.histogram import bucket_bounds_ns, percentile_ns
from vdusefast.state.shared_pages import HIST_BUCKET_COUNT

if TYPE_CHECKING:
    from vdusefast.driver._driver import OpResults

PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)


def latency(ops: Sequence[OpResults], *, percentiles: bool = True) -> Json:
    """Return one of fio's latency objects for requests of all `ops` together, in nanoseconds."""
    count = sum(op["ios"] for op in ops)
    if not count:
        empty: Json = {"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0}
        return empty | ({"percentile": {f"{p:f}": 0 for p in PERCENTILES}} if percentiles else {})
    hist: npt.NDArray[np.uint64] = np.zeros(HIST_BUCKET_COUNT, dtype=np.uint64)
    for op in ops:
        hist += np.frombuffer(op["hist"], dtype=np.uint64)
    first, last = bucket_bounds_ns()
    middle = (first.astype(np.float64) + last.astype(np.float64)) / 2
    mean = sum(op["lat_sum_ns"] for op in ops) / count
    low, high = min(op["lat_min_ns"] for op in ops if op["ios"]), max(op["lat_max_ns"] for op in ops)
    stddev = float(np.sqrt(np.sum(hist * (middle - mean) ** 2) / count))
    out: Json = {"min": low, "max": high, "mean": mean, "stddev": stddev, "N": count}
    if percentiles:
        values = np.clip(percentile_ns(hist, [p / 100 for p in PERCENTILES]), low, high)
        out["percentile"] = {f"{p:f}": round(float(v)) for p, v in zip(PERCENTILES, values, strict=True)}
    return out


def direction(ops: Sequence[OpResults], run_ns: int) -> Json:
    """Return fio's object for reads, writes or trims that took `run_ns` nanoseconds."""
    total_bytes, ios = sum(op["bytes"] for op in ops), sum(op["ios"] for op in ops)
    seconds = run_ns / 1e9
    rate = total_bytes / seconds if seconds and ios else 0.0
    return {
        "io_bytes": total_bytes,
        "io_kbytes": total_bytes // 1024,
        "bw_bytes": round(rate),
        "bw": round(rate / 1024),
        "iops": ios / seconds if seconds else 0.0,
        "runtime": round(run_ns / 1e6) if ios else 0,
        "total_ios": ios,
        "short_ios": 0,
        "drop_ios": 0,
        "slat_ns": latency([], percentiles=False),
        "clat_ns": latency(ops),
        "lat_ns": latency(ops, percentiles=False),
    }


def job_report(runs: Sequence[JobRun]) -> Json:
    """Return fio's object for one job, or for several reported as one."""
    one = runs[0]
    run_ns = max(run.results["run_ns"] for run in runs)
    elapsed_ns = max(run.results["end_ns"] - run.results["start_ns"] + run.results["check_ns"] for run in runs)
    seconds = sum(r.results["end_ns"] - r.results["start_ns"] + r.results["check_ns"] for r in runs) / 1e9 or 1.0
    ops = {name: [run.results["ops"][name] for run in runs] for name in ("read", "write", "trim", "sync", "check")}
    error = errno.EIO if any(run.results["request_errors"] for run in runs) else 0
    if not error and any(run.results["verify_errors"] for run in runs):
        error = errno.EILSEQ  # as fio calls it
    return {
        "jobname": one.instance.spec.name,
        "groupid": one.instance.group,
        "error": error,
        "eta": 0,
        "elapsed": round(elapsed_ns / 1e9),
        "job options": {"name": one.instance.spec.name, **one.instance.spec.options},
        **{name: direction(ops[name], run_ns) for name in ("read", "write", "trim")},
        "sync": {"total_ios": sum(op["ios"] for op in ops["sync"]), "lat_ns": latency(ops["sync"])},
        "job_runtime": round(run_ns / 1e6),
        "usr_cpu": 100 * sum(run.cpu.user_s for run in runs) / seconds,
        "sys_cpu": 100 * sum(run.cpu.system_s for run in runs) / seconds,
        "ctx": sum(run.cpu.switches for run in runs),
    }


def verification(runs: Sequence[JobRun]) -> list[Json]:
    """Return the results of verification for each job, with the first faults."""
    return [
        {
            "jobname": run.instance.spec.name,
            "verify": run.instance.spec.verify,
            "offset": run.instance.offset,
            "size": run.instance.size,
            "blocks_verified": run.results["verified"],
            "verify_errors": run.results["verify_errors"],
            "request_errors": run.results["request_errors"],
            "read_back_ios": run.results["ops"]["check"]["ios"],
            "read_back_runtime_ms": round(run.results["check_ns"] / 1e6),
            "faults": run.results["faults"],
        }
        for run in runs
    ]


def merge_groups(runs: Sequence[JobRun]) -> list[list[JobRun]]:
    """Return the runs that are reported together: each on its own, or a whole group with group_reporting."""
    out: list[list[JobRun]] = []
    for run in runs:
        joined = run.instance.spec.group_reporting and out and out[-1][0].instance.group == run.instance.group
        if joined and out[-1][0].instance.spec.group_reporting:
            out[-1].append(run)
        else:
            out.append([run])
    return out


def fio_report(plan: Plan, runs: Sequence[JobRun], started_s: float, extra: Json) -> Json:
    """Return the whole report; `extra` is the object "vdusefast"."""
    return {
        "fio version": f"vdusefast-{__version__}",
        "timestamp": int(started_s),
        "timestamp_ms": int(started_s * 1000),
        "time": time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(started_s)),
        "global options": {key: str(value) for key, value in vars(plan.run).items() if value not in (None, (), False)},
        "jobs": [job_report(members) for members in merge_groups(runs)],
        "vdusefast": extra,
    }
