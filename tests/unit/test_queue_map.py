"""The queue that each CPU submits to: by the kernel's rule, and as the kernel shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_cpus
import pytest

from vdusefast.host import queue_map, sysfs
from vdusefast.host.cpu_topology import format_cpu_list, read_topology


@pytest.fixture(autouse=True)
def no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the parameters of this machine's own driver out."""
    monkeypatch.setattr(sysfs, "SYS", tmp_path / "sys")


def predicted(root: Path, count: int) -> list[str]:
    return [format_cpu_list(group) for group in queue_map.predict(read_topology(root), count)]


@pytest.mark.parametrize(
    ("machine", "count", "groups"),
    [
        (fake_cpus.two, 1, ["0-1"]),
        (fake_cpus.two, 2, ["0", "1"]),
        (fake_cpus.two, 4, ["0", "1", "", ""]),  # a driver has no more queues than CPUs
        (fake_cpus.two_sockets, 2, ["0-3,8-11", "4-7,12-15"]),
        (fake_cpus.two_sockets, 4, ["0-1,8-9", "2-3,10-11", "4-5,12-13", "6-7,14-15"]),
        (fake_cpus.two_sockets, 3, ["0-3,8-11", "4-5,12-13", "6-7,14-15"]),
        (fake_cpus.two_sockets, 1, ["0-15"]),
        (fake_cpus.hybrid, 4, ["0-1", "2-3", "4-5", "6-7"]),
        (fake_cpus.hybrid, 3, ["0-2", "3-5", "6-7"]),
        (fake_cpus.chiplets, 8, [str(cpu) for cpu in range(8)]),
    ],
)
def test_rule(tmp_path: Path, machine: Callable[[Path], Path], count: int, groups: list[str]) -> None:
    assert predicted(machine(tmp_path / "cpus"), count) == groups


def test_cpus_that_are_offline_have_their_queues_all_the_same(tmp_path: Path) -> None:
    cpus = {i: fake_cpus.FakeCpu(core=i) for i in range(4)}
    root = fake_cpus.write_cpus(tmp_path / "cpus", cpus, online=[0, 2], possible=6)
    assert predicted(root, 4) == ["0,4", "1,5", "2", "3"]
    assert predicted(root, 6) == ["0", "1", "2", "3", "4", "5"]


def test_driver_that_was_told_to_use_fewer_queues_does(tmp_path: Path) -> None:
    parameter = tmp_path / "sys/module/virtio_blk/parameters/num_request_queues"
    parameter.parent.mkdir(parents=True)
    parameter.write_text("2\n")
    assert predicted(fake_cpus.hybrid(tmp_path / "cpus"), 4) == ["0-3", "4-7", "", ""]


def test_kernels_word_is_read(tmp_path: Path) -> None:
    for index, text in ((0, "0, 2, 3"), (1, "1")):
        directory = tmp_path / f"sys/block/vdb/mq/{index}"
        directory.mkdir(parents=True)
        (directory / "cpu_list").write_text(f"{text}\n")
    assert queue_map.read("/dev/vdb", 3) == ({0, 2, 3}, {1}, set())
    with pytest.raises(FileNotFoundError):
        queue_map.read("/dev/vdc", 1)
