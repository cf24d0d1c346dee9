"""The order in which contestants run, and what their figures say together: medians, spreads, ratios of one round."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vdusefast.base.json_types import Json

_T = TypeVar("_T")


@dataclass(frozen=True)
class Summary:
    """A figure of several rounds. spread: half the range, as a share of the median."""

    median: float
    spread: float
    low: float
    high: float
    count: int


def rotated(items: Sequence[_T], places: int) -> list[_T]:
    """Return `items` beginning with the one at `places`, which may be more than there are."""
    start = places % len(items) if items else 0
    return [*items[start:], *items[:start]]


def schedule(jobs: Sequence[_T], peers: Sequence[str], round_count: int) -> Iterator[tuple[int, _T, list[str]]]:
    """Yield (round, job, peers in order): each peer once in every round, and each peer first in turn.

    All rounds of a job come together, so that the rounds of one job see one mood of the machine.
    """
    for place, job in enumerate(jobs):
        for number in range(round_count):
            yield number, job, rotated(peers, place + number)


def summarize(values: Sequence[float]) -> Summary | None:
    """Return median and spread of `values`, None when there are none."""
    if not values:
        return None
    median = statistics.median(values)
    low, high = min(values), max(values)
    return Summary(median, (high - low) / 2 / median if median else 0.0, low, high, len(values))


def ratios(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Return ours to theirs for each round that has both: a machine that is slow for a while is slow for both."""
    return [ours[number] / theirs[number] for number in sorted(ours) if theirs.get(number)]


def per_request(runs: Sequence[Json]) -> dict[str, float]:
    """Return what servers have counted in `runs`, a request; nothing where they count nothing."""
    counted = [run["counted"] for run in runs if run.get("counted")]
    requests = sum(one["requests"] for one in counted)
    names = [name for name in counted[0] if name != "requests"] if requests else []
    return {name: sum(one[name] for one in counted) / requests for name in names}


def verdict(value: float, wanted: float | None, moonshot: float | None, *, at_most: bool = False) -> str:
    """Return "moonshot", "reached", "missed", or "" without a goal. at_most: less is better."""
    if wanted is None:
        return ""
    sign = -1 if at_most else 1
    for goal, word in ((moonshot, "moonshot"), (wanted, "reached")):
        if goal is not None and sign * value >= sign * goal:
            return word
    return "missed"


def costs(runs: Sequence[Json], jobs: Sequence[str], peers: Sequence[str], floor: str, reference: str) -> list[Json]:
    """Return, for each job and peer, the time of a request above that of `floor`: 1 / IOPS - 1 / IOPS of `floor`.

    cost_ns: the median of the rounds. share: of the reference's cost, the median of the rounds' ratios. Rounds without
    a floor do not count.
    """
    rows = []
    for job in jobs:
        by_peer = {
            peer: {r["round"]: r["iops"] for r in runs if r["job"] == job and r["peer"] == peer} for peer in peers
        }
        floors = by_peer.get(floor, {})
        cost_ns = {
            peer: {n: 1e9 / iops - 1e9 / floors[n] for n, iops in by_round.items() if iops and floors.get(n)}
            for peer, by_round in by_peer.items()
            if peer != floor
        }
        for peer, by_round in cost_ns.items():
            cost = summarize(list(by_round.values()))
            if cost is not None:
                share = summarize(ratios(by_round, cost_ns.get(reference, {})))
                rows.append({"job": job, "peer": peer, "cost_ns": cost.median, "cost_spread": cost.spread})
                rows[-1] |= {"share": share.median if share else None, "share_spread": share.spread if share else None}
    return rows


def table(
    runs: Sequence[Json], jobs: Sequence[str], peers: Sequence[str], base: str, *, over_base: bool = False
) -> list[Json]:
    """Return an object for each job and peer that has runs, in this order: medians, spreads, and the ratio to `base`.

    runs: objects with job, peer, round, iops, clat_mean_ns and clat_p99_ns. base: the peer whose IOPS are divided by
    those of the others; over_base: by which those of the others are divided.
    """
    rows = []
    for job in jobs:
        mine = {peer: [run for run in runs if run["job"] == job and run["peer"] == peer] for peer in peers}
        by_round = {peer: {run["round"]: run["iops"] for run in mine[peer]} for peer in peers}
        for peer in peers:
            iops = summarize([run["iops"] for run in mine[peer]])
            if iops is None:
                continue
            over, under = by_round.get(base, {}), by_round[peer]
            over, under = (under, over) if over_base else (over, under)
            ratio = summarize(ratios(over, under)) if peer != base else None
            rows.append(
                {
                    "job": job,
                    "peer": peer,
                    "rounds": iops.count,
                    "iops": iops.median,
                    "iops_spread": iops.spread,
                    "iops_min": iops.low,
                    "iops_max": iops.high,
                    "clat_mean_ns": statistics.median(run["clat_mean_ns"] for run in mine[peer]),
                    "clat_p99_ns": statistics.median(run["clat_p99_ns"] for run in mine[peer]),
                    "ratio": ratio.median if ratio is not None else None,
                    "ratio_spread": ratio.spread if ratio is not None else None,
                    "ratio_min": ratio.low if ratio is not None else None,
                    "per_request": per_request(mine[peer]),
                }
            )
    return rows
