"""The process that serves a device: start, commands, signals, a device that is left. The device is a made-up one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_rig import Rig

from vdusefast import errors
from vdusefast.base import time_limits
from vdusefast.base.start_mode import StartMode
from vdusefast.cli import app as cli
from vdusefast.host import node_users
from vdusefast.server import service
from vdusefast.server.rpc import Method, RpcServer
from vdusefast.state import orphans
from vdusefast.state.run_dir import RunDirectory
from vdusefast.transport import DeviceBrokenError

pytestmark = pytest.mark.usefixtures("sees_all_processes")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    rig = Rig(tmp_path / "run")
    yield rig
    if rig.error is not None:
        raise rig.error
    assert {number: signal.getsignal(number) for number in before} == before
    assert not rig.path.exists()


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    users = ["mounted on /mnt"]
    monkeypatch.setattr(node_users, "find_users", lambda node: list(users))
    return users


def test_delete_is_refused_where_users_may_be_unseen(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_users, "find_users", lambda node: [])
    monkeypatch.setattr(node_users, "unseen_text", lambda node: f"whether {node} is open cannot be seen from here")

    def act() -> None:
        with pytest.raises(errors.DeviceBusyError, match=r"open cannot be seen.*from the host, or --force"):
            rig.call("delete")
        assert rig.call("delete", is_unused=True) == {"name": "vd0", "pid": os.getpid()}

    rig.run(act)
    assert rig.device.stops == [(service.STOP_TIMEOUT_S, False)]


def test_commands_are_answered_and_delete_ends_it(rig: Rig) -> None:
    def act() -> None:
        assert rig.call("ping") == {"name": "vd0", "pid": os.getpid()}
        assert rig.call("info")["node"] == "/dev/vdfake"
        assert rig.call("stats") == {"total": {"requests": 5}}
        assert rig.call("delete", timeout_s=3.0) == {"name": "vd0", "pid": os.getpid()}

    rig.run(act)
    assert rig.device.stops == [(3.0, False)]


def test_recover_has_a_store_flushed_again_that_has_failed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", str(rig.base))

    def act() -> None:
        assert cli.run(["recover", "vd0"]) == 4  # it is served, and well
        rig.device.store_failure = {"errno": 5, "since_s": 1}
        assert cli.run(["recover", "vd0"]) == 0
        assert capsys.readouterr().out == "/dev/vdfake\n"
        rig.call("delete")

    rig.run(act)
    assert rig.error is None
    assert rig.device.store_failure is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_it_cleanly_and_a_second_one_changes_nothing(rig: Rig, number: int) -> None:
    def act() -> None:
        rig.device.stop_gate.clear()
        os.kill(os.getpid(), number)
        while not rig.device.stops:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        rig.device.stop_gate.set()

    rig.run(act)
    assert rig.device.stops == [(service.STOP_TIMEOUT_S, False)]


def test_delete_refuses_while_in_use_and_force_goes_ahead(rig: Rig, in_use: list[str]) -> None:
    def act() -> None:
        with pytest.raises(errors.DeviceBusyError, match=r"in use: mounted on /mnt; .*--force"):
            rig.call("delete")
        assert rig.call("info")["state"] == "running"
        assert not rig.device.stops
        rig.call("delete", force=True)

    rig.run(act)
    assert rig.device.stops == [(service.STOP_TIMEOUT_S, True)]


def test_client_of_vhost_is_not_forced_away(rig: Rig, in_use: list[str]) -> None:
    """Removing the device would wait in the kernel for that client."""
    rig.device.node = "/dev/vhost-vdpa-0"
    in_use[:] = ["open by pid 7 (qemu)"]

    def act() -> None:
        with pytest.raises(errors.DeviceBusyError, match=r"open by pid 7 \(qemu\); removing it would wait"):
            rig.call("delete", force=True)
        in_use.clear()
        rig.call("delete")

    rig.run(act)


def test_signal_waits_for_a_client_of_vhost_and_takes_a_disk_away(
    rig: Rig, in_use: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "CLIENT_LOOK_S", 0.02)
    rig.device.node = "/dev/vhost-vdpa-0"

    def act() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        assert not rig.device.stops
        in_use.clear()

    rig.run(act)
    assert "still in use: mounted on /mnt; waiting for that to end" in caplog.text
    assert len(rig.device.stops) == 1


def test_disk_in_use_goes_when_a_signal_comes(rig: Rig, in_use: list[str], caplog: pytest.LogCaptureFixture) -> None:
    rig.run(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert "vd0: /dev/vdfake is still in use: mounted on /mnt" in caplog.text
    assert len(rig.device.stops) == 1


@pytest.mark.parametrize("force", [False, True])
def test_second_delete_joins_the_first_one_and_can_make_it_one_by_force(rig: Rig, force: bool) -> None:
    rig.device.stop_gate.clear()
    removed: list[Any] = []

    def act() -> None:
        threads = [threading.Thread(target=lambda: removed.append(rig.call("delete", timeout_s=9.0)))]
        threads[0].start()
        while not rig.device.stops:
            time.sleep(0.01)
        assert rig.call("info")["state"] == "stopping"
        with pytest.raises(errors.DeviceBusyError, match="being removed"):
            rig.call("stats")
        params = {"force": force, "timeout_s": 4.0}
        threads.append(threading.Thread(target=lambda: removed.append(rig.call("delete", **params))))
        threads[1].start()
        if not force:
            threads[1].join(0.3)
            assert threads[1].is_alive()
            rig.device.stop_gate.set()
        for thread in threads:
            thread.join(10)

    rig.run(act)
    assert removed == [{"name": "vd0", "pid": os.getpid()}] * 2
    assert rig.device.stops == [(9.0, False)]
    assert set(rig.device.forced) == ({4.0} if force else set())


def test_delete_that_waits_for_another_one_has_a_limit_of_its_own(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "stop_s", lambda timeout_s: timeout_s)
    rig.device.stop_gate.clear()

    def act() -> None:
        first = threading.Thread(target=rig.call, args=("delete",))
        first.start()
        while not rig.device.stops:
            time.sleep(0.01)
        with pytest.raises(errors.TimedOutError, match=r"is being removed, which takes longer than 0\.2 s"):
            rig.call("delete", timeout_s=0.2)
        rig.device.stop_gate.set()
        first.join(10)

    rig.run(act)


def test_refused_delete_leaves_signals_to_work(rig: Rig, in_use: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes while `delete` still looks for users is not lost when `delete` then refuses."""
    looked = threading.Event()

    def find_users(node: str) -> list[str]:
        looked.set()
        time.sleep(0.2)
        return ["mounted on /mnt"]

    monkeypatch.setattr(node_users, "find_users", find_users)

    def act() -> None:
        def refused() -> None:
            with pytest.raises(errors.DeviceBusyError):
                rig.call("delete")

        caller = threading.Thread(target=refused)
        caller.start()
        assert looked.wait(5)
        os.kill(os.getpid(), signal.SIGTERM)
        caller.join(10)

    rig.run(act)
    assert rig.device.stops == [(service.STOP_TIMEOUT_S, False)]


def test_device_is_running_until_its_removal_is_decided(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, go_on = threading.Event(), threading.Event()

    def find_users(node: str) -> list[str]:
        looked.set()
        assert go_on.wait(10)
        return []

    monkeypatch.setattr(node_users, "find_users", find_users)

    def act() -> None:
        caller = threading.Thread(target=rig.call, args=("delete",))
        caller.start()
        try:
            assert looked.wait(5)
            assert rig.call("info")["state"] == "running"
            assert rig.call("stats") == {"total": {"requests": 5}}
        finally:
            go_on.set()
            caller.join(10)

    rig.run(act)


def test_delete_tells_what_the_kernel_has_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path / "run", transport="kernel")
    rig.device.failure = errors.TimedOutError("device vd0: its driver did not let go of it within 40 s")
    monkeypatch.setattr(orphans, "in_kernel", lambda name: True)

    def act() -> None:
        with pytest.raises(errors.TimedOutError, match="did not let go"):
            rig.call("delete")

    rig.run(act)
    assert rig.error is None


@pytest.mark.parametrize("timeout_s", [0, -1, 1e9])
def test_delete_wants_a_sensible_limit(rig: Rig, timeout_s: float) -> None:
    def act() -> None:
        with pytest.raises(errors.VdusefastError, match="a timeout of"):
            rig.call("delete", timeout_s=timeout_s)
        rig.call("delete")

    rig.run(act)


def test_start_that_fails_leaves_nothing_and_says_why(rig: Rig) -> None:
    rig.device.start_error = errors.KernelSupportError("no /dev/vduse/control")
    with pytest.raises(errors.KernelSupportError, match="no /dev/vduse"):
        rig.service.run(lambda _: pytest.fail("not ready"))


def test_signal_cuts_a_start_short(rig: Rig) -> None:
    rig.device.start_takes_s = 20
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    rig.service.run(lambda _: pytest.fail("not ready"))
    assert time.monotonic() - began < 5


def test_signal_just_after_the_start_stops_the_device(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    start = rig.device.start

    def start_and_signal(**words: Any) -> None:
        start(**words)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(rig.device, "start", start_and_signal)
    rig.service.run(lambda _: pytest.fail("not ready"))
    assert len(rig.device.stops) == 1


def test_what_is_told_of_readiness_may_refuse(rig: Rig) -> None:
    def refuse(_: dict[str, Any]) -> None:
        raise errors.VdusefastError("nobody waits")

    with pytest.raises(errors.VdusefastError, match="nobody waits"):
        rig.service.run(refuse)
    assert len(rig.device.stops) == 1


# -- a device that the kernel keeps


@pytest.fixture
def kernel_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(node_users, "find_users", lambda node: [])
    monkeypatch.setattr(orphans, "in_kernel", lambda name: False)
    rig = Rig(tmp_path / "run", transport="kernel")
    yield rig
    if rig.error is not None:
        raise rig.error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_a_kernel_device_to_the_next_server(
    kernel_rig: Rig, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    kernel_rig.run(lambda: os.kill(os.getpid(), number))
    assert (kernel_rig.device.hand_overs, kernel_rig.device.stops) == ([service.STOP_TIMEOUT_S], [])
    assert kernel_rig.path.is_dir()
    assert "vd0: left in the kernel as /dev/vdfake" in caplog.text
    assert "`vdusefast recover vd0` adopts it, `vdusefast del vd0` removes it" in caplog.text


def test_ctrl_c_removes_a_kernel_device_that_nobody_uses(kernel_rig: Rig) -> None:
    kernel_rig.run(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert (kernel_rig.device.hand_overs, len(kernel_rig.device.stops)) == ([], 1)
    assert not kernel_rig.path.exists()
    assert not kernel_rig.service.deleted


def test_ctrl_c_leaves_a_kernel_device_in_use(kernel_rig: Rig, in_use: list[str]) -> None:
    kernel_rig.run(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert (len(kernel_rig.device.hand_overs), kernel_rig.device.stops) == (1, [])


def test_what_is_in_the_servers_memory_ends_with_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "run", uri="memory:1M", transport="kernel")

    def act() -> None:
        with pytest.raises(errors.VdusefastError, match="cannot be handed over"):
            rig.call("hand_over")
        os.kill(os.getpid(), signal.SIGTERM)

    rig.run(act)
    assert rig.error is None
    assert (rig.device.hand_overs, len(rig.device.stops)) == ([], 1)


def test_delete_by_command_is_told_from_a_signal(kernel_rig: Rig) -> None:
    kernel_rig.run(lambda: kernel_rig.call("delete"))
    assert kernel_rig.service.deleted
    assert (kernel_rig.device.hand_overs, len(kernel_rig.device.stops)) == ([], 1)


@pytest.mark.parametrize("recovered", [False, True])
def test_start_that_nobody_hears_of_is_undone(kernel_rig: Rig, recovered: bool) -> None:
    """A device that was there before stays where it was, one that is new goes."""

    def refuse(_: dict[str, Any]) -> None:
        raise errors.VdusefastError("nobody waits")

    kernel_rig.device.recovered = recovered
    with pytest.raises(errors.VdusefastError, match="nobody waits"):
        kernel_rig.service.run(refuse)
    assert (len(kernel_rig.device.hand_overs), len(kernel_rig.device.stops)) == ((1, 0) if recovered else (0, 1))
    assert kernel_rig.path.exists() == recovered


def test_device_that_the_kernel_has_given_up_is_made_anew(kernel_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Path] = []
    monkeypatch.setattr(orphans, "remove_broken", removed.append)
    first = kernel_rig.device
    first.start_error = DeviceBrokenError("device vd0 is broken")
    kernel_rig.run(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert removed == [kernel_rig.path]
    assert kernel_rig.device is not first
    assert len(kernel_rig.device.stops) == 1


def test_broken_device_in_use_is_refused(kernel_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise errors.DeviceBusyError("vd0: it is broken and in use")

    monkeypatch.setattr(orphans, "remove_broken", refuse)
    kernel_rig.device.start_error = DeviceBrokenError("device vd0 is broken")
    with pytest.raises(errors.DeviceBusyError, match="broken and in use"):
        kernel_rig.service.run(lambda _: pytest.fail("not ready"))


def test_new_server_takes_over_from_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is asked when the new one has come as far as it can, and ends before the device is started."""
    monkeypatch.setattr(orphans, "in_kernel", lambda name: False)
    held = RunDirectory("vd0", tmp_path / "run")
    asked: list[Any] = []

    def hand_over(params: service.HandOverParams) -> dict[str, Any]:
        asked.append(params.timeout_s)
        threading.Timer(0.1, held.release).start()
        return {}

    server = RpcServer(tmp_path / "run/vd0", {"hand_over": Method(service.HandOverParams, hand_over)})
    with server:
        rig = Rig(tmp_path / "run", transport="kernel", mode=StartMode.TAKE_OVER)
        assert asked == []
        rig.run(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert asked == [service.STOP_TIMEOUT_S]
    assert (rig.device.starts, len(rig.device.hand_overs)) == ([StartMode.TAKE_OVER], 1)


def test_old_server_that_cannot_be_asked_keeps_its_device(tmp_path: Path) -> None:
    with RunDirectory("vd0", tmp_path / "run"):
        rig = Rig(tmp_path / "run", transport="kernel", mode=StartMode.TAKE_OVER)
        with pytest.raises(errors.DeviceBusyError, match=f"held by pid {os.getpid()}, which takes no commands"):
            rig.service.run(lambda _: pytest.fail("not ready"))
    assert rig.device.starts == []


def test_server_for_a_removal_fails_requests(kernel_rig: Rig) -> None:
    rig = Rig(kernel_rig.base, transport="kernel", mode=StartMode.FAIL)
    rig.run(lambda: rig.call("delete"))
    assert rig.error is None
    assert rig.device.starts == [StartMode.FAIL]
