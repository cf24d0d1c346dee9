"""From histograms and counters to figures: IOPS, bandwidth, latencies, what was verified."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vdusefast.base.json_types import Json
from vdusefast.bench.raw.run import JobRun
from vdusefast.state.histogram import percentile_ns
from vdusefast.state.shared_pages import HIST_BUCKET_COUNT

if TYPE_CHECKING:
    from vdusefast.driver._driver import OpResults

PERCENTILES = (50, 99, 99.9)


def latency(ops: Sequence[OpResults]) -> Json:
    """Return latencies of the requests of all `ops` together, in nanoseconds, under fio's names."""
    count = sum(op["ios"] for op in ops)
    if not count:
        return {"min": 0, "max": 0, "mean": 0.0, "N": 0, "percentile": {f"{p:f}": 0 for p in PERCENTILES}}
    hist: npt.NDArray[np.uint64] = np.zeros(HIST_BUCKET_COUNT, dtype=np.uint64)
    for op in ops:
        hist += np.frombuffer(op["hist"], dtype=np.uint64)
    low, high = min(op["lat_min_ns"] for op in ops if op["ios"]), max(op["lat_max_ns"] for op in ops)
    values = np.clip(percentile_ns(hist, [p / 100 for p in PERCENTILES]), low, high)
    marks = {f"{p:f}": round(float(v)) for p, v in zip(PERCENTILES, values, strict=True)}
    mean = sum(op["lat_sum_ns"] for op in ops) / count
    return {"min": low, "max": high, "mean": mean, "N": count, "percentile": marks}


def direction(ops: Sequence[OpResults], run_ns: int) -> Json:
    """Return the figures of reads, writes or trims that took `run_ns` nanoseconds, under fio's names."""
    total_bytes, ios = sum(op["bytes"] for op in ops), sum(op["ios"] for op in ops)
    seconds = run_ns / 1e9
    return {
        "total_ios": ios,
        "io_bytes": total_bytes,
        "iops": ios / seconds if seconds else 0.0,
        "bw_bytes": round(total_bytes / seconds) if seconds else 0,
        "runtime": round(run_ns / 1e6) if ios else 0,
        "clat_ns": latency(ops),
    }


def job_report(runs: Sequence[JobRun]) -> Json:
    """Return the figures of all clones of a job together."""
    one = runs[0]
    run_ns = max(run.results["run_ns"] for run in runs)
    seconds = sum(r.results["end_ns"] - r.results["start_ns"] + r.results["check_ns"] for r in runs) / 1e9 or 1.0
    ops = {name: [run.results["ops"][name] for run in runs] for name in ("read", "write", "trim", "sync")}
    error = errno.EIO if any(run.results["request_errors"] for run in runs) else 0
    if not error and any(run.results["verify_errors"] for run in runs):
        error = errno.EILSEQ  # as fio calls it
    return {
        "jobname": one.instance.spec.name,
        "error": error,
        "job options": one.instance.spec.options,
        **{name: direction(ops[name], run_ns) for name in ("read", "write", "trim")},
        "sync": {"total_ios": sum(op["ios"] for op in ops["sync"]), "lat_ns": latency(ops["sync"])},
        "job_runtime": round(run_ns / 1e6),
        "usr_cpu": 100 * sum(run.cpu.user_s for run in runs) / seconds,
        "sys_cpu": 100 * sum(run.cpu.system_s for run in runs) / seconds,
    }


def verification(runs: Sequence[JobRun]) -> list[Json]:
    """Return the results of verification for each clone, with the first faults."""
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
            "faults": run.results["faults"],
        }
        for run in runs
    ]
