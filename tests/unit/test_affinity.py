"""CPU lists, topology and pinning plans."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vdusefast.errors import ConfigError
from vdusefast.host import cpu_topology


def make_sysfs(root: Path, cpus: dict[int, tuple[int, int]], online: str) -> Path:
    """Write a /sys with `cpus`: index -> (package, core)."""
    base = root / "devices/system/cpu"
    base.mkdir(parents=True)
    (base / "online").write_text(f"{online}\n")
    for index, (package, core) in cpus.items():
        topology = base / f"cpu{index}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")
        siblings = [other for other, place in cpus.items() if place == (package, core)]
        (topology / "thread_siblings_list").write_text(cpu_topology.format_cpu_list(siblings) + "\n")
    return root


@pytest.fixture
def smt(tmp_path: Path) -> Path:
    """Return two packages of two cores of two threads; the siblings of 0-3 are 4-7."""
    return make_sysfs(tmp_path, {index: (index % 4 // 2, index % 2) for index in range(8)}, "0-7")


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("3,0-1", [3, 0, 1]), (" 2 , 4-4 ", [2, 4]), ("1,1", [1, 1])]
)
def test_cpu_list_is_parsed_in_the_order_written(text: str, cpus: list[int]) -> None:
    assert cpu_topology.parse_cpu_list(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "0-99999999", "1;2", "1,,2"])
def test_what_is_no_cpu_list_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(ConfigError, match=text or "''"):
        cpu_topology.parse_cpu_list(text)


@pytest.mark.parametrize(("cpus", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8"), ([1, 0], "0-1")])
def test_cpu_list_is_written_as_the_kernel_does(cpus: list[int], text: str) -> None:
    assert cpu_topology.format_cpu_list(cpus) == text


def test_topology_is_read_from_sysfs(smt: Path) -> None:
    topology = cpu_topology.read_topology(smt, allowed=range(8))
    assert topology.online == tuple(range(8))
    assert topology.core_count == 4
    assert topology.cpus[6] == cpu_topology.Cpu(index=6, package=1, core=0, siblings=(2, 6))


def test_plan_takes_physical_cores_first_and_siblings_last(smt: Path) -> None:
    topology = cpu_topology.read_topology(smt, allowed=range(8))
    assert cpu_topology.plan(8, topology) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert cpu_topology.plan(2, topology) == [0, 1]


def test_plan_stays_within_the_allowed_set(smt: Path) -> None:
    topology = cpu_topology.read_topology(smt, allowed=[1, 2, 6, 99])
    assert topology.allowed == {1, 2, 6}
    assert cpu_topology.plan(3, topology) == [1, 2, 6]


def test_plan_wraps_around_evenly(smt: Path) -> None:
    topology = cpu_topology.read_topology(smt, allowed=[0, 1])
    assert cpu_topology.plan(5, topology) == [0, 1, 0, 1, 0]


def test_plan_avoids_cpus_and_cores_that_are_taken(smt: Path) -> None:
    topology = cpu_topology.read_topology(smt, allowed=range(8))
    assert cpu_topology.plan(3, topology, taken=[0, 5]) == [2, 3, 4]


def test_plan_skips_what_is_offline(tmp_path: Path) -> None:
    sysfs = make_sysfs(tmp_path, {index: (0, index) for index in range(4)}, "0,2-3")
    topology = cpu_topology.read_topology(sysfs, allowed=range(4))
    assert cpu_topology.plan(3, topology) == [0, 2, 3]


def test_plan_without_a_usable_cpu_is_an_error(smt: Path) -> None:
    with pytest.raises(ConfigError, match="no CPU"):
        cpu_topology.plan(1, cpu_topology.read_topology(smt, allowed=[]))


def test_without_sysfs_every_cpu_is_a_core(tmp_path: Path) -> None:
    topology = cpu_topology.read_topology(tmp_path)
    assert len(topology.cpus) == os.cpu_count() == topology.core_count


def test_this_machine_has_a_plan_for_one_queue() -> None:
    topology = cpu_topology.read_topology()
    assert topology.allowed == os.sched_getaffinity(0)
    assert cpu_topology.plan(1, topology)[0] in topology.allowed


def test_cpu_that_does_not_exist_is_named_with_those_that_do(smt: Path) -> None:
    topology = cpu_topology.read_topology(smt, allowed=[0, 1])
    with pytest.raises(ConfigError, match=r"queue\[1\]\.cpu: CPU 99 does not exist; this machine has 0-7"):
        cpu_topology.check_cpu(99, topology, "queue[1].cpu")
    with pytest.raises(ConfigError, match=r"CPU 5 is not allowed for this process, which may use 0-1"):
        cpu_topology.check_cpu(5, topology, "queue[0].cpu")
    cpu_topology.check_cpu(5, topology, "queue[0].irq_cpu", pinned=False)
