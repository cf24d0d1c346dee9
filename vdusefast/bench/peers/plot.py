"""The plot of `bench peers`: a panel for each job, a bar for each peer, whiskers over the range of the rounds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vdusefast.base.json_types import Json
from vdusefast.bench.common.tables import count_text
from vdusefast.bench.peers.report import OURS
from vdusefast.errors import ConfigError

COLUMN_COUNT = 4
PANEL_INCHES = (3.4, 2.6)
OUR_COLOUR = "#1f6f8b"
PEER_COLOUR = "#9aa5ab"
CEILING = "null_blk"
LABEL_ROOM = 1.3  # for the figure at the end of the longest bar
DPI = 150


def check_plot(path: Path) -> None:
    """Raise ConfigError where matplotlib is missing, or `path` is not a picture it could write."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed; type: pip install 'vdusefast[plot]' "
            "(or: sudo apt-get install python3-matplotlib)"
        )
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: its name has to end in .png, .svg or .pdf")


def plot(report: Json, path: Path) -> None:
    """Draw `report` to `path`. Each panel has a scale of its own: the jobs differ by orders of magnitude."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    jobs = list(dict.fromkeys(row["job"] for row in report["table"]))
    columns = max(1, min(COLUMN_COUNT, len(jobs)))
    rows = max(1, -(-len(jobs) // columns))
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for place, panel in enumerate(panels.flat):
        if place < len(jobs):
            base = report["method"].get("base", OURS)
            _draw(panel, jobs[place], [row for row in report["table"] if row["job"] == jobs[place]], base)
        else:
            panel.set_visible(False)
    figure.suptitle(f"IOPS, Linux {report['host']['kernel']}: median of {report['method']['rounds']} rounds, and range")
    figure.savefig(path, dpi=DPI)


def _draw(panel: Any, job: str, rows: list[Json], base: str) -> None:
    # A bar for the ceiling would leave the others no room: the title has its number.
    ceiling = next((f"   ({CEILING}: {count_text(row['iops'])})" for row in rows if row["peer"] == CEILING), "")
    bars = [row for row in rows if row["peer"] != CEILING]
    panel.set_title(job + ceiling, loc="left", fontsize="small")
    panel.xaxis.set_major_formatter(lambda value, _place: count_text(value))
    for place, row in enumerate(bars):
        whiskers = [[row["iops"] - row["iops_min"]], [row["iops_max"] - row["iops"]]]
        panel.barh(place, row["iops"], xerr=whiskers, color=OUR_COLOUR if row["peer"] == base else PEER_COLOUR)
        where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        panel.annotate(count_text(row["iops"]), (row["iops_max"], place), **where)
    panel.set_yticks(range(len(bars)), [row["peer"] for row in bars])
    panel.invert_yaxis()
    panel.set_xlim(0, LABEL_ROOM * max((row["iops_max"] for row in bars), default=1.0))
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
