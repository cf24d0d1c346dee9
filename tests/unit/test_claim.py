"""Devices of the kernel whose run directory is lost: adopting one with an operator's configuration, or removing it.

The kernel's sysfs is played by files, and the device lives on a loopback bus that outlives its servers.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from vdusefast import errors
from vdusefast.api import Device
from vdusefast.base.start_mode import StartMode
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.cli import app as cli
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.host import sysfs
from vdusefast.server import launch, lifecycle, registry
from vdusefast.state import claim as claiming
from vdusefast.state.run_dir import RunDirectory
from vdusefast.state.shared_pages import SharedPages
from vdusefast.transport import kernel_control

BLOCK_BYTES = 4096
IO_S = 30.0


class Machine:
    """A disk vdx on a device vd0, in files."""

    def __init__(self, root: Path) -> None:
        self.device = root / "bus/vdpa/devices/vd0"
        self.disk = self.device / "virtio0/block/vdx"
        self.vduse = root / "class/vduse/vd0"
        driver = root / "bus/vdpa/drivers/virtio_vdpa"
        for path in (self.disk / "queue", self.vduse / "vq0", self.vduse / "vq1", driver):
            path.mkdir(parents=True)
        (self.device / "driver").symlink_to(driver)
        self.show(
            {
                "size": 2048,
                "ro": 0,
                "queue/logical_block_size": 512,
                "queue/max_segments": 126,
                "queue/max_segment_size": 131072,
                "queue/discard_max_hw_bytes": 0,
                "queue/write_zeroes_max_bytes": 0,
                "queue/write_cache": "write back",
            }
        )

    def show(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            (self.disk / name).write_text(f"{value}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(sysfs, "SYS", tmp_path / "sys")
    monkeypatch.setattr(kernel_control, "probe_control", lambda: (1, 3))
    monkeypatch.setattr(kernel_control, "is_left_broken", lambda name: False)
    return Machine(tmp_path / "sys")


class Lost:
    """A device whose server has ended, and whose run directory is then lost."""

    def __init__(self, tmp_path: Path, host: LoopbackHost) -> None:
        self.image = tmp_path / "disk.img"
        self.image.write_bytes(bytes(1 << 20))
        self.run, self.host = tmp_path / "run", host

    def config(self, **overrides: Any) -> Config:
        return resolve_cpus(make_config(name="vd0", uri=f"file:{self.image}", queues=2, **overrides))

    def make_device(self, config: Config | None = None) -> Device:
        transport = RemoteLoopbackTransport(self.host.path)
        return Device(config or self.config(), run_dir=self.run, transport=transport)

    def lose(self) -> None:
        shutil.rmtree(self.run / "vd0")


@pytest.fixture
def lost(tmp_path: Path, machine: Machine) -> Iterator[Lost]:
    with LoopbackHost(tmp_path / "bus") as host:
        yield Lost(tmp_path, host)


@pytest.mark.slow
def test_device_with_nothing_in_flight_is_gone_on_with(lost: Lost, machine: Machine) -> None:
    first = lost.make_device()
    first.start()
    with LoopbackDriver(lost.host.bus) as driver:
        for queue in range(2):
            driver.write(queue * BLOCK_BYTES, bytes([queue + 1]) * BLOCK_BYTES, queue=queue)
        first.hand_over()
        lost.lose()
        with pytest.raises(errors.DeviceNotFoundError, match="nothing to adopt"):
            lost.make_device().start(recover=True)
        second = lost.make_device()
        second.start(claim=True)
        for queue in range(2):
            assert driver.read(queue * BLOCK_BYTES, BLOCK_BYTES, queue=queue) == bytes([queue + 1]) * BLOCK_BYTES
        second.hand_over()
        third = lost.make_device()  # and what was claimed is a device like any other
        third.start(recover=True)
        driver.write(0, b"3" * BLOCK_BYTES)
    third.stop()


@pytest.mark.slow
def test_request_in_flight_keeps_a_device_from_being_gone_on_with(lost: Lost) -> None:
    """It may have been carried out, and later ones too: to do it again may put the older bytes over the newer ones."""
    first = lost.make_device()
    first.start()
    with LoopbackDriver(lost.host.bus) as driver:
        driver.write(0, b"1" * BLOCK_BYTES, queue=1)
        first.hand_over()
        lost.lose()
        failed: list[int | None] = []

        def write() -> None:
            try:
                driver.write(0, b"2" * BLOCK_BYTES, queue=1)
            except OSError as error:
                failed.append(error.errno)

        waiting = threading.Thread(target=write)
        waiting.start()
        time.sleep(0.3)
        with pytest.raises(errors.VdusefastError, match=r"queue 1: .*vdusefast del vd0 --force --claim removes it"):
            lost.make_device().start(claim=True)
        assert not (lost.run / "vd0").exists()
        assert waiting.is_alive()
        # Its removal ends its requests with an error.
        removing = lost.make_device(resolve_cpus(make_config(name="vd0", uri="null:1M", queues=2, queue_size=32768)))
        removing.start(recover=True, fail_requests=True, claim=True)
        waiting.join(IO_S)
        assert failed == [5]
        removing.stop(force=True)
    assert lost.image.read_bytes()[:BLOCK_BYTES] == b"1" * BLOCK_BYTES


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ({"size": 4096}, "size in sectors: 4096, not 2048"),
        ({"queue/logical_block_size": 4096}, "device.block_size_bytes: 4096, not 512"),
        ({"ro": 1}, "device.read_only: 1, not 0"),
        ({"queue/write_cache": "write through"}, "backend.cache is not writethrough: 0, not 1"),
        ({"queue/max_segments": 127}, "device.seg_max: 127, not 126"),
        ({"queue/max_segment_size": 262144}, "device.size_max_bytes: 262144, not 131072"),
        ({"queue/discard_max_hw_bytes": 1 << 40}, "bytes of a discard: 1099511627776, not"),
        ({"queue/write_zeroes_max_bytes": 1 << 40}, "bytes of a write-zeroes: 1099511627776, not"),
    ],
)
def test_configuration_that_the_kernel_contradicts_is_refused(
    lost: Lost, machine: Machine, shown: dict[str, Any], words: str
) -> None:
    machine.show(shown)
    with pytest.raises(errors.ConfigError, match=f"vd0: the kernel shows that the device was made with.*{words}"):
        lost.make_device().start(claim=True)
    assert not (lost.run / "vd0").exists()


def test_number_of_queues_is_the_kernels(lost: Lost, machine: Machine) -> None:
    (machine.vduse / "vq2").mkdir()
    with pytest.raises(errors.ConfigError, match=r"device\.queues: 3, not 2"):
        lost.make_device().start(claim=True)


def test_only_a_lost_disk_is_claimed(lost: Lost, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    device = lost.make_device()
    device.start()
    device.hand_over()
    state = (lost.run / "vd0/state").read_bytes()
    with pytest.raises(errors.DeviceBusyError, match="needs no --claim"):
        lost.make_device().start(claim=True)
    assert (lost.run / "vd0/state").read_bytes() == state
    lost.lose()
    with monkeypatch.context() as patch:
        patch.setattr(kernel_control, "is_left_broken", lambda name: True)
        with pytest.raises(errors.DeviceBusyError, match="is broken"):
            lost.make_device().start(claim=True)
    shutil.rmtree(machine.disk)
    with pytest.raises(errors.VdusefastError, match="is no disk of this machine"):
        lost.make_device().start(claim=True)
    shutil.rmtree(machine.device)
    with pytest.raises(errors.DeviceNotFoundError, match="nothing to claim"):
        lost.make_device().start(claim=True)
    assert not (lost.run / "vd0").exists()


def test_log_that_is_disowned_says_that_requests_may_be_in_flight() -> None:
    with SharedPages.create(None, "vd0", 2, 64) as pages:
        pages.begin_log(1, 7)
        pages.disown_log(1)
        assert [pages.log_is_void(queue) for queue in range(2)] == [True, False]


# -- commands


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, StartMode]]:
    asked: list[tuple[Config, StartMode]] = []

    def start(config: Config, *, mode: StartMode = StartMode.ADD) -> dict[str, Any]:
        asked.append((config, mode))
        return {"name": "vd0", "node": "/dev/vdx", "pid": 5, "transport": "kernel"}

    monkeypatch.setattr(launch, "start", start)
    return asked


def test_commands_claim_only_when_they_are_told_to(
    machine: Machine,
    started: list[tuple[Config, StartMode]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    deleted: list[str] = []
    monkeypatch.setattr(lifecycle, "delete_served", lambda client, path, force, timeout_s: deleted.append(path.name))
    monkeypatch.setattr("vdusefast.server.lifecycle.RpcClient", lambda path: nullcontext())
    for words in (["del", "vd0"], ["del", "vd0", "--force"], ["recover", "vd0"]):
        assert cli.run(words) == 3
        err = capsys.readouterr().err
        assert "vdusefast add CONFIG --claim adopts it" in err
        assert "vdusefast del vd0 --force --claim removes it" in err
    assert cli.run(["del", "vd0", "--claim"]) == 2
    assert started == []
    assert cli.run(["del", "vd0", "--force", "--claim"]) == 0
    config, mode = started.pop()
    assert (mode, deleted) == (StartMode.CLAIM_FAIL, ["vd0"])
    assert (config.backend.uri, config.device.queues, config.device.bus) == ("null:1048576", 2, "virtio")
    assert cli.run(["add", "vd0", "--backend", "null:1M", "--claim"]) == 0
    assert started.pop()[1] == StartMode.CLAIM


def test_run_directory_without_a_state_is_no_better_than_none(
    machine: Machine, started: list[tuple[Config, StartMode]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "delete_served", lambda client, path, force, timeout_s: None)
    directory = RunDirectory("vd0", registry.base_directory(), "kernel")
    directory.release()
    assert cli.run(["del", "vd0", "--force"]) == 4
    assert claiming.removal_config("vd0").device.queue_size == 32768
    monkeypatch.setattr("vdusefast.server.lifecycle.RpcClient", _Nobody(directory.path))
    assert cli.run(["del", "vd0", "--force", "--claim"]) == 0
    assert started[-1][1] == StartMode.CLAIM_FAIL
    RunDirectory("vd0", registry.base_directory()).close()


class _Nobody:
    """A server that is not there at first, and is the second time."""

    def __init__(self, path: Path) -> None:
        self.asked = 0

    def __call__(self, path: Path) -> Any:
        from vdusefast.server.rpc_client import NoServerError

        self.asked += 1
        if self.asked == 1:
            raise NoServerError("nobody")
        return nullcontext()
