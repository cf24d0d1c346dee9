"""The rows of bench/README.md that need no guest: measured side by side, interleaved, medians with their spread.

    python bench/speed.py [--rows NAME,...] [--rounds 5] [--seconds 3] [--json FILE] [--set KEY=VALUE,...]

One worker on the worker's CPU, the driver on another, as the two processes of the bare ring exchange. Each round runs
every contestant once, so that a change of the machine's mood meets all of them. fio runs on the worker's CPU alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from rows import report, table  # noqa: E402 (needs the path set above)
from rows.contestants import FILE_BYTES, RowError, Setup  # noqa: E402
from rows.idle import measure_idle  # noqa: E402

from vdusefast.bench.common.rounds import summarize  # noqa: E402
from vdusefast.bench.peers.variants import parse_settings  # noqa: E402
from vdusefast.errors import VdusefastError  # noqa: E402

IDLE = "idle"


def make_file(path: Path) -> None:
    """Write a file of random bytes, so that no hole and no compression flatters anybody."""
    chunk = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(FILE_BYTES >> 20):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def run_rounds(setup: Setup, names: list[str], rounds: int) -> table.Figures:
    """Run every contestant once a round."""
    figures: table.Figures = defaultdict(list)
    for number in range(rounds):
        for name in names:
            figures[name].append(table.CONTESTANTS[name](setup))
            say(f"round {number + 1}: {name}: {figures[name][-1]:.0f}")
    return figures


def measure(setup: Setup, rows: list[table.Row], rounds: int) -> tuple[table.Figures, dict[str, list[str]]]:
    """Measure what `rows` need; a row that cannot be counted here is reported and left out."""
    figures = run_rounds(setup, table.needed(rows), rounds)
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.figure in table.CONTESTANTS:
            continue
        try:
            for _ in range(rounds if row.figure == table.CALLS else 1):  # instructions repeat
                found, notes[row.name] = table.count_row(row, setup)
                for name, value in found.items():
                    figures.setdefault(name, []).append(value)
                    say(f"{name}: {value:.3f}")
        except (RowError, VdusefastError) as error:
            notes[row.name] = [f"not measured: {error}"]
    return figures, notes


def say(text: str) -> None:
    """Tell how far it has come."""
    print(text, file=sys.stderr, flush=True)


def print_idle(figures: dict[str, list[float]]) -> None:
    """Print what a device costs that does nothing."""
    print("\n| idle device | median | spread |\n|---|---:|---:|")
    for name, values in figures.items():
        summary = summarize(values)
        assert summary is not None
        print(f"| {name} | {summary.median:.3g} | {report.spread_text(summary.spread)} |")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; `rows` as names that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*table.BY_NAME, IDLE]
    usual = [name for name in known if name == IDLE or all(map(shutil.which, table.BY_NAME[name].programs))]
    parser.add_argument("--rows", default=",".join(usual), help="names, separated by commas; all unless given")
    parser.add_argument("--list", action="store_true", help="print the rows with their goals, measure nothing")
    parser.add_argument("--rounds", "--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    parser.add_argument("--functions", action="store_true", help="print the instructions of each function, too")
    parser.add_argument("--set", default="", metavar="KEY=VALUE,...", help="configuration of our devices in all rows")
    parser.add_argument("--worker-cpu", type=int, help="of the worker and of fio; the first CPU by default")
    parser.add_argument("--disk-dir", type=Path, default=Path(tempfile.gettempdir()), help="on a disk, with O_DIRECT")
    parser.add_argument("--tmpfs-dir", type=Path, default=Path("/dev/shm"))  # noqa: S108 -- a tmpfs is what is meant
    options = parser.parse_args(arguments)
    options.rows = [name for name in dict.fromkeys(options.rows.split(",")) if name]
    unknown = [name for name in options.rows if name not in known]
    if unknown or not options.rows:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(known)}")
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    try:
        options.settings = parse_settings("--set", options.set)
    except VdusefastError as error:
        parser.error(str(error))
    return options


def print_list() -> None:
    """Print the rows with their goals."""
    for row in table.ROWS:
        sign = "at most" if row.at_most else "at least"
        goals = f"{sign} {row.wanted:g}, moonshot {row.moonshot:g}" if row.wanted and row.moonshot else "no goal"
        print(f"{row.name:<13} {row.what}: {goals}")
    print(f"{IDLE:<13} start, CPU time and memory of a device without a request: no goal")


def check_machine() -> list[int]:
    """Return the CPUs that we may use. Ends the program where there are too few, or no fio."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        sys.exit("speed.py needs two CPUs: one for the worker, one for the driver")
    if shutil.which("fio") is None:
        sys.exit("speed.py needs fio: sudo apt-get install fio")
    return cpus


def run(options: argparse.Namespace, setup: Setup) -> int:
    """Measure and print; 1 when a row could not be measured."""
    rows = [table.BY_NAME[name] for name in options.rows if name != IDLE]
    figures, notes = measure(setup, rows, options.rounds)
    results = [result for row in rows if (result := table.evaluate(row, figures)) is not None]
    if rows:
        report.print_results(results, sys.stdout)
        report.print_figures(figures, sys.stdout)
    for name, lines in notes.items():
        print(f"\n{name}: " + "\n".join(lines if options.functions else lines[:1]))
    idle = measure_idle(setup, options.rounds) if IDLE in options.rows else {}
    if idle:
        print_idle(idle)
    if options.json is not None:
        method: dict[str, Any] = {"rounds": options.rounds, "seconds": options.seconds, "settings": options.settings}
        method |= {"worker_cpu": setup.worker_cpu, "driver_cpu": setup.driver_cpu}
        everything = report.report(results, figures, notes, method) | {"idle": idle}
        options.json.write_text(json.dumps(everything, indent=2) + "\n")
    return 0 if len(results) == len(rows) else 1


def main() -> int:
    """Parse options, make the files, measure, print."""
    options = parse_options()
    if options.list:
        print_list()
        return 0
    cpus = check_machine()
    subprocess.run(["make", "-s", "-C", str(ROOT / "bench" / "micro")], check=True)
    with (
        tempfile.TemporaryDirectory(prefix="vdusefast-speed-", dir=options.tmpfs_dir) as tmpfs,
        tempfile.TemporaryDirectory(prefix="vdusefast-speed-", dir=options.disk_dir) as disk,
    ):
        paths = Path(tmpfs) / "speed.img", Path(disk) / "speed.img"
        worker_cpu = cpus[0] if options.worker_cpu is None else options.worker_cpu
        driver_cpu = next(cpu for cpu in cpus if cpu != worker_cpu)
        setup = Setup(options.seconds, worker_cpu, driver_cpu, *paths, options.settings)
        for path, wanted in zip(paths, (True, {"disk", IDLE} & set(options.rows)), strict=True):
            if wanted:
                make_file(path)
        try:
            return run(options, setup)
        except (RowError, VdusefastError) as error:
            sys.exit(f"speed.py: {error}")


if __name__ == "__main__":
    sys.exit(main())
