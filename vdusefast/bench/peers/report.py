"""The report of `bench peers`: tables for a terminal, Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from vdusefast.base.columns import terminal_width, wrap
from vdusefast.base.json_types import Json
from vdusefast.bench.common import rounds
from vdusefast.bench.common.tables import Table, bytes_text, count_text, latency_text, print_tables
from vdusefast.bench.peers.goals import goals_table

OURS = "vdusefast"
FLOOR = "null_blk"  # what a request costs without any server
REFERENCE = "qsd"  # whose cost the others' are compared with


def spread_text(spread: float) -> str:
    """Return a spread as "±3 %"."""
    return f"±{100 * spread:.0f} %"


def iops_table(report: Json) -> Table:
    """Return IOPS with their spread: a row for each job, a column for each peer."""
    return _pivot(report, "IOPS", lambda row: f"{count_text(row['iops'])} {spread_text(row['iops_spread'])}")


def latency_table(report: Json) -> Table:
    """Return the 99th percentile of latency in the same form."""
    return _pivot(report, "p99", lambda row: latency_text(row["clat_p99_ns"]))


def ratio_table(report: Json) -> Table | None:
    """Return our IOPS to those of each other peer, the median of the rounds' ratios; None without any.

    With variants each other peer's IOPS to those of the first.
    """
    if not any(row["ratio"] is not None for row in report["table"]):
        return None
    base = report["method"].get("base", OURS)
    headings, rows = _pivot(
        report,
        f"/ {base}" if report["method"].get("variants") else f"{base} /",
        lambda row: f"{row['ratio']:.2f} {spread_text(row['ratio_spread'])}" if row["ratio"] is not None else "",
    )
    place = headings.index(base)
    return headings[:place] + headings[place + 1 :], [row[:place] + row[place + 1 :] for row in rows]


def cost_table(report: Json) -> Table | None:
    """Return what a request costs above null_blk's, as time and as a share of qsd's; None without null_blk."""
    costs = _costs(report)
    return _pivot(report | {"table": costs}, f"above {FLOOR}", _cost_text) if costs else None


def _costs(report: Json) -> list[Json]:
    names = [peer["name"] for peer in report["peers"]]
    jobs = list(dict.fromkeys(row["job"] for row in report["table"]))
    return rounds.costs(report["runs"], jobs, names, FLOOR, REFERENCE)


def _cost_text(row: Json) -> str:
    share = "" if row["share"] is None else f", {row['share']:.2f} {spread_text(row['share_spread'])} of {REFERENCE}"
    return f"{latency_text(row['cost_ns'])}{share if row['peer'] != REFERENCE else ''}"


def counter_table(report: Json) -> Table | None:
    """Return what our workers counted, a request: kicks, interrupts, sleeps, requests a batch. None without any."""
    counting = [row for row in report["table"] if row.get("per_request")]
    if not counting:
        return None
    return _pivot(report | {"table": counting}, "kicks, interrupts, sleeps a request; batch", _counted_text)


def _counted_text(row: Json) -> str:
    each = row["per_request"]
    batch = f"{1 / each['batches']:.1f}" if each["batches"] else "-"
    return f"{each['kicks']:.3f}, {each['irqs']:.3f}, {each['sleeps']:.3f}; {batch}"


def _pivot(report: Json, corner: str, cell: Any) -> Table:
    peers = [peer["name"] for peer in report["peers"] if any(row["peer"] == peer["name"] for row in report["table"])]
    cells = {(row["job"], row["peer"]): cell(row) for row in report["table"]}
    jobs = list(dict.fromkeys(row["job"] for row in report["table"]))
    return (corner, *peers), [(job, *(cells.get((job, peer), "") for peer in peers)) for job in jobs]


def tables(report: Json) -> list[Table]:
    """Return all tables of a report."""
    method = report["method"]
    base = method.get("base", OURS)
    goals = goals_table(report["table"], _costs(report), base, counted=method.get("counted", False))
    goals = goals if not method.get("variants") else None
    found = [
        goals,
        iops_table(report),
        ratio_table(report),
        cost_table(report),
        latency_table(report),
        counter_table(report),
    ]
    return [table for table in found if table is not None]


def notes(report: Json) -> list[str]:
    """Return the lines below the tables: what each peer is, what did not run, what failed."""
    lines = [
        f"{peer['name']}: {peer['title']}; {peer['version'] or 'part of this kernel'}; {peer['cache']}"
        for peer in report["peers"]
    ]
    lines += [f"not run: {peer['name']}: {peer['reason']}" for peer in report["not_run"]]
    for failed in report["failed"]:
        where = f" in {failed['job']}" if failed["job"] else ""
        lines.append(f"failed: {failed['peer']}{where}: {failed['reason']}")
    if report["stopped_by"]:
        lines.append(f"stopped early by {report['stopped_by']}: the measurements until then are above")
    return lines


def method_text(report: Json) -> str:
    """Return how it was measured, in one paragraph."""
    method, host = report["method"], report["host"]
    fio_cpus = f"fio on CPU {method['driver_cpus']}" if method["driver_cpus"] else "fio on any CPU"
    servers = f"servers on CPU {method['server_cpus']}" if method["server_cpus"] else "servers on any CPU"
    text = (
        f"{host['cpu']}, {method['cpu_count']} CPUs, Linux {host['kernel']}; {method['fio']}, "
        f"ioengine {method['ioengine']}, direct=1; {method['rounds']} rounds of {method['runtime_s']:g} s after "
        f"{method['ramp_s']:g} s, interleaved; {bytes_text(method['size_bytes'])} files on {method['backing']}, one a "
        f"peer; {method['queues']} queue(s); {servers}, {fio_cpus}."
    )
    return f"{text} {method['note']}" if method["note"] else text


def print_peers(report: Json, stream: TextIO, *, markdown: bool = False) -> None:
    """Print method, tables and notes."""
    if markdown:
        print(method_text(report), file=stream)
        for headings, rows in tables(report):
            _print_markdown(headings, rows, stream)
        print(file=stream)
        for line in notes(report):
            print(f"- {line}", file=stream)
        return
    width = terminal_width(stream)
    print(f"\n{wrap(method_text(report), width)}\n", file=stream)
    print_tables(tables(report), stream)
    for line in notes(report):
        print(wrap(line, width, 2), file=stream)


def _print_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO) -> None:
    print(f"\n| {' | '.join(headings)} |", file=stream)
    print(f"|---|{'---:|' * (len(headings) - 1)}", file=stream)
    for row in rows:
        print(f"| {' | '.join(row)} |", file=stream)
