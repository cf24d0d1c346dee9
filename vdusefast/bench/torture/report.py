"""The findings of the torture suite: a table for people, an object for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vdusefast.base.columns import columns, wrap
from vdusefast.base.json_types import Json
from vdusefast.bench.common.host import host
from vdusefast.bench.common.tables import count_text
from vdusefast.bench.torture.load import ERRORS, Lost

LOST_SHOWN_MAX = 20
HEADINGS = ("what was done", "times", "pause p50", "p99", "max", "others p99", "max", "lost", "errors")


@dataclass
class Row:
    """All blows of one kind."""

    title: str
    pauses_s: list[float] = field(default_factory=list)  # of the queue that was hit, or the longest of all
    others_s: list[float] = field(default_factory=list)  # the longest of the queues that were not hit
    lost: int = 0
    errors: int = 0


@dataclass
class Findings:
    """A whole run of the suite."""

    transport: str
    engine: str
    backend: str
    cache: str
    queues: int
    seed: int
    rows: dict[str, Row] = field(default_factory=dict)
    lost: list[Lost] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # of the server, where it should not have failed
    counts: dict[str, int] = field(default_factory=dict)
    store_blocks: int = 0
    cycles: int = 0
    starts: int = 0
    seconds: float = 0.0
    stopped_by: str = ""

    @property
    def failed(self) -> bool:
        """Whether anything was lost, or is not as it was before."""
        return bool(self.lost or self.leaks or self.failures)

    def row(self, title: str) -> Row:
        """Return the row of that title, a new one if need be."""
        return self.rows.setdefault(title, Row(title))

    def add_lost(self, lost: Sequence[Lost], row: Row | None = None) -> None:
        """Note what was lost, and after which blow. Answers that are errors are told apart from data that is wrong."""
        self.lost += lost
        if row is not None:
            errors = sum(one.what in ERRORS for one in lost)
            row.errors += errors
            row.lost += len(lost) - errors


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not below `share` of all of them; 0 when there are none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def as_json(findings: Findings) -> Json:
    """Return everything found."""
    rows = [
        {
            "what": row.title,
            "times": len(row.pauses_s),
            "lost": row.lost,
            "errors": row.errors,
            "pause_s": _summary(row.pauses_s),
            "others_s": _summary(row.others_s),
        }
        for row in findings.rows.values()
    ]
    plain = ("transport", "engine", "backend", "cache", "queues", "seed", "cycles", "starts", "seconds", "stopped_by")
    return {
        **{name: getattr(findings, name) for name in plain},
        "host": host(),
        "rows": rows,
        "counts": findings.counts,
        "store_blocks_compared": findings.store_blocks,
        "lost": [vars(one) for one in findings.lost],
        "leaks": findings.leaks,
        "failures": findings.failures,
        "passed": not findings.failed,
    }


def as_text(findings: Findings, width: int | None = None) -> str:
    """Return the table and the verdict. width: of the terminal."""
    cells = [HEADINGS, *(_cells(row) for row in findings.rows.values())]
    lines = [columns(cells, (0,), width)]
    counts = findings.counts
    lines.append("")
    summary = (
        f"{findings.cycles} cycles in {findings.seconds:.0f} s, {findings.starts} starts of a server: "
        f"{count_text(counts.get('writes', 0))} writes and {count_text(counts.get('flushes', 0))} flushes done, "
        f"{count_text(counts.get('verified', 0))} blocks read back, {findings.store_blocks} compared in the store"
    )
    lines.append(wrap(summary, width))
    for one in findings.lost[:LOST_SHOWN_MAX]:
        lines.append(f"LOST {one}")
    if len(findings.lost) > LOST_SHOWN_MAX:
        lines.append(f"LOST and {len(findings.lost) - LOST_SHOWN_MAX} more")
    lines += [f"LEFT {leak}" for leak in findings.leaks]
    lines += [f"FAILED {failure}" for failure in findings.failures]
    if not findings.failed:
        lines.append("nothing was lost, no request failed without cause, and nothing was left behind")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    pauses, others = row.pauses_s, row.others_s
    return (
        row.title,
        str(len(pauses)),
        _ms(percentile(pauses, 0.5)),
        _ms(percentile(pauses, 0.99)),
        _ms(max(pauses, default=0.0)),
        _ms(percentile(others, 0.99)) if others else "-",
        _ms(max(others)) if others else "-",
        str(row.lost),
        str(row.errors),
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def _summary(values: Sequence[float]) -> Json | None:
    if not values:
        return None
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)}
