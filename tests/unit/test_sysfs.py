"""Reads and writes below /sys, on a made-up copy of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vdusefast.host import containers, sysfs


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysfs, "SYS", tmp_path / "sys")
    monkeypatch.setattr(sysfs, "DEV", tmp_path / "dev")
    for driver in ("virtio_vdpa", "vhost_vdpa"):
        path = tmp_path / "sys/bus/vdpa/drivers" / driver
        path.mkdir(parents=True)
        (path / "bind").touch()
        (path / "unbind").touch()
    device = tmp_path / "sys/bus/vdpa/devices/vd0"
    device.mkdir(parents=True)
    (device / "driver_override").touch()
    (tmp_path / "dev").mkdir()
    return tmp_path


def bind_to(root: Path, driver: str) -> None:
    (root / "sys/bus/vdpa/devices/vd0/driver").symlink_to(root / "sys/bus/vdpa/drivers" / driver)


def read(root: Path, path: str) -> str:
    return (root / "sys/bus/vdpa" / path).read_text()


def add_node(root: Path, entry: str, number: str, target: str) -> None:
    shown = root / "sys/bus/vdpa/devices/vd0" / entry
    shown.mkdir(parents=True)
    (shown / "dev").write_text(number + "\n")
    (root / "dev" / shown.name).symlink_to(target)


def number_of(path: str) -> str:
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def test_a_device_is_taken_from_the_wrong_driver_and_given_to_the_right_one(root: Path) -> None:
    bind_to(root, "vhost_vdpa")
    sysfs.bind("vd0", "virtio_vdpa")
    assert read(root, "devices/vd0/driver_override") == "virtio_vdpa"
    assert read(root, "drivers/vhost_vdpa/unbind") == "vd0"
    assert read(root, "drivers/virtio_vdpa/bind") == "vd0"


def test_a_device_that_has_its_driver_keeps_it(root: Path) -> None:
    bind_to(root, "virtio_vdpa")
    sysfs.bind("vd0", "virtio_vdpa")
    assert read(root, "devices/vd0/driver_override") == "virtio_vdpa"
    assert read(root, "drivers/virtio_vdpa/bind") == ""


def test_a_device_without_a_driver_is_only_bound(root: Path) -> None:
    assert sysfs.bound_driver("vd0") == ""
    sysfs.bind("vd0", "vhost_vdpa")
    assert read(root, "drivers/vhost_vdpa/bind") == "vd0"
    assert read(root, "drivers/virtio_vdpa/unbind") == ""


@pytest.mark.parametrize("entry", ["virtio3/block/vdq", "vhost-vdpa-7"])
def test_the_node_is_found_by_its_number(root: Path, entry: str) -> None:
    assert sysfs.node("vd0") == ""
    add_node(root, entry, number_of("/dev/null"), "/dev/null")
    assert sysfs.node("vd0") == str(root / "dev" / Path(entry).name)
    assert sysfs.node("vd1") == ""


@pytest.mark.parametrize(("number", "target"), [(number_of("/dev/null"), "/dev/zero"), ("254:0", "nowhere")])
def test_a_node_that_is_stale_or_not_there_yet(
    root: Path, number: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for where the kernel makes nodes, and named where it does not, as in a container."""
    add_node(root, "virtio3/block/vdq", number, target)
    assert sysfs.node_here("vd0") == ""
    assert sysfs.node_number("vd0") == number
    monkeypatch.setattr(containers, "has_own_dev", lambda _directory: False)
    assert sysfs.node("vd0") == ""
    monkeypatch.setattr(containers, "has_own_dev", lambda _directory: True)
    assert sysfs.node("vd0") == str(root / "dev/vdq")


def test_a_refused_attribute_is_named(root: Path) -> None:
    (root / "sys/class/vduse/vd0").mkdir(parents=True)
    with pytest.raises(OSError, match="bounce_size"):
        sysfs.set_attribute("vd0", "bounce_size", "1")


@pytest.mark.parametrize(
    ("cpus", "mask"),
    [
        ([0], "00000001"),
        ([31], "80000000"),
        ([32], "00000001,00000000"),
        ([0, 65], "00000002,00000000,00000001"),
        ([], "0" * 8),
    ],
)
def test_a_cpu_mask_has_words_of_32_bits(cpus: list[int], mask: str) -> None:
    assert sysfs.pack_mask(cpus) == mask
    assert sysfs.unpack_mask(mask) == set(cpus)


def test_masks_are_read_as_the_kernel_writes_them(root: Path) -> None:
    assert sysfs.unpack_mask("00000002,00000003") == {0, 1, 33}
    online = root / "sys/devices/system/cpu/online"
    online.parent.mkdir(parents=True)
    online.write_text("0-2,5,8-9\n")
    assert sysfs.online_cpus() == {0, 1, 2, 5, 8, 9}
    online.with_name("possible").write_text("0-9\n")
    assert not sysfs.all_cpus_online()
    online.write_text("0-9\n")
    assert sysfs.all_cpus_online()


def test_the_scheduler_of_a_disk_is_changed_once(root: Path) -> None:
    path = root / "sys/bus/vdpa/devices/vd0/virtio0/block/vda/queue/scheduler"
    path.parent.mkdir(parents=True)
    path.write_text("[mq-deadline] kyber none\n")
    sysfs.set_scheduler("vd0", "none")
    assert path.read_text().startswith("none")
    path.write_text("[none] mq-deadline\n")
    sysfs.set_scheduler("vd0", "none")
    assert path.read_text() == "[none] mq-deadline\n"
    sysfs.set_scheduler("vd1", "none")  # has no disk
