"""Machines as /sys shows them, written into a directory: for the tests of topology and placement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vdusefast.host.cpu_topology import format_cpu_list


@dataclass(frozen=True)
class FakeCpu:
    """One CPU: its place, the number of the largest cache that it shares, and what else sysfs may say."""

    package: int = 0
    core: int = 0
    cache: int = 0
    capacity: int | None = None


def write_cpus(
    root: Path, cpus: Mapping[int, FakeCpu], *, online: Iterable[int] | None = None, possible: int = 0
) -> Path:
    """Write a /sys with `cpus`, of which `online` are (all), on a machine that could have `possible` (no more)."""
    base = root / "devices/system/cpu"
    base.mkdir(parents=True)
    running = sorted(cpus if online is None else online)
    last = max(len(cpus), possible) - 1
    lists = {"online": running, "present": cpus, "possible": range(last + 1)}
    for name, listed in lists.items():
        (base / name).write_text(f"{format_cpu_list(listed)}\n")
    for index, cpu in cpus.items():
        directory = base / f"cpu{index}"
        (directory / f"node{cpu.package}").mkdir(parents=True)
        if index not in running:
            continue
        others = {other: cpus[other] for other in running}
        cores = [o for o, place in others.items() if (place.package, place.core) == (cpu.package, cpu.core)]
        shared = [o for o, place in others.items() if (place.package, place.cache) == (cpu.package, cpu.cache)]
        _write(directory / "topology", {"physical_package_id": cpu.package, "core_id": cpu.core})
        _write(directory / "topology", {"thread_siblings_list": format_cpu_list(cores)})
        _write(directory / "cache/index1", {"level": 1, "type": "Instruction", "shared_cpu_list": "0-99"})
        _write(directory / "cache/index2", {"level": 2, "type": "Unified", "shared_cpu_list": format_cpu_list(cores)})
        _write(directory / "cache/index3", {"level": 3, "type": "Unified", "shared_cpu_list": format_cpu_list(shared)})
        if cpu.capacity is not None:
            _write(directory, {"cpu_capacity": cpu.capacity})
    return root


def two(root: Path) -> Path:
    """Return a small virtual machine."""
    return write_cpus(root, {0: FakeCpu(core=0), 1: FakeCpu(core=1)})


def two_sockets(root: Path) -> Path:
    """Return 8 cores of 2 threads in 2 packages, numbered as Intel does: the siblings of 0 to 7 are 8 to 15."""
    return write_cpus(root, {i: FakeCpu(package=i % 8 // 4, core=i % 4) for i in range(16)})


def hybrid(root: Path) -> Path:
    """Return 2 large cores of 2 threads (0 to 3, siblings adjacent) and 4 small ones, all under one cache."""
    large = {i: FakeCpu(core=i // 2, capacity=1024) for i in range(4)}
    return write_cpus(root, {**large, **{i: FakeCpu(core=i, capacity=500) for i in range(4, 8)}})


def chiplets(root: Path) -> Path:
    """Return 8 cores of one thread, in 2 groups that share a cache each: 0 to 3 and 4 to 7."""
    return write_cpus(root, {i: FakeCpu(core=i, cache=i // 4) for i in range(8)})


def _write(directory: Path, values: Mapping[str, object]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (directory / name).write_text(f"{value}\n")
