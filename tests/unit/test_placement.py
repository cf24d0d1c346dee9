"""The CPUs of workers and interrupts on machines of several shapes, and the messages about them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fake_cpus
import pytest
import supervised

from vdusefast import api
from vdusefast.cli import render
from vdusefast.config import Config, make_config
from vdusefast.control import device_parts, placement
from vdusefast.control.placement import Placement, QueuePlace, place
from vdusefast.host import queue_map, sysfs
from vdusefast.host.cpu_topology import CAPACITY_FULL, Distance, Topology, read_topology


@pytest.fixture(autouse=True)
def no_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysfs, "SYS", tmp_path / "sys")


def make(queues: int, **overrides: Any) -> Config:
    return make_config(name="vd0", uri="null:1G", transport="kernel", queues=queues, **{"cpus": "auto", **overrides})


def placed(root: Path, queues: int, allowed: Iterable[int] | None = None, **overrides: Any) -> Placement:
    topology = read_topology(root, allowed=range(64) if allowed is None else allowed)
    return place(make(queues, **overrides), topology, queue_map.predict(topology, queues), "a test")


def check_rules(plan: Placement, topology: Topology) -> None:
    """Check what must be true of every plan."""
    online = {cpu.index for cpu in topology.cpus}
    for queue in plan.queues:
        assert queue.cpu == -1 or queue.cpu in topology.allowed
        assert queue.irq_cpu == -1 or queue.irq_cpu in online
        assert queue.cpu_reason
    pinned = [cpu for cpu in plan.cpus if cpu >= 0]
    assert len(set(pinned)) == len(pinned), "two workers on one CPU"


def test_distances_are_those_of_the_machine(tmp_path: Path) -> None:
    sockets = read_topology(fake_cpus.two_sockets(tmp_path / "a"), allowed=range(16)).cpus
    assert [sockets[0].distance(sockets[other]) for other in (0, 8, 1, 4)] == [
        Distance.SAME,
        Distance.SIBLING,
        Distance.CACHE,
        Distance.FAR,
    ]
    chiplets = read_topology(fake_cpus.chiplets(tmp_path / "b"), allowed=range(8)).cpus
    assert chiplets[0].distance(chiplets[4]) == Distance.PACKAGE
    hybrid = read_topology(fake_cpus.hybrid(tmp_path / "c"), allowed=range(8)).cpus
    assert [cpu.capacity for cpu in hybrid] == [1024] * 4 + [500] * 4


def test_small_cores_are_known_where_the_kernel_lists_them(tmp_path: Path) -> None:
    root = fake_cpus.two(tmp_path / "a")
    (root / "devices/cpu_atom").mkdir()
    (root / "devices/cpu_atom/cpus").write_text("1\n")
    assert [cpu.capacity == CAPACITY_FULL for cpu in read_topology(root).cpus] == [True, False]


@pytest.mark.parametrize("queues", [1, 2])
def test_two_cpus_are_left_to_the_scheduler(tmp_path: Path, queues: int) -> None:
    plan = placed(fake_cpus.two(tmp_path / "a"), queues)
    assert plan.cpus == [-1] * queues
    assert plan.irq_cpus == (None,) * queues
    assert all(queue.cpu_reason.startswith(f"not pinned: {queues} queue") for queue in plan.queues)
    assert not plan.advice


def test_one_queue_of_many_cpus_has_its_worker_and_its_interrupts_apart(tmp_path: Path) -> None:
    (queue,) = placed(fake_cpus.chiplets(tmp_path / "a"), 1).queues
    assert (queue.cpu, queue.irq_cpu, queue.submit_cpus) == (7, 0, "0-7")
    assert queue.irq_reason == "submits to this queue, and has no worker"


def test_as_many_queues_as_cpus_leave_workers_to_the_scheduler(tmp_path: Path) -> None:
    plan = placed(fake_cpus.chiplets(tmp_path / "a"), 8)
    assert plan.cpus == [-1] * 8
    assert plan.irq_cpus == (None,) * 8
    assert plan.advice[0].startswith("8 queues on 8 CPUs: when all are busy, fewer are faster: queues = 4 leaves")


def test_worker_is_in_the_same_package_on_no_core_that_submits(tmp_path: Path) -> None:
    root = fake_cpus.two_sockets(tmp_path / "a")
    topology = read_topology(root, allowed=range(16))
    plan = placed(root, 4)
    check_rules(plan, topology)
    assert not plan.advice
    for queue, group in zip(plan.queues, queue_map.predict(topology, 4), strict=True):
        worker = topology.cpus[queue.cpu]
        assert worker.index not in group
        assert all(worker.distance(topology.cpus[cpu]) == Distance.CACHE for cpu in group), queue
        assert queue.irq_cpu in group
        assert queue.irq_cpu not in plan.cpus
        assert queue.cpu_reason == "does not submit to this queue, shares a cache with those that do"


def test_far_worker_is_called_so(tmp_path: Path) -> None:
    plan = placed(fake_cpus.two_sockets(tmp_path / "a"), 2)  # a queue for each package
    assert [queue.cpu // 4 % 2 for queue in plan.queues] == [1, 0]
    assert all("another package" in queue.cpu_reason for queue in plan.queues)


def test_worker_stays_under_the_cache_of_its_chiplet(tmp_path: Path) -> None:
    plan = placed(fake_cpus.chiplets(tmp_path / "a"), 4)  # 0-1, 2-3, 4-5, 6-7
    assert [queue.cpu // 4 for queue in plan.queues] == [0, 0, 1, 1]


def test_large_cores_are_taken_before_small_ones(tmp_path: Path) -> None:
    plan = placed(fake_cpus.hybrid(tmp_path / "a"), 4)  # 0-1 and 2-3 are a large core each
    assert plan.queues[0].cpu in (2, 3)
    assert plan.queues[1].cpu in (0, 1)
    assert all(queue.cpu >= 4 and "a small core" in queue.cpu_reason for queue in plan.queues[2:])


def test_sibling_of_a_cpu_that_submits_is_the_last_choice_but_one(tmp_path: Path) -> None:
    topology = read_topology(fake_cpus.two_sockets(tmp_path / "a"), allowed=[0, 8, 9])
    (queue,) = place(make(1), topology, (frozenset({0}),)).queues
    assert queue.cpu == 9
    topology = read_topology(tmp_path / "a", allowed=[0, 8])
    (queue,) = place(make(1), topology, (frozenset({0}),)).queues
    assert queue.cpu == 8
    assert "shares a core with one that does" in queue.cpu_reason


def test_workers_stay_within_what_the_process_may_use(tmp_path: Path) -> None:
    root = fake_cpus.two_sockets(tmp_path / "a")
    plan = placed(root, 2, allowed=[3, 7])
    check_rules(plan, read_topology(root, allowed=[3, 7]))
    assert sorted(plan.cpus) == [3, 7]
    crowded = placed(root, 4, allowed=[3, 7])
    assert crowded.cpus == [-1] * 4
    assert [a for a in crowded.advice if "16 CPUs, of which workers may use 2" in a and "queues = 2 leaves" in a]


def test_nothing_goes_to_a_cpu_that_is_offline(tmp_path: Path) -> None:
    cpus = {i: fake_cpus.FakeCpu(core=i) for i in range(8)}
    root = fake_cpus.write_cpus(tmp_path / "a", cpus, online=[0, 1, 4, 5])
    plan = placed(root, 4)  # 0-1, 2-3, 4-5, 6-7
    check_rules(plan, read_topology(root, allowed=range(8)))
    assert [queue.cpu >= 0 for queue in plan.queues] == [True, False, True, False]
    assert plan.queues[1].irq_cpu == -1
    assert plan.advice[0].startswith("2 of 4 queues get no request")


def test_more_queues_than_the_driver_takes_are_named(tmp_path: Path) -> None:
    plan = placed(fake_cpus.two(tmp_path / "a"), 5)
    assert plan.advice[0].startswith("3 of 5 queues get no request")
    assert "queues = 2 does the same with fewer processes" in plan.advice[0]


@pytest.mark.slow
@pytest.mark.parametrize("machine", [fake_cpus.two, fake_cpus.two_sockets, fake_cpus.hybrid, fake_cpus.chiplets])
@pytest.mark.parametrize("queues", [1, 2, 3, 4, 7, 8, 16, 64])
@pytest.mark.parametrize("allowed", [range(64), [1], [0, 1, 5]])
def test_rules_hold_on_every_machine(
    tmp_path: Path, machine: Callable[[Path], Path], queues: int, allowed: Iterable[int]
) -> None:
    root = machine(tmp_path / "a")
    check_rules(placed(root, queues, allowed), read_topology(root, allowed=allowed))


def test_what_is_configured_stays(tmp_path: Path) -> None:
    config = make(2, cpus="")
    queues = [type(config.queue[0])(cpu=5, irq_cpu=6), type(config.queue[0])()]
    config = Config(device=make(2).device, backend=config.backend, queue=queues)
    topology = read_topology(fake_cpus.two_sockets(tmp_path / "a"), allowed=range(16))
    plan = place(config, topology, queue_map.predict(topology, 2))
    assert (plan.queues[0].cpu, plan.queues[0].irq_cpu, plan.queues[0].cpu_reason) == (5, 6, "as configured")
    assert plan.queues[1].cpu not in (-1, 5)


def test_without_auto_nothing_is_placed(tmp_path: Path) -> None:
    plan = placed(fake_cpus.two_sockets(tmp_path / "a"), 2, cpus="")
    assert (plan.cpus, plan.irq_cpus) == ([-1, -1], (None, None))
    assert not plan.advice


def test_unknown_drivers_workers_are_spread_over_cores(tmp_path: Path) -> None:
    topology = read_topology(fake_cpus.two_sockets(tmp_path / "a"), allowed=range(16))
    plan = place(make(3, bus="vhost"), topology, None)
    assert plan.cpus == [0, 1, 2]
    assert plan.irq_cpus == (None, None, None)


def test_foreseen_is_the_rule_and_observed_what_the_disk_has(tmp_path: Path) -> None:
    config = make(1)
    assert placement.foresee(config).source == "as the kernel's rule has it"
    assert placement.observe(config, "") is None
    assert placement.observe(config, "/dev/vdq") is None
    directory = tmp_path / "sys/block/vdq/mq/0"
    directory.mkdir(parents=True)
    (directory / "cpu_list").write_text("0\n")
    found = placement.observe(config, "/dev/vdq")
    assert found is not None
    assert found.queues[0].submit_cpus == "0"
    assert "/sys/block/vdq/mq" in found.source


def test_plan_is_told_in_words(tmp_path: Path) -> None:
    text = render.placement_text("vd0", placed(fake_cpus.two(tmp_path / "a"), 3).to_dict())
    assert "queue 1 (requests from CPU 1)\n  worker      -: not pinned" in text
    assert "\n  interrupts  -: as the kernel has them, among the CPUs that submit to this queue\n" in text
    assert "\nadvice: 1 of 3 queues get no request" in text


def affinity_of(pid: int) -> set[int]:
    """Return where a process runs, nowhere while there is none."""
    try:
        return os.sched_getaffinity(pid)
    except OSError:
        return set()


@pytest.mark.slow
def test_workers_are_moved_when_requests_come_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are the workers that take their place."""
    allowed = sorted(os.sched_getaffinity(0))
    cpus = [allowed[-1], allowed[0]]
    seen = Placement(tuple(QueuePlace(i, "", cpu, "why", cpu, "") for i, cpu in enumerate(cpus)), "seen")
    monkeypatch.setattr(device_parts, "observe", lambda config, node: seen)
    with api.Device(make_config(name="d0", uri="memory:1M", queues=2)) as device:
        assert device.info()["placement"]["source"] == "seen"
        queues = device.queues()
        assert [(queue.cpu, queue.irq_cpu) for queue in queues] == [(cpu, cpu) for cpu in cpus]
        assert [os.sched_getaffinity(queue.pid) for queue in queues] == [{cpu} for cpu in cpus]
        os.kill(queues[0].pid, signal.SIGKILL)
        supervised.wait_until(lambda: device.queues()[0].restarts == 1)
        supervised.wait_until(lambda: affinity_of(device.queues()[0].pid) == {cpus[0]})
