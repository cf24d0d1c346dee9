"""Text in columns for a terminal: a table or a line that is wider than the terminal is folded between words.

Where output goes to a file or a pipe there is no width, and every row stays one line.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Collection, Sequence
from typing import IO

COLUMNS_MIN = 20  # of a terminal; a narrower one breaks lines by itself
GAP = "  "


def terminal_width(stream: IO[str] | None) -> int | None:
    """Return the columns of the terminal that `stream` is, by $COLUMNS or its size; None if it is no terminal."""
    if stream is None or stream.closed or not stream.isatty():
        return None
    if os.environ.get("COLUMNS", "").isdigit():
        return max(COLUMNS_MIN, shutil.get_terminal_size().columns)
    try:
        return max(COLUMNS_MIN, os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):
        return None


def wrap(text: str, width: int | None, indent: int = 0) -> str:
    """Return a line, broken between words at `width`; its further lines are indented."""
    if width is None or len(text) <= width:
        return text
    return textwrap.fill(
        text,
        max(width, indent + COLUMNS_MIN),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def columns(rows: Sequence[Sequence[str]], left: Collection[int], width: int | None = None) -> str:
    """Return rows as aligned columns, the first row being the heading.

    left: columns of text, which begin at the left. width: columns that do not fit follow below, in further tables, each
    of which begins with the first column again.
    """
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n\n".join("\n".join(_line(row, places, widths, left) for row in rows) for places in _groups(widths, width))


def _groups(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Return the columns of each table that is as wide as `width` at most, if one column more fits at all."""
    everything = list(range(len(widths)))
    if width is None or sum(widths) + len(GAP) * (len(widths) - 1) <= width:
        return [everything]
    groups: list[list[int]] = []
    used = width
    for place in everything[1:]:
        needed = len(GAP) + widths[place]
        if used + needed > width or not groups:
            groups.append([0])
            used = widths[0]
        groups[-1].append(place)
        used += needed
    return groups or [everything]


def _line(row: Sequence[str], places: Sequence[int], widths: Sequence[int], left: Collection[int]) -> str:
    cells = (row[place].ljust(widths[place]) if place in left else row[place].rjust(widths[place]) for place in places)
    return GAP.join(cells).rstrip()
