"""`bench fio` over the kernel transport: the real arguments of fio on a device that is none, and ends of all kinds."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_fio
import pytest

from vdusefast import doctor
from vdusefast.bench.common import block_node
from vdusefast.bench.common.real_fio import FioStuckError
from vdusefast.bench.fio import command as fio_command
from vdusefast.bench.fio import device as fio_device
from vdusefast.bench.fio.command import run_command
from vdusefast.errors import ConfigError, VdusefastError

MIB = 1 << 20
NODE = "/dev/vdx"


class FakeDevice:
    """The part of a Device that `bench fio` uses."""

    made: list[FakeDevice] = []  # noqa: RUF012
    failing_after = 1 << 30  # looks at `failure`

    def __init__(self, config: Any) -> None:
        self.config, self.name, self.node = config, config.device.name, NODE
        self.stops: list[bool] = []
        self.looks = self.stat_looks = 0
        FakeDevice.made.append(self)

    def start(self) -> None:
        return

    def stop(self, *, force: bool = False) -> None:
        self.stops.append(force)

    errors = (0,)

    @property
    def failure(self) -> VdusefastError | None:
        self.looks += 1
        return VdusefastError("queue 0: worker was killed") if self.looks > self.failing_after else None

    def queues(self) -> list[Any]:
        return [SimpleNamespace(index=0, pid=os.getpid(), cpu=-1, engine="sync")]

    def stats(self) -> Any:
        counters = dict.fromkeys(("requests", "bytes_read", "bytes_written", "kicks", "irqs", "batches"), 3)
        counters["errors"] = self.errors[min(self.stat_looks, len(self.errors) - 1)]
        self.stat_looks += 1
        return SimpleNamespace(queues=[SimpleNamespace(index=0, pid=os.getpid(), cpu=-1, **counters)])


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeDevice]:
    monkeypatch.setattr(FakeDevice, "made", [])
    monkeypatch.setattr(fio_device, "Device", FakeDevice)
    monkeypatch.setattr(doctor, "kernel_usable", lambda: (True, ""))
    monkeypatch.setattr(block_node, "size_bytes", lambda node: 4 * MIB)
    monkeypatch.setenv("PATH", fake_fio.first_on_path(tmp_path))
    return FakeDevice


COMMAND = ["--name=a", "--rw=randread", "--bs=4k", "--iodepth=4", "--transport=kernel", "--backend=memory:4M"]


def test_report_is_fios_with_a_table_of_ours(
    fake_device: type[FakeDevice], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_fio.install(tmp_path)
    assert run_command([*COMMAND, "--queues=1", "--driver-cpus=0", "--filename=/dev/sda"]) == 0
    text = capfd.readouterr().out
    notes = ("transport: kernel (as asked)", f"device: {NODE}, 4 MiB on memory:4M", "in place of filename=/dev/sda")
    places = [text.index(line) for line in (*notes, "a line of no report", "/kick")]
    assert places == sorted(places)
    (device,) = fake_device.made
    assert device.config.device.transport == "kernel"
    assert device.stops == [False]
    (call,) = (tmp_path / "fio-calls").read_text().splitlines()
    assert call == f"--name=a --rw=randread --bs=4k --iodepth=4 --filename={NODE} --allow_file_create=0"


def test_json_has_one_more_object(
    fake_device: type[FakeDevice], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_fio.install(tmp_path)
    assert run_command([*COMMAND, "--output-format=json"]) == 0
    first, _, report = capfd.readouterr().out.partition("\n")
    assert first == "a line of no report"
    parsed = json.loads(report)
    assert set(parsed) == {"fio version", "jobs", "vdusefast"}
    assert parsed["vdusefast"]["node"] == NODE
    assert [queue["requests"] for queue in parsed["vdusefast"]["queues"]] == [0]


@pytest.mark.parametrize("status", [1, 7])
def test_exit_status_is_fios(fake_device: type[FakeDevice], tmp_path: Path, status: int) -> None:
    fake_fio.install(tmp_path, status=status)
    assert run_command(COMMAND) == status
    assert fake_device.made[0].stops == [False]


@pytest.mark.parametrize("more", [[], ["--continue_on_error=all"]])
def test_error_that_fio_did_not_see_is_ours_to_report(
    fake_device: type[FakeDevice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    fake_fio.install(tmp_path)
    monkeypatch.setattr(fake_device, "errors", [0, 2, 2])
    if more:
        assert run_command([*COMMAND, *more]) == 0
    else:
        with pytest.raises(VdusefastError, match=r"the device failed 2 request"):
            run_command(COMMAND)


def test_failure_of_the_device_ends_fio_and_forces_it_off(
    fake_device: type[FakeDevice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_device, "failing_after", 1)
    fake_fio.install(tmp_path, before="sleep 60")
    with pytest.raises(VdusefastError, match="worker was killed"):
        run_command(COMMAND)
    assert fake_device.made[0].stops[0] is True


def test_stuck_fio_goes_after_its_device(
    fake_device: type[FakeDevice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_fio.install(tmp_path)
    order = []
    monkeypatch.setattr(fake_device, "stop", lambda self, *, force=False: order.append(f"stop {force}"))
    fio = SimpleNamespace(reap=lambda timeout_s: order.append("reap"))

    def stuck(*_arguments: object, **_options: object) -> int:
        raise FioStuckError("fio is stuck", fio)  # type: ignore[arg-type]

    monkeypatch.setattr(fio_command, "run_shown", stuck)
    with pytest.raises(VdusefastError, match="fio is stuck"):
        run_command(COMMAND)
    assert order[:2] == ["stop True", "reap"]


def test_signal_lets_fio_report_and_ends_with_status_0(
    fake_device: type[FakeDevice], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # The script signals the process that runs it, as a terminal would.
    fake_fio.install(tmp_path, before="trap 'kill $!' INT; sleep 60 & kill -TERM $PPID; wait $!", status=128)
    before = signal.getsignal(signal.SIGTERM)
    assert run_command(COMMAND) == 0
    assert "stopped early by SIGTERM" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert fake_device.made[0].stops == [False]


def test_hangup_is_a_signal_like_the_others(
    fake_device: type[FakeDevice], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_fio.install(tmp_path, before="trap : INT; kill -HUP $PPID; sleep 0.6", status=128)
    assert run_command(COMMAND) == 0
    assert "stopped early by SIGHUP; the requests in flight were finished" in capfd.readouterr().out
    assert fake_device.made[0].stops == [False]


@pytest.mark.parametrize("signals", ["TERM TERM", "HUP INT TERM"])
def test_second_signal_takes_fio_and_not_the_server_from_the_disk(
    fake_device: type[FakeDevice], tmp_path: Path, signals: str
) -> None:
    kills = "; ".join(f"kill -{number} $PPID; sleep 0.6" for number in signals.split())
    fake_fio.install(tmp_path, before=f"trap : INT; {kills}; sleep 60", status=128)
    began = time.monotonic()
    with pytest.raises(VdusefastError, match="killed before it had finished, because a second signal came"):
        run_command(COMMAND)
    assert time.monotonic() - began < 20
    assert fake_device.made[0].stops[0] is True


def test_signal_before_fio_handles_signals_is_no_error(
    fake_device: type[FakeDevice], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_fio.install(tmp_path, before="kill -TERM $PPID; exec sleep 60")
    assert run_command(COMMAND) == 0
    assert "stopped by SIGTERM before fio had begun" in capfd.readouterr().out
    assert fake_device.made[0].stops == [False]


@pytest.mark.parametrize("when", ["before", "while"])
def test_signal_before_the_device_has_started_ends_that(
    fake_device: type[FakeDevice],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    when: str,
) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        if when == "while":
            time.sleep(60)

    fake_fio.install(tmp_path)
    if when == "while":
        monkeypatch.setattr(fake_device, "start", interrupted)
    else:
        monkeypatch.setattr(fio_command, "check_bus", interrupted)
    assert run_command(COMMAND) == 0
    assert "stopped by SIGTERM before fio had begun" in capfd.readouterr().out
    assert not (tmp_path / "fio-calls").exists()
    assert all(device.stops for device in fake_device.made)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--backend=null:4M", "--verify=crc32c"], "keeps nothing"),
        (["--size=8m"], "smaller size"),
        (["--rw=randtrim"], "cannot discard"),
    ],
)
def test_jobs_that_the_device_cannot_serve(
    fake_device: type[FakeDevice], tmp_path: Path, more: list[str], message: str
) -> None:
    fake_fio.install(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run_command([*COMMAND, *more])
    assert all(device.stops[0] for device in fake_device.made)


def test_bus_without_a_block_device_is_refused(fake_device: type[FakeDevice], tmp_path: Path) -> None:
    path = tmp_path / "vd.toml"
    path.write_text('[device]\nname = "vdbench"\nbus = "vhost"\n[backend]\nuri = "memory:4M"\n')
    with pytest.raises(ConfigError, match='use bus = "virtio"'):
        run_command(["--name=a", "--rw=read", "--transport=kernel", f"--config={path}"])
    assert not fake_device.made
