"""The measurements, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
from typing import TextIO

from rows.table import Figures, Result
from vdusefast.base.json_types import Json
from vdusefast.bench.common.host import host
from vdusefast.bench.common.rounds import summarize


def spread_text(spread: float) -> str:
    """Return a spread as "3 %"."""
    return f"{100 * spread:.0f} %"


def print_results(results: list[Result], stream: TextIO) -> None:
    """Print a line for each row, with its goal."""
    print("| row | what | measured | spread | rounds | wanted | moonshot | |", file=stream)
    print("|---|---|---:|---:|---:|---:|---:|---|", file=stream)
    for result in results:
        row = result.row
        sign = "<= " if row.at_most else ""
        goals = [f"{sign}{goal:.{row.digits}f}" if goal is not None else "" for goal in (row.wanted, row.moonshot)]
        cells = [row.name, row.what, f"{result.value:.{row.digits}f}", spread_text(result.spread), str(result.rounds)]
        print(f"| {' | '.join([*cells, *goals, result.verdict])} |", file=stream)


def print_figures(figures: Figures, stream: TextIO) -> None:
    """Print what the ratios are made of: medians and all runs."""
    timed = {name: values for name, values in figures.items() if values and max(values) >= 1000}
    if not timed:
        return
    print("\n| measurement | median | spread | runs |\n|---|---:|---:|---|", file=stream)
    for name, values in timed.items():
        summary = summarize(values)
        assert summary is not None
        runs = ", ".join(f"{value / 1000:.0f}k" for value in values)
        print(f"| {name} | {summary.median / 1000:.0f}k IOPS | {spread_text(summary.spread)} | {runs} |", file=stream)


def report(results: list[Result], figures: Figures, notes: dict[str, list[str]], method: Json) -> Json:
    """Return everything measured as one object."""
    rows = [
        dataclasses.asdict(result.row)
        | {"value": result.value, "spread": result.spread, "rounds": result.rounds, "verdict": result.verdict}
        for result in results
    ]
    return {"host": host(), "method": method, "rows": rows, "figures": figures, "notes": notes}
