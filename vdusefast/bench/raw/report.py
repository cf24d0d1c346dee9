"""The report for people: progress while jobs run, a table on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

from vdusefast.base.columns import terminal_width, wrap
from vdusefast.base.json_types import Json
from vdusefast.bench.common.tables import QUEUE_HEADINGS, bytes_text, count_text, latency_text, print_tables, queue_rows
from vdusefast.bench.raw.jobs import JobSpec
from vdusefast.bench.raw.run import JobRun, Progress
from vdusefast.errors import VdusefastError

JOB_HEADINGS = ("job", "", "IOPS", "bandwidth", "mean", "p50", "p99", "p99.9")


@dataclass
class Outcome:
    """The results when the device has stopped."""

    runs: list[JobRun] = field(default_factory=list)
    queues: list[Json] = field(default_factory=list)
    engine_used: str = ""
    stopped_by: str = ""
    failure: VdusefastError | None = None


def job_line(job: JobSpec, capacity_bytes: int) -> str:
    """Return a line that says what a job does, and for how long."""
    clones = f"{job.numjobs} x " if job.numjobs > 1 else ""
    length = f"{job.runtime:g} s" if job.time_based else bytes_text(job.size or capacity_bytes - job.offset)
    mix = f" ({job.rwmixread} % reads)" if job.kind == "mixed" else ""
    verify = f", verified by {job.verify}" if job.verify != "none" else ""
    return f"job: {clones}{job.name}: {job.rw}{mix}, {job.bs} bytes, {job.iodepth} in flight, {length}{verify}"


class ProgressLine:
    """A line on stderr that follows the run, when stderr is a terminal; a context manager."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._progress: Any = None
        self._task: Any = None
        self._before = (0.0, 0, 0)

    def __enter__(self) -> ProgressLine:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._progress = Bar(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._progress.add_task("starting", total=None)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, look: Progress) -> None:
        """Show a look at the run."""
        if self._progress is None:
            return
        elapsed, requests, moved = self._before
        passed = look.elapsed_s - elapsed
        if 0 < passed < 0.3:
            return
        self._before = (look.elapsed_s, look.requests, look.bytes)
        span = passed if passed > 0 else look.elapsed_s or 1.0
        verb = "verifying" if look.checking else "running"
        iops, rate = max(0, look.requests - requests) / span, max(0, look.bytes - moved) / span
        text = f"{verb}: {count_text(iops)} IOPS, {bytes_text(rate)}/s"
        total = look.expected_s or None
        done = min(look.elapsed_s, look.expected_s) if total else None
        self._progress.update(self._task, description=text, total=total, completed=done)


def job_rows(jobs: Sequence[Json]) -> list[tuple[str, ...]]:
    """Return a row for each direction in which a job moved anything."""
    rows = []
    for job in jobs:
        for op in ("read", "write", "trim"):
            side = job[op]
            if not side["total_ios"]:
                continue
            clat = side["clat_ns"]
            marks = [latency_text(clat["percentile"][key]) for key in ("50.000000", "99.000000", "99.900000")]
            figures = (count_text(side["iops"]), bytes_text(side["bw_bytes"]) + "/s", latency_text(clat["mean"]))
            rows.append((job["jobname"], op, *figures, *marks))
        if job["sync"]["total_ios"]:
            sync = job["sync"]
            rate = sync["total_ios"] * 1000 / job["job_runtime"] if job["job_runtime"] else 0.0
            marks = [latency_text(sync["lat_ns"]["percentile"][k]) for k in ("50.000000", "99.000000", "99.900000")]
            rows.append((job["jobname"], "flush", count_text(rate), "", latency_text(sync["lat_ns"]["mean"]), *marks))
    return rows


def verify_lines(checks: Sequence[Json]) -> list[str]:
    """Return the lines about verification: the counts, and the first faults of each job."""
    lines = []
    counted = [c["blocks_verified"] for c in checks if c["verify"] != "none"]
    verified = sum(counted)
    wrong = sum(c["verify_errors"] for c in checks)
    failed = sum(c["request_errors"] for c in checks)
    if not counted:
        lines.append("verified: nothing (no job asks for it; --verify=crc32c does)")
    else:
        lines.append(
            f"verified: {verified} blocks were read and compared with the data last written to them, {wrong} wrong"
        )
    lines.append(f"failed requests: {failed}")
    for check in checks:
        for fault in check["faults"]:
            lines.append(
                f"  {check['jobname']}: {fault['op']} of block {fault['block']} at byte {fault['offset_bytes']}: "
                f"{fault['kind']}: expected {fault['expected']:#x}, found {fault['found']:#x}"
            )
        more = check["verify_errors"] + check["request_errors"] - len(check["faults"])
        if more > 0:
            lines.append(f"  {check['jobname']}: and {more} more")
    return lines


def print_report(report: Json, stream: TextIO) -> None:
    """Print the report."""
    extra = report["vdusefast"]
    print(file=stream)
    tables = [(JOB_HEADINGS, job_rows(report["jobs"])), (QUEUE_HEADINGS, queue_rows(extra["queues"]))]
    print_tables(tables, stream)
    for line in verify_lines(extra["verify"]):
        print(wrap(line, terminal_width(stream), 2), file=stream)
    if extra["stopped_by"]:
        print(f"stopped early by {extra['stopped_by']}; the requests in flight were finished", file=stream)
