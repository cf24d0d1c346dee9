"""Figures and tables for people: framed on a terminal, plain columns elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from vdusefast.base.json_types import Json

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
UNITS_NS = ((1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns"))
QUEUE_HEADINGS = ("queue", "pid", "CPU", "CPU used", "requests", "read", "written", "req/kick", "req/irq", "errors")


def latency_text(ns: float) -> str:
    """Return a latency with three digits and its unit."""
    for factor, unit in UNITS_NS:
        if ns >= factor:
            return f"{ns / factor:.3g} {unit}" if ns < 1000 * factor else f"{ns / factor:.0f} {unit}"
    return "0"


def count_text(value: float) -> str:
    """Return a count as 1.23M, 45.6k or 789."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}" if value < 1000 * factor else f"{value / factor:.0f}{unit}"
    return f"{value:.0f}"


def bytes_text(value: float) -> str:
    """Return bytes as 1.2 GiB, 34 MiB or 567 B."""
    for factor, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.0f} B"


def per_text(count: int, events: int) -> str:
    """Return `count` for each of `events`."""
    return f"{count / events:.1f}" if events else "none"


def queue_rows(queues: Sequence[Json]) -> list[tuple[str, ...]]:
    """Return a row for each queue and its worker."""
    return [
        (
            str(q["index"]),
            str(q["pid"]),
            str(q["cpu"]) if q["cpu"] >= 0 else "any",
            f"{q['cpu_percent']:.0f} %",
            count_text(q["requests"]),
            bytes_text(q["bytes_read"]),
            bytes_text(q["bytes_written"]),
            per_text(q["requests"], q["kicks"]),
            per_text(q["requests"], q["irqs"]),
            str(q["errors"]),
        )
        for q in queues
    ]


def print_tables(tables: Sequence[Table], stream: TextIO) -> None:
    """Print tables: framed on a terminal, as plain columns elsewhere."""
    if stream.isatty():
        _print_rich(tables, stream)
        return
    for headings, rows in tables:
        _print_plain(headings, rows, stream)


def _print_rich(tables: Sequence[Table], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream)
    for headings, rows in tables:
        table = Table()
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _print_plain(headings: tuple[str, ...], rows: list[tuple[str, ...]], stream: TextIO) -> None:
    widths = [max(len(row[place]) for row in [headings, *rows]) for place in range(len(headings))]
    for row in [headings, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip(), file=stream)
    print(file=stream)
