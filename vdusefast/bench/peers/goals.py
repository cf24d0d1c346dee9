"""The goals of vdusefast beside its peers in a guest, and whether a run reaches them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vdusefast.base.json_types import Json
from vdusefast.bench.common.rounds import verdict
from vdusefast.bench.common.tables import Table

JOB = re.compile(r"rand(?:read|write) 4k qd(\d+) x[12]")


@dataclass(frozen=True)
class Goal:
    """Of all random jobs of 4 KiB at `iodepth`: the least that the IOPS of `ours` are, in IOPS of the peer."""

    peer: str
    iodepth: int
    wanted: float
    moonshot: float
    ours: str = "vdusefast"


GOALS = (
    Goal("qsd", 32, 2.5, 5.0),
    Goal("qsd", 1, 2.0, 4.0),
    Goal("loop", 32, 0.8, 1.2),
    Goal("nbdkit", 32, 1.3, 2.0, ours="vdusefast-nbd"),
)
BUFFERED = Goal("loop", 0, 0.9, 1.0)  # of jobs through the page cache, whatever they have in flight
COST_WANTED, COST_MOONSHOT = 0.4, 0.2  # of a request above null_blk's, in that of the reference, at most
LATENCY_PEER, LATENCY_IODEPTH = "qsd", 1  # whose p99 ours is not to be above


def goals_table(rows: Sequence[Json], costs: Sequence[Json], base: str, *, counted: bool) -> Table | None:
    """Return a line for each goal that `rows` (of rounds.table) can tell of; None without any.

    costs: of rounds.costs; they are a goal in `counted` time alone, where noise does not drown a difference.
    """
    lines = [line for goal in GOALS if (line := _of_iops(goal, rows, base)) is not None]
    lines += _of_buffered(rows)
    lines += [line for line in (_of_latency(rows, base),) if line is not None and not counted]
    lines += _of_costs(costs, base) if counted else []
    return (("goal", "measured", "wanted", "moonshot", ""), lines) if lines else None


def _iodepth(job: str) -> int:
    match = JOB.fullmatch(job)
    return int(match[1]) if match else 0


def _of_iops(goal: Goal, rows: Sequence[Json], base: str) -> tuple[str, ...] | None:
    found = [
        (ratio, row["job"])
        for row in rows
        if row["peer"] == goal.peer and _iodepth(row["job"]) == goal.iodepth
        if (ratio := _ratio(goal, row, rows, base)) is not None
    ]
    if not found:
        return None
    ratio, job = min(found)
    ours = "" if goal.ours == Goal.ours else f"{goal.ours}: "
    what = f"{ours}IOPS / {goal.peer}, iodepth {goal.iodepth}: the least of {len(found)} ({job})"
    return what, f"{ratio:.2f}", f"{goal.wanted:g}", f"{goal.moonshot:g}", verdict(ratio, goal.wanted, goal.moonshot)


def _ratio(goal: Goal, row: Json, rows: Sequence[Json], base: str) -> float | None:
    """Return that of the rounds where they were compared with `base`, else that of the medians; None without ours."""
    if goal.ours == base:
        return None if row["ratio"] is None else float(row["ratio"])
    ours = [one["iops"] for one in rows if one["peer"] == goal.ours and one["job"] == row["job"]]
    return ours[0] / row["iops"] if ours and row["iops"] else None


def _of_buffered(rows: Sequence[Json]) -> list[tuple[str, ...]]:
    wanted, moonshot = f"{BUFFERED.wanted:g}", f"{BUFFERED.moonshot:g}"
    return [
        (
            f"buffered writes / {row['peer']} ({row['job']})",
            f"{row['ratio']:.2f}",
            *(wanted, moonshot, verdict(row["ratio"], BUFFERED.wanted, BUFFERED.moonshot)),
        )
        for row in rows
        if row["peer"] == BUFFERED.peer and "buffered" in row["job"].split() and row["ratio"] is not None
    ]


def _of_latency(rows: Sequence[Json], base: str) -> tuple[str, ...] | None:
    p99_ns = {(row["job"], row["peer"]): row["clat_p99_ns"] for row in rows if _iodepth(row["job"]) == LATENCY_IODEPTH}
    jobs = [job for job, peer in p99_ns if peer == base and p99_ns.get((job, LATENCY_PEER))]
    if not jobs:
        return None
    worst, job = max((p99_ns[job, base] / p99_ns[job, LATENCY_PEER], job) for job in jobs)
    what = f"p99 / {LATENCY_PEER}, iodepth {LATENCY_IODEPTH}: the most of {len(jobs)} ({job})"
    return what, f"{worst:.2f}", "<= 1", "", verdict(worst, 1.0, None, at_most=True)


def _of_costs(costs: Sequence[Json], base: str) -> list[tuple[str, ...]]:
    goals = (f"<= {COST_WANTED:g}", f"<= {COST_MOONSHOT:g}")
    return [
        (
            f"cost above null_blk / that of qsd ({row['job']})",
            f"{row['share']:.2f}",
            *goals,
            verdict(row["share"], COST_WANTED, COST_MOONSHOT, at_most=True),
        )
        for row in costs
        if row["peer"] == base and row["share"] is not None
    ]
