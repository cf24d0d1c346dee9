"""The rows: the two sides of each comparison, its goal, and the measurements that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rows import counted, network, rbd
from rows.contestants import Setup, fio, read_loop, ring_exchange, vdusefast
from rows.python_disks import nbdkit_disk, python_disk
from vdusefast.bench.common.rounds import summarize, verdict

Measure = Callable[[Setup], float]
POLL_US = 1_000_000  # a worker that does not sleep while there is a load


def one_and_one(setup: Setup) -> float:
    """Return IOPS of one queue and one job that share a CPU: the mean of the two CPUs, which are not always alike."""
    half = replace(setup, seconds=setup.seconds / 2)
    cpus = (setup.worker_cpu, setup.driver_cpu)
    return sum(vdusefast(half, "null:16G", cpus=[cpu], driver_cpus=[cpu]) for cpu in cpus) / len(cpus)


def two_and_two(setup: Setup) -> float:
    """Return IOPS of two queues and two jobs, a queue and a job on each CPU."""
    cpus = [setup.worker_cpu, setup.driver_cpu]
    return vdusefast(setup, "null:16G", jobs=2, queues=2, cpus=cpus, driver_cpus=cpus)


# What is timed, by name. Rounds run each that a row needs once.
CONTESTANTS: dict[str, Measure] = {
    "bare ring exchange": ring_exchange,
    "null": lambda s: vdusefast(s, "null:16G"),
    "null, one queue and job, CPU shared": one_and_one,
    "null, two queues and jobs, CPUs shared": two_and_two,
    "bare read loop": read_loop,
    "fio psync, tmpfs": lambda s: fio(s, "psync", s.tmpfs_file, direct=False),
    "fio io_uring, tmpfs": lambda s: fio(s, "io_uring", s.tmpfs_file, direct=False),
    "file on tmpfs, auto": lambda s: vdusefast(s, f"file:{s.tmpfs_file}"),
    "file on tmpfs, uring": lambda s: vdusefast(s, f"file:{s.tmpfs_file}", engine="uring"),
    "fio psync, tmpfs, 128k read": lambda s: fio(s, "psync", s.tmpfs_file, direct=False, rw="read", bs="128k"),
    "file on tmpfs, 128k read": lambda s: vdusefast(s, f"file:{s.tmpfs_file}", rw="read", bs="128k"),
    "fio io_uring, disk": lambda s: fio(s, "io_uring", s.disk_file, direct=True),
    "fio nbd, nbdkit memory": network.fio_nbd,
    "nbdkit memory": network.nbd,
    "file on disk, uring, O_DIRECT": lambda s: vdusefast(s, f"file:{s.disk_file}", engine="uring", cache="none"),
    "nbdkit, Python, a thread": lambda s: nbdkit_disk(s, 1),
    "nbdkit, Python, 16 threads": lambda s: nbdkit_disk(s, 16),
    "Python class": lambda s: python_disk(s, "RamDisk"),
    "Python class, batches": lambda s: python_disk(s, "BatchRamDisk"),
    "fio rbd": rbd.fio,
    "rbd": rbd.ours,
}


@dataclass(frozen=True)
class Row:
    """A line of the table. references: the best of them in a round counts; none: the figure stands by itself.

    at_most: less is better. wanted, moonshot: None = no goal.
    """

    name: str
    what: str
    figure: str
    references: tuple[str, ...] = ()
    wanted: float | None = None
    moonshot: float | None = None
    at_most: bool = False
    digits: int = 2
    programs: tuple[str, ...] = ()  # that not every machine has: the row is left out without them, unless asked for


NBDKIT = ("nbdkit, Python, a thread", "nbdkit, Python, 16 threads")
TMPFS_FIO = ("fio psync, tmpfs", "fio io_uring, tmpfs")
INSTRUCTIONS, CALLS = "instructions a request", "system calls a request"
ROWS: tuple[Row, ...] = (
    Row("instructions", "worker's instructions a request, null (callgrind)", INSTRUCTIONS, (), 250, 120, True, 0),
    Row("syscalls", "worker's system calls a request, tmpfs, uring, polling", CALLS, (), 0.1, 0.03, True, 3),
    Row(
        "scaling",
        "two queues and jobs / one and one, null, each CPU shared",
        "null, two queues and jobs, CPUs shared",
        ("null, one queue and job, CPU shared",),
        1.7,
        1.9,
    ),
    Row("exchange", "null / bare ring exchange", "null", ("bare ring exchange",), 0.7, 0.9),
    Row("read-loop", "tmpfs / bare read loop", "file on tmpfs, auto", ("bare read loop",), 0.85, 1.0),
    Row("fio", "tmpfs / better of fio psync and io_uring", "file on tmpfs, auto", TMPFS_FIO, 1.8, 2.2),
    Row(
        "sequential",
        "tmpfs, 128 KiB sequential / fio psync",
        "file on tmpfs, 128k read",
        ("fio psync, tmpfs, 128k read",),
        0.95,
        1.0,
    ),
    Row("uring", "tmpfs, uring / fio io_uring", "file on tmpfs, uring", ("fio io_uring, tmpfs",)),
    Row(
        "disk",
        "disk, O_DIRECT, uring / fio io_uring",
        "file on disk, uring, O_DIRECT",
        ("fio io_uring, disk",),
        0.95,
        1.0,
    ),
    Row("python", "Python class / the better of nbdkit's Python plugin", "Python class", NBDKIT, 2, 4, digits=1),
    Row("python-batch", "Python class, batches / the same", "Python class, batches", NBDKIT, 5, 15, digits=1),
    Row("rbd", "Ceph RBD / fio rbd, the same image", "rbd", ("fio rbd",), 0.9, 1.0, programs=("ceph-osd", "rbd")),
    Row("nbd", "nbdkit memory / fio nbd", "nbdkit memory", ("fio nbd, nbdkit memory",), 0.9, 1.0),
)
BY_NAME = {row.name: row for row in ROWS}

Figures = dict[str, list[float]]


@dataclass(frozen=True)
class Result:
    """A row as measured. spread: half the range, as a share of the median."""

    row: Row
    value: float
    spread: float
    rounds: int

    @property
    def verdict(self) -> str:
        """See `rounds.verdict`."""
        return verdict(self.value, self.row.wanted, self.row.moonshot, at_most=self.row.at_most)


def needed(rows: Iterable[Row]) -> list[str]:
    """Return the contestants that `rows` need, each once; those that are counted once a row are not among them."""
    names = [name for row in rows for name in (*row.references, row.figure)]
    return [name for name in dict.fromkeys(names) if name in CONTESTANTS]


def evaluate(row: Row, figures: Figures) -> Result | None:
    """Return the median of the rounds' ratios: what slows the machine for a while slows both sides.

    None when there are no figures.
    """
    values: Sequence[float] = figures.get(row.figure, [])
    if row.references:
        others = zip(*(figures.get(name, []) for name in row.references), strict=True)
        values = [value / max(best) for value, best in zip(values, others, strict=True)]
    summary = summarize(values)
    return Result(row, summary.median, summary.spread, summary.count) if summary is not None else None


def count_row(row: Row, setup: Setup) -> tuple[dict[str, float], list[str]]:
    """Measure a row that counts; return its figures by name, and lines that explain them. Raises RowError."""
    if row.figure == INSTRUCTIONS:
        found = counted.instructions(setup)
        lines = [f"{cost:8.1f}  {name}" for name, cost in found.by_function]
        text = f"{found.batch:.1f} requests a batch, {found.idle_turns:.3f} turns a request that found nothing"
        return {row.figure: found.per_request}, [f"{text}; instructions a request by function:", *lines]
    calls = counted.system_calls(setup, f"file:{setup.tmpfs_file}", engine="uring", poll_us=POLL_US)
    return {row.figure: calls.per_request}, [f"{calls.batch:.1f} requests a batch; counted by {calls.how}"]
