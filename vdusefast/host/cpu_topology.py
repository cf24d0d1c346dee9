"""CPU topology of this machine and pinning plans: which queue goes to which CPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from vdusefast.errors import ConfigError

CPU_COUNT_MAX = 8192  # CONFIG_NR_CPUS of the largest kernels


CAPACITY_FULL = 1024  # the kernel's capacity of the fastest CPU
CAPACITY_SMALL = 512  # of small cores of a hybrid machine whose kernel does not report capacities
CACHE_INDEX_MAX = 8


class Distance(IntEnum):
    """The distance of two CPUs: what a cache line crosses on its way."""

    SAME = 0
    SIBLING = 1  # another thread of the core
    CACHE = 2  # a cache that both share
    PACKAGE = 3
    FAR = 4


@dataclass(frozen=True, slots=True)
class Cpu:
    """One logical CPU. `core`, `package` and `node` are the kernel's numbers; `siblings` are the CPUs of its core, it
    too.

    cache: the CPUs that share its largest cache, it too; empty where that is not known. capacity: how fast it is; the
    fastest have CAPACITY_FULL.
    """

    index: int
    package: int
    core: int
    siblings: tuple[int, ...]
    node: int = 0
    cache: frozenset[int] = frozenset()
    capacity: int = CAPACITY_FULL

    def distance(self, other: Cpu) -> Distance:
        """Return how far another CPU is."""
        if other.index == self.index:
            return Distance.SAME
        if other.index in self.siblings:
            return Distance.SIBLING
        if other.index in self.cache:
            return Distance.CACHE
        return Distance.PACKAGE if (other.package, other.node) == (self.package, self.node) else Distance.FAR


@dataclass(frozen=True, slots=True)
class Topology:
    """The CPUs that are online, and those of them that this process may use.

    absent: CPUs that there could be: of those only that may still be plugged in, `plugged` says which are offline only.
    """

    cpus: tuple[Cpu, ...]
    allowed: frozenset[int]
    absent: tuple[Cpu, ...] = ()
    plugged: frozenset[int] = frozenset()

    @property
    def online(self) -> tuple[int, ...]:
        """Return the indices of the CPUs that are online, in order."""
        return tuple(cpu.index for cpu in self.cpus)

    @property
    def core_count(self) -> int:
        """Return the number of physical cores that are online."""
        return len({cpu.siblings for cpu in self.cpus})


def parse_cpu_list(text: str, where: str = "") -> list[int]:
    """Return the CPUs of a list such as "0-3,8", in the order written.

    Raises ConfigError, which begins with `where`, when the text is not a list of CPUs.
    """
    cpus: list[int] = []
    for word in text.strip().split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"{where}{text!r} is not a list of CPUs; write for example 0,1 or 0-3")
        start, stop = int(first), int(last if dash else first)
        if stop < start or stop >= CPU_COUNT_MAX:
            raise ConfigError(f"{where}{text!r}: {word.strip()!r} is not a range of CPUs")
        cpus.extend(range(start, stop + 1))
    return cpus


def format_cpu_list(cpus: Iterable[int]) -> str:
    """Return CPUs as the kernel writes them: sorted, runs as "first-last"."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_topology(sysfs: Path = Path("/sys"), allowed: Iterable[int] | None = None) -> Topology:
    """Return the topology below `sysfs`.

    allowed: the CPUs that may be used; None asks for this process's own set.
    Where the kernel shows no topology (some containers), every CPU counts as a core of its own.
    """
    root = sysfs / "devices/system/cpu"
    text = _read(root / "online")
    online = parse_cpu_list(text) if text else list(range(os.cpu_count() or 1))
    if allowed is None:
        allowed = os.sched_getaffinity(0)
    small = set(_read_list(sysfs / "devices/cpu_atom/cpus"))
    cpus = tuple(_read_cpu(root / f"cpu{index}", index, small) for index in sorted(online))
    absent = sorted(set(_read_list(root / "possible")) - set(online))
    return Topology(
        cpus,
        frozenset(allowed) & frozenset(online),
        # The kernel counts such a CPU as a core of its own.
        tuple(Cpu(index, 0, index, (index,), _read_node(root / f"cpu{index}")) for index in absent),
        frozenset(_read_list(root / "present")) & frozenset(absent),
    )


def check_possible(cpu: int, topology: Topology, what: str) -> None:
    """Check that this machine has or could have a CPU. Raises ConfigError as `check_cpu`."""
    if cpu not in {absent.index for absent in topology.absent}:
        check_cpu(cpu, topology, what, pinned=False)


def check_cpu(cpu: int, topology: Topology, what: str, *, pinned: bool = True) -> None:
    """Check that `cpu` exists and, when something is to be pinned to it, that this process may use it.

    Raises ConfigError that names `what`, the CPU and the CPUs that there are.
    """
    if cpu not in topology.online:
        raise ConfigError(f"{what}: CPU {cpu} does not exist; this machine has {format_cpu_list(topology.online)}")
    if pinned and cpu not in topology.allowed:
        raise ConfigError(
            f"{what}: CPU {cpu} is not allowed for this process, which may use {format_cpu_list(topology.allowed)}; "
            "see taskset(1) and the cpuset of its control group"
        )


def plan(count: int, topology: Topology, taken: Iterable[int] = ()) -> list[int]:
    """Return CPUs for `count` queues: physical cores first, SMT siblings last, within the allowed set.

    taken: CPUs in use already, as often as they are used. More queues than CPUs wrap around evenly.
    """
    candidates = [cpu for cpu in topology.cpus if cpu.index in topology.allowed]
    if not candidates:
        raise ConfigError("no CPU is both online and allowed for this process")
    used = Counter(taken)
    chosen: list[int] = []
    for _ in range(count):
        best = min(candidates, key=lambda cpu: _cost(cpu, used))
        used[best.index] += 1
        chosen.append(best.index)
    return chosen


def _cost(cpu: Cpu, used: Counter[int]) -> tuple[int, int, int, int, int]:
    """Return the sort key of a CPU: an unused CPU first, then an idle core, then the lowest place."""
    return (used[cpu.index], sum(used[sibling] for sibling in cpu.siblings), cpu.package, cpu.core, cpu.index)


def _read(path: Path) -> str:
    """Return the text of a sysfs file, "" when the kernel does not show it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _read_list(path: Path) -> list[int]:
    """Return the CPUs that a sysfs file lists, none when the kernel does not show it."""
    text = _read(path)
    return parse_cpu_list(text, f"{path}: ") if text else []


def _read_cpu(directory: Path, index: int, small: set[int]) -> Cpu:
    """Return one CPU as sysfs describes it. small: the known small cores of a hybrid machine."""
    topology = directory / "topology"
    package, core = _read(topology / "physical_package_id"), _read(topology / "core_id")
    siblings = _read(topology / "thread_siblings_list")
    capacity = _read(directory / "cpu_capacity")
    return Cpu(
        index,
        int(package) if package else 0,
        int(core) if core else index,
        tuple(parse_cpu_list(siblings)) if siblings else (index,),
        _read_node(directory),
        _read_cache(directory / "cache"),
        int(capacity) if capacity else CAPACITY_SMALL if index in small else CAPACITY_FULL,
    )


def _read_node(directory: Path) -> int:
    """Return the number of a CPU's memory node, 0 where the kernel has none."""
    found = sorted(directory.glob("node[0-9]*"))
    return int(found[0].name.removeprefix("node")) if found else 0


def _read_cache(directory: Path) -> frozenset[int]:
    """Return the CPUs that share the largest cache of one CPU: the one of the highest level that holds data."""
    best_level, shared = 0, frozenset[int]()
    for place in range(CACHE_INDEX_MAX):
        cache = directory / f"index{place}"
        level, cpus = _read(cache / "level"), _read(cache / "shared_cpu_list")
        if level and cpus and _read(cache / "type") != "Instruction" and int(level) > best_level:
            best_level, shared = int(level), frozenset(parse_cpu_list(cpus))
    return shared
