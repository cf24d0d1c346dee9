"""The results of a run of `bench fio`, of either transport, ready for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vdusefast.base.json_types import Json
from vdusefast.bench.common.tables import bytes_text
from vdusefast.bench.raw.jobs import JobSpec
from vdusefast.errors import VdusefastError

if TYPE_CHECKING:
    from vdusefast.bench.raw.run import JobRun


@dataclass
class Outcome:
    """The results when the device has stopped."""

    runs: list[JobRun] = field(default_factory=list)
    queues: list[Json] = field(default_factory=list)
    engine_used: str = ""
    stopped_by: str = ""
    failure: VdusefastError | None = None


def job_lines(jobs: Sequence[JobSpec], capacity_bytes: int) -> list[str]:
    """Return a line for each job: what it does, and for how long."""
    lines = []
    for job in jobs:
        clones = f"{job.numjobs} x " if job.numjobs > 1 else ""
        length = f"{job.runtime:g} s" if job.time_based else bytes_text(job.size or capacity_bytes - job.offset)
        mix = f" ({job.rwmixread} % reads)" if job.kind == "mixed" else ""
        verify = f", verified by {job.verify}" if job.verify != "none" else ""
        lines.append(
            f"job: {clones}{job.name}: {job.rw}{mix}, {job.bs} bytes, {job.iodepth} in flight, {length}{verify}"
        )
    return lines
