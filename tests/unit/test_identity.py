"""Another store under the same name is recognised, and refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vdusefast import Device, make_config
from vdusefast.backends import identity, open_store
from vdusefast.config import BackendConfig, Config
from vdusefast.errors import BackendError
from vdusefast.state import saved_state
from vdusefast.state.saved_state import SavedState
from vdusefast.transport.loopback import LoopbackTransport

MIB = 1 << 20


def identity_of(path: Path | str) -> dict[str, str]:
    with open_store(BackendConfig(uri=f"file:{path}")) as store:
        return store.identity


def make_image(path: Path, fill: bytes = b"a") -> Path:
    path.write_bytes(fill * MIB)
    return path


# -- what is compared


def test_file_keeps_its_identity_by_whatever_name(tmp_path: Path) -> None:
    first = identity_of(make_image(tmp_path / "d.img"))
    (tmp_path / "d.img").rename(tmp_path / "moved.img")
    os.truncate(tmp_path / "moved.img", 2 * MIB)
    assert identity_of(tmp_path / "moved.img") == first
    assert identity.is_same(first, first)
    assert "inode" in identity.text_of(first)


def test_file_that_took_the_name_is_another_one_also_in_the_same_inode(tmp_path: Path) -> None:
    """A file system gives an inode that has become free to the next file: ext4 mostly does at once."""
    first = identity_of(make_image(tmp_path / "d.img"))
    (tmp_path / "d.img").unlink()
    second = identity_of(make_image(tmp_path / "d.img"))
    assert not identity.is_same(first, second)
    reused = {**second, "inode": first["inode"], "device": first["device"]}
    assert not identity.is_same(first, reused)


FILE = {"kind": "file", "device": "8:1", "inode": "12", "made": "5.000000001", "handle": "1:aa"}
SHARE = {**FILE, "device": "0:40"}
DISK = {"kind": "block device", "number": "8:0", "diskseq": "4", "name": "wwid=naa.5000"}
LOOP = {"kind": "block device", "number": "7:0", "diskseq": "4"}


@pytest.mark.parametrize(
    ("old", "changes", "same"),
    [
        (FILE, {}, True),
        (FILE, {"device": "8:2"}, False),
        (FILE, {"inode": "13"}, False),
        (FILE, {"made": "5.000000002"}, False),
        (FILE, {"handle": "1:ab"}, False),
        (FILE, {"made": None}, True),  # a kernel or a file system that does not say it
        (SHARE, {"device": "0:41"}, True),  # mounted again: its handle names it
        (SHARE, {"device": "0:41", "handle": None}, False),
        (SHARE, {"device": "8:1"}, False),
        (DISK, {}, True),
        (DISK, {"diskseq": "9", "number": "8:16"}, True),  # plugged in again
        (DISK, {"name": "wwid=naa.5001"}, False),
        (DISK, {"start": "2048"}, False),  # a partition of it
        ({**DISK, "start": "2048"}, {"start": "4096"}, False),
        (LOOP, {"diskseq": "5"}, False),
        (LOOP, {"diskseq": None}, True),
        (LOOP, {"diskseq": None, "number": "7:1"}, False),
        (DISK, {"kind": "file"}, False),
        ({"kind": "image", "id": "2/abc"}, {"id": "2/abd"}, False),
    ],
)
def test_what_makes_another_store(old: dict[str, str], changes: dict[str, str | None], same: bool) -> None:
    new = {key: value for key, value in {**old, **changes}.items() if value is not None}
    assert identity.is_same(old, new) == same
    assert identity.is_same(new, old) == same
    assert identity.is_same({}, new)


def test_partition_is_known_by_its_disk_and_its_start(tmp_path: Path) -> None:
    disk = tmp_path / "devices/sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "device").mkdir()
    (disk / "device/wwid").write_text("naa.5000c500\n")
    (disk / "sda1/partition").write_text("1\n")
    (disk / "sda1/start").write_text("2048\n")
    (tmp_path / "dev/block").mkdir(parents=True)
    fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    rdev = os.fstat(fd).st_rdev
    (tmp_path / f"dev/block/{os.major(rdev)}:{os.minor(rdev)}").symlink_to(disk / "sda1")
    try:
        found = identity.of_block_device(fd, tmp_path)
    finally:
        os.close(fd)
    assert (found["name"], found["start"]) == ("device/wwid=naa.5000c500", "2048")


@pytest.mark.loop_device
def test_loop_device_that_was_made_anew_is_another_disk(tmp_path: Path, attach_loop: Callable[..., str]) -> None:
    node = attach_loop(make_image(tmp_path / "disk"))
    first = identity_of(node)
    assert identity.is_same(first, identity_of(node))
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert not identity.path_is_other(fd, node)
    finally:
        os.close(fd)
    subprocess.run(["losetup", "--detach", node], check=True, timeout=20)
    subprocess.run(["losetup", node, make_image(tmp_path / "other")], check=True, timeout=20)
    if "diskseq" not in first:
        pytest.skip("this kernel does not count disks")
    assert not identity.is_same(first, identity_of(node))


# -- a device whose store was replaced


def configured(tmp_path: Path) -> Config:
    return make_config(name="d0", uri=f"file:{tmp_path}/d.img", queues=2, queue_size=64)


def replace_image(tmp_path: Path) -> None:
    make_image(tmp_path / "new.img", b"n").rename(tmp_path / "d.img")


def state_path(device: Device) -> Path:
    assert device._directory is not None
    return device._directory.state_path


@pytest.mark.slow
def test_replaced_store_is_refused_until_somebody_says_so(tmp_path: Path) -> None:
    """Nothing is written to it before, by replay or otherwise."""
    make_image(tmp_path / "d.img")
    first = Device(configured(tmp_path))
    first.start()
    bus, path = first.bus, state_path(first)
    with first.driver() as driver:
        driver.write(0, b"first" + bytes(507))
        first.hand_over()
        (tmp_path / "d.img").rename(tmp_path / "old.img")
        replace_image(tmp_path)

        def serve() -> Device:
            device = Device(configured(tmp_path), transport=LoopbackTransport(bus=bus))
            device.start(recover=True)
            return device

        before = path.read_bytes()
        with pytest.raises(BackendError, match=r"d0: file:.*d\.img is another store.*inode.*--other-store"):
            serve()
        assert path.read_bytes() == before
        assert (tmp_path / "d.img").read_bytes() == b"n" * MIB
        with saved_state.any_store(path):
            second = serve()
        assert driver.read(0, 512) == b"n" * 512
        second.hand_over()
        (tmp_path / "old.img").rename(tmp_path / "d.img")  # by now it is the other one
        with pytest.raises(BackendError, match="another store"):
            serve()
        with saved_state.any_store(path):
            third = serve()
        assert driver.read(0, 512)[:5] == b"first"
    third.stop()


@pytest.mark.slow
def test_state_of_a_version_that_wrote_no_identity_is_accepted_once(tmp_path: Path) -> None:
    make_image(tmp_path / "d.img")
    first = Device(configured(tmp_path))
    first.start()
    bus, path = first.bus, state_path(first)
    first.hand_over()
    written = saved_state.load(path)
    assert written is not None
    old: dict[str, Any] = json.loads(msgspec.json.encode(written))
    kept = old.pop("identity")
    saved_state.save(path, msgspec.json.decode(json.dumps(old), type=SavedState))
    second = Device(configured(tmp_path), transport=LoopbackTransport(bus=bus))
    second.start(recover=True)
    written = saved_state.load(path)
    assert written is not None
    assert written.identity == kept
    second.hand_over()
    replace_image(tmp_path)
    with pytest.raises(BackendError, match="another store"):
        Device(configured(tmp_path), transport=LoopbackTransport(bus=bus)).start(recover=True)
    third = Device(configured(tmp_path), transport=LoopbackTransport(bus=bus))
    third.start(recover=True, fail_requests=True)  # to be removed: its store does not matter
    third.stop()


def test_living_device_serves_the_file_that_it_has_opened_and_does_not_resize_another(tmp_path: Path) -> None:
    make_image(tmp_path / "d.img")
    with Device(configured(tmp_path)) as device, device.driver() as driver:
        driver.write(0, b"first" + bytes(507))
        replace_image(tmp_path)
        worker = device.queues()[0].pid
        os.kill(worker, 9)
        assert driver.read(0, 512)[:5] == b"first"  # by the worker that followed
        assert device.queues()[0].pid != worker
        with pytest.raises(BackendError, match="is another store now"):
            device.resize(2 * MIB)
        assert (device.info()["size_bytes"], (tmp_path / "d.img").stat().st_size) == (MIB, MIB)


def test_replaced_store_is_refused_before_the_server_that_serves_lets_go(tmp_path: Path) -> None:
    make_image(tmp_path / "d.img")
    with Device(configured(tmp_path)) as device, device.driver() as driver:
        driver.write(0, b"first" + bytes(507))
        replace_image(tmp_path)
        with pytest.raises(BackendError, match="another store"):
            Device(configured(tmp_path), transport=LoopbackTransport(bus=device.bus)).prove()
        assert driver.read(0, 512)[:5] == b"first"


def test_identity_survives_a_resize(tmp_path: Path) -> None:
    make_image(tmp_path / "d.img")
    with Device(configured(tmp_path)) as device:
        before = saved_state.load(state_path(device))
        device.resize(2 * MIB)
        after = saved_state.load(state_path(device))
    assert isinstance(before, SavedState)
    assert isinstance(after, SavedState)
    assert after.identity == before.identity != {}
