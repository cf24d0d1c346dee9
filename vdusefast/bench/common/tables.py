"""Figures and tables for people: framed on a terminal, plain columns elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from vdusefast.base.columns import columns, terminal_width
from vdusefast.base.json_types import Json

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
UNITS_NS = ((1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns"))
QUEUE_HEADINGS = ("queue", "pid", "CPU", "busy", "requests", "read", "written", "/kick", "/irq", "errors")


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


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Return a table as plain columns, with an end of line after each row. width: of the terminal, to fold it there."""
    return columns([headings, *rows], (0,), width) + "\n"


def print_tables(tables: Sequence[Table], stream: TextIO) -> None:
    """Print tables: framed on a terminal that has room for the frames, as plain columns elsewhere."""
    width = terminal_width(stream)
    for headings, rows in tables:
        if width is None or not _print_framed(headings, rows, stream, width):
            print(plain_table(headings, rows, width), file=stream)


def _print_framed(headings: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, width: int) -> bool:
    """Print a table with a frame; return False when words would be broken for it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, width=width)
    table = Table()
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    if console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width:
        return False
    console.print(table)
    return True
