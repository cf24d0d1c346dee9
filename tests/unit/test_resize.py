"""A device gets another size while it is used: store, workers, configuration space, in an order that is safe."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vdusefast import Device, DeviceBusyError, TimedOutError, VdusefastError, make_config
from vdusefast.backends import open_store
from vdusefast.cli import app as cli
from vdusefast.config import BackendConfig
from vdusefast.control import worker_slot
from vdusefast.control.resize import choose_bytes, present_bytes, set_bytes
from vdusefast.control.vq_states import VqState
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import BackendError, ConfigError
from vdusefast.server.served_device import ResizeParams
from vdusefast.server.service import Service
from vdusefast.state import saved_state
from vdusefast.transport.loopback import LoopbackTransport

MIB = 1 << 20
BLOCK = b"vdusefast-resize" * 256  # 4 KiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    os.truncate(path, 2 * MIB)
    return path


@pytest.fixture
def device(image: Path) -> Iterator[Device]:
    with Device(make_config(name="d0", uri=f"file:{image}", queues=2, queue_size=64)) as made:
        yield made


def config_irqs(device: Device) -> int:
    """Return how many configuration interrupts have come since the last look, waiting for the first a while."""
    fd = device.bus.config_irqfd
    return os.eventfd_read(fd) if select.select([fd], [], [], 2.0)[0] else 0


def assert_ends_at(driver: LoopbackDriver, size_bytes: int) -> None:
    """The device is that large for its driver and for every worker."""
    assert driver.capacity_bytes == size_bytes
    for queue in range(driver.queue_count):
        driver.write(size_bytes - len(BLOCK), BLOCK, queue=queue)
        assert driver.read(size_bytes - len(BLOCK), len(BLOCK), queue=queue) == BLOCK
        with pytest.raises(OSError, match="Input/output error") as caught:
            driver.read(size_bytes, 512, queue=queue)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="Input/output error"):
            driver.write(size_bytes - 512, bytes(1024), queue=queue)


# -- the device


def test_grown_device_is_used_to_its_new_end(device: Device, image: Path) -> None:
    with device.driver() as driver:
        driver.write(0, BLOCK)
        assert_ends_at(driver, 2 * MIB)
        assert device.resize(5 * MIB) == 5 * MIB
        assert config_irqs(device) == 1
        assert_ends_at(driver, 5 * MIB)
        assert driver.read(0, len(BLOCK)) == BLOCK
        assert driver.read(3 * MIB, 4096) == bytes(4096)
    assert image.stat().st_size == 5 * MIB
    assert device.info()["size_bytes"] == 5 * MIB
    assert device.failure is None


def test_shrunk_device_ends_where_it_says(device: Device, image: Path) -> None:
    with device.driver() as driver:
        with pytest.raises(VdusefastError, match=f"loses all from byte {MIB} to {2 * MIB - 1}; .* --force"):
            device.resize(MIB)
        assert_ends_at(driver, 2 * MIB)
        assert device.resize(MIB, force=True) == MIB
        assert config_irqs(device) == 1
        assert_ends_at(driver, MIB)
    assert image.stat().st_size == MIB


@pytest.mark.slow
def test_store_that_somebody_has_grown_is_looked_at_again(device: Device, image: Path) -> None:
    with device.driver() as driver:
        os.truncate(image, 4 * MIB)
        assert driver.capacity_bytes == 2 * MIB
        assert device.resize() == 4 * MIB
        assert_ends_at(driver, 4 * MIB)
        assert device.resize() == 4 * MIB
        assert config_irqs(device) == 1  # nothing has changed the second time


def test_file_that_was_grown_is_not_cut_without_force(device: Device, image: Path) -> None:
    """Data after the device's end may matter to the person who made the file longer."""
    os.truncate(image, 8 * MIB)
    with pytest.raises(VdusefastError, match=r"from 8 MiB to 4 MiB loses"):
        device.resize(4 * MIB)
    assert image.stat().st_size == 8 * MIB
    device.resize(4 * MIB, force=True)
    assert image.stat().st_size == 4 * MIB


def test_driver_that_comes_later_sees_the_new_size(device: Device) -> None:
    device.resize(3 * MIB)
    with device.driver() as driver:
        assert_ends_at(driver, 3 * MIB)


@pytest.mark.slow
def test_worker_that_is_replaced_knows_the_new_size(device: Device) -> None:
    with device.driver() as driver:
        device.resize(3 * MIB)
        before = device.queues()[1].pid
        os.kill(before, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while device.queues()[1].pid == before or device.queues()[1].state != VqState.RUNNING:
            assert time.monotonic() < deadline, device.queues()
            time.sleep(0.005)
        assert_ends_at(driver, 3 * MIB)


def test_load_goes_on_while_the_size_changes(device: Device) -> None:
    """Every block that was written holds what was written, and no request fails."""
    stop = threading.Event()
    problems: list[str] = []
    counts = [0, 0]

    def load(driver: LoopbackDriver, queue: int) -> None:
        try:
            while not stop.is_set():
                at = (counts[queue] * 2 + queue) % (2 * MIB // 4096) * 4096
                data = counts[queue].to_bytes(8, "little") * 512
                driver.write(at, data, queue=queue)
                if driver.read(at, 4096, queue=queue) != data:
                    problems.append(f"queue {queue}: wrong data at {at}")
                counts[queue] += 1
        except OSError as error:
            problems.append(f"queue {queue}: {error}")

    with device.driver() as driver:
        threads = [threading.Thread(target=load, args=(driver, queue)) for queue in range(2)]
        for thread in threads:
            thread.start()
        for size in (3 * MIB, 64 * MIB, 2 * MIB, 16 * MIB) * 5:
            seen = list(counts)
            device.resize(size, force=True)
            deadline = time.monotonic() + 10
            while counts[0] == seen[0] or counts[1] == seen[1]:
                assert time.monotonic() < deadline, problems
                time.sleep(0.001)
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert [queue.restarts for queue in device.queues()] == [0, 0]


def test_null_device_takes_any_size() -> None:
    with Device(make_config(name="d0", uri="null:1G")) as device, device.driver() as driver:
        device.resize(1 << 50)
        assert driver.capacity_bytes == 1 << 50
        driver.write((1 << 50) - 4096, BLOCK)
        assert device.info()["backend"] == f"null:{1 << 50}"


def test_memory_is_refused_and_says_what_to_do() -> None:
    with Device(make_config(name="d0", uri="memory:1M")) as device, device.driver() as driver:
        with pytest.raises(ConfigError, match=r"memory:1M cannot be resized: .* tmpfs"):
            device.resize(2 * MIB)
        assert_ends_at(driver, MIB)


@pytest.mark.slow
def test_device_that_does_not_run_is_refused(image: Path) -> None:
    device = Device(make_config(name="d0", uri=f"file:{image}"))
    with pytest.raises(VdusefastError, match="not running"):
        device.resize(4 * MIB)
    with device:
        pass
    with pytest.raises(VdusefastError, match="not running"):
        device.resize(4 * MIB)
    assert image.stat().st_size == 2 * MIB


def saved_bytes(device: Device) -> int:
    """Return the size that the next server finds."""
    assert device._directory is not None
    state = saved_state.load(device._directory.state_path)
    assert state is not None
    return state.capacity_sectors * 512


@pytest.mark.parametrize("size_bytes", [4 * MIB, MIB])
def test_next_server_is_told_of_a_size_that_its_driver_may_have_been_shown(
    device: Device, image: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    """And finds a store that is as large: nothing is lost by a death between any two steps."""
    seen: list[tuple[str, int, int, int]] = []

    def look(step: str) -> None:
        shown = int.from_bytes(device.bus.config[:8], "little") * 512
        seen.append((step, shown, saved_bytes(device), image.stat().st_size))

    real_set_config, real_ftruncate = device.bus.set_config, os.ftruncate

    def set_config(offset_bytes: int, data: bytes) -> None:
        look("before the driver is shown it")
        real_set_config(offset_bytes, data)
        look("after that")

    def ftruncate(fd: int, length: int) -> None:
        look("before the store is changed")
        real_ftruncate(fd, length)
        look("after that")

    monkeypatch.setattr(device.bus, "set_config", set_config)
    monkeypatch.setattr(os, "ftruncate", ftruncate)
    device.resize(size_bytes, force=True)
    state = saved_state.load(device._directory.state_path)  # type: ignore[union-attr]
    assert state is not None
    assert (state.resizing, state.capacity_sectors) == (False, size_bytes // 512)
    assert {shown for _, shown, _, _ in seen} == {2 * MIB, size_bytes}
    assert len(seen) == 4
    for step, shown, saved, stored in seen:
        assert stored >= saved, (step, seen)
        assert saved >= shown, (step, seen)


def test_resize_that_fails_leaves_the_next_server_what_it_was_told(device: Device) -> None:
    pid = device.queues()[0].pid
    os.kill(pid, signal.SIGSTOP)
    with impatient(), pytest.raises(TimedOutError):
        device.resize(4 * MIB)
    os.kill(pid, signal.SIGCONT)
    assert saved_bytes(device) == 2 * MIB


@pytest.mark.parametrize(("shown_bytes", "saved_bytes"), [(2 * MIB, 4 * MIB), (MIB, 2 * MIB)])
def test_server_that_goes_on_ends_a_resize_that_was_cut_short(
    device: Device, image: Path, shown_bytes: int, saved_bytes: int
) -> None:
    """Growing: before the driver was shown it. Shrinking: after that, but before the store was cut."""
    assert device._directory is not None
    with device.driver() as driver:
        os.truncate(image, saved_bytes)
        path = device._directory.state_path
        saved_state.note_size(path, saved_bytes // 512, device.config, resizing=True)
        device.bus.set_config(0, (shown_bytes // 512).to_bytes(8, "little"))
        device.hand_over()
        second = Device(device.config, transport=LoopbackTransport(bus=device.bus))
        second.start(recover=True)
        try:
            assert config_irqs(second) == 1
            assert_ends_at(driver, saved_bytes)
            state = saved_state.load(path)
            assert state is not None
            assert (state.resizing, state.capacity_sectors) == (False, saved_bytes // 512)
        finally:
            second.stop()


def test_null_device_is_gone_on_with_in_its_last_size() -> None:
    with Device(make_config(name="d0", uri="null:1G")) as device:
        device.resize(2 << 30)
        assert device._directory is not None
        state = saved_state.load(device._directory.state_path)
        assert state is not None
        assert (saved_bytes(device), state.config.backend.uri) == (2 << 30, f"null:{2 << 30}")


# -- a worker that hangs


@contextmanager
def impatient() -> Iterator[None]:
    """Give a worker that hangs little time. One that runs may need more, where others have the CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_slot, "RESIZE_S", 0.2)
        yield


@pytest.mark.slow
def test_device_whose_worker_hangs_does_not_grow(device: Device, image: Path) -> None:
    """The next try makes it larger, once that worker continues: no worker serves less than the driver sees."""
    with device.driver() as driver:
        pid = device.queues()[1].pid
        os.kill(pid, signal.SIGSTOP)
        with impatient(), pytest.raises(TimedOutError, match=r"queue 1: the worker .* waits for its storage"):
            device.resize(4 * MIB)
        os.kill(pid, signal.SIGCONT)
        assert image.stat().st_size == 2 * MIB
        assert_ends_at(driver, 2 * MIB)
        device.resize(4 * MIB)
        assert_ends_at(driver, 4 * MIB)
    assert [queue.restarts for queue in device.queues()] == [0, 0]


def test_file_is_not_cut_before_every_worker_has_agreed(device: Device, image: Path) -> None:
    with device.driver() as driver:
        pid = device.queues()[0].pid
        os.kill(pid, signal.SIGSTOP)
        for _ in range(2):
            with impatient(), pytest.raises(TimedOutError, match="queue 0"):
                device.resize(MIB, force=True)
            assert image.stat().st_size == 2 * MIB
            assert driver.capacity_bytes == MIB
        os.kill(pid, signal.SIGCONT)
        device.resize(MIB, force=True)
        assert image.stat().st_size == MIB
        assert_ends_at(driver, MIB)


def test_messages_are_answered_and_others_refused_meanwhile(device: Device) -> None:
    errors: list[BaseException] = []

    def resize() -> None:
        try:
            device.resize(4 * MIB)
        except VdusefastError as error:
            errors.append(error)

    pid = device.queues()[0].pid
    os.kill(pid, signal.SIGSTOP)
    thread = threading.Thread(target=resize)
    thread.start()
    while not device._resizing.locked():
        time.sleep(0.001)
    with pytest.raises(DeviceBusyError, match="is being resized"):
        device.resize(4 * MIB)
    assert device.responds(20)
    assert device.info()["size_bytes"] == 2 * MIB
    os.kill(pid, signal.SIGCONT)
    thread.join()
    assert errors == []
    assert device.info()["size_bytes"] == 4 * MIB


# -- the store


def open_file(path: Path, *, read_only: bool = False) -> Any:
    return open_store(BackendConfig(uri=f"file:{path}"), read_only=read_only)


@pytest.mark.parametrize("size_bytes", [0, -512, 513, 1 << 63, 2 * MIB + 512])
def test_size_is_a_multiple_of_the_block_size(image: Path, size_bytes: int) -> None:
    with open_file(image) as store, pytest.raises(ConfigError, match=r"no positive multiple .* 4096; write for"):
        choose_bytes(store, 2 * MIB, 4096, size_bytes, force=True)


def test_read_only_file_is_only_looked_at(image: Path) -> None:
    with open_file(image, read_only=True) as store:
        with pytest.raises(ConfigError, match="read-only"):
            choose_bytes(store, 2 * MIB, 512, 4 * MIB, force=True)
        os.truncate(image, 4 * MIB)
        assert choose_bytes(store, 2 * MIB, 512, None, force=False) == 4 * MIB
        set_bytes(store, 4 * MIB)
        assert (store.size_bytes, present_bytes(store)) == (4 * MIB, 4 * MIB)


def test_size_that_the_file_system_refuses_is_named(image: Path) -> None:
    with open_file(image) as store, pytest.raises(BackendError, match=r"cannot have \d+ bytes: File too large"):
        set_bytes(store, (1 << 63) - 512)


@pytest.mark.slow
@pytest.mark.loop_device
def test_block_device_is_resized_by_its_own_means(image: Path, attach_loop: Any) -> None:
    node = attach_loop(image)
    with Device(make_config(name="d0", uri=f"file:{node}")) as device, device.driver() as driver:
        with pytest.raises(ConfigError, match=r"has 2097152 bytes, .*lvextend"):
            device.resize(4 * MIB)
        os.truncate(image, 4 * MIB)
        subprocess.run(["losetup", "--set-capacity", node], check=True, timeout=20)
        assert device.resize() == 4 * MIB
        assert_ends_at(driver, 4 * MIB)


# -- the command


def test_server_that_removes_its_device_refuses(image: Path, tmp_path: Path) -> None:
    service = Service(make_config(name="vd0", uri=f"file:{image}"), tmp_path)
    service._stopping = True
    with pytest.raises(DeviceBusyError, match="vd0: is being removed"):
        service._methods()["resize"].call(ResizeParams(size_bytes=4 * MIB))


def test_command_resizes_a_served_device(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "vd0.toml"
    config.write_text(f'[device]\nname = "vd0"\ntransport = "loopback"\n[backend]\nuri = "file:{image}"\n')
    words = [sys.executable, "-m", "vdusefast", "add", str(config)]  # in a process of its own, as it leaves a child
    subprocess.run(words, check=True, timeout=60, stdout=subprocess.DEVNULL)
    try:
        assert cli.run(["resize", "vd0", "8M"]) == 0
        assert capsys.readouterr().out == "vd0: 8 MiB (8388608 bytes), was 2 MiB (2097152 bytes)\n"
        assert cli.run(["show", "vd0"]) == 0
        assert "8 MiB (8388608 bytes)" in capsys.readouterr().out
        assert cli.run(["resize", "vd0", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"name": "vd0", "size_bytes": 8 * MIB, "before_bytes": 8 * MIB}
        assert cli.run(["resize", "vd0", "1M"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("vdusefast: vd0: ")
        assert "loses all from byte 1048576 to 8388607" in err
        assert err.count("\n") == 1
        assert cli.run(["resize", "vd0", "1M", "--force"]) == 0
        assert cli.run(["resize", "vd0", "1MB"]) == 2
        assert cli.run(["resize", "vd0", "1000"]) == 2
    finally:
        assert cli.run(["del", "vd0"]) == 0
    assert image.stat().st_size == MIB
    assert cli.run(["resize", "vd0", "8M"]) == 3
