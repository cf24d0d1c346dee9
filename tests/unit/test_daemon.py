"""The process that serves a device: start, commands, signals, what systemd is told. The device is a made-up one."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vdusefast import daemon, errors, left, run_dir, sd_notify, usage
from vdusefast.config import Config, make_config
from vdusefast.daemon import Service
from vdusefast.rpc import Method, RpcServer
from vdusefast.rpc_client import RpcClient
from vdusefast.run_dir import RunDirectory
from vdusefast.transport import DeviceBrokenError


class FakeDevice:
    """What api.Device is to the service: it holds its run directory while it runs."""

    def __init__(self, config: Config, base: Path) -> None:
        self.name = config.device.name
        self.node = "/dev/vdfake"
        self.failure: errors.VdusefastError | None = None
        self.start_error: Exception | None = None
        self.start_takes_s = 0.0
        self.stops: list[tuple[float, bool]] = []
        self.hand_overs: list[float] = []
        self.starts: list[tuple[bool | None, bool]] = []
        self.recovered = False
        self.stop_gate = threading.Event()
        self.stop_gate.set()
        self.healthy = True
        self._base = base
        self._directory: RunDirectory | None = None

    def start(self, *, recover: bool | None = None, fail_requests: bool = False) -> None:
        self.starts.append((recover, fail_requests))
        directory = RunDirectory(self.name, self._base)
        try:
            time.sleep(self.start_takes_s)
            if self.start_error is not None:
                raise self.start_error
        except BaseException:
            directory.close()
            raise
        self._directory = directory

    def stop(self, timeout_s: float = 30.0, *, force: bool = False) -> None:
        if self._directory is None:
            return
        self.stops.append((timeout_s, force))
        assert self.stop_gate.wait(10)
        self._directory.close()
        self._directory = None

    def hand_over(self, timeout_s: float = 30.0) -> None:
        if self._directory is None:
            return
        self.hand_overs.append(timeout_s)
        assert self.stop_gate.wait(10)
        self._directory.release()
        self._directory = None

    def resize(self, size_bytes: int | None = None, *, force: bool = False) -> int:
        return size_bytes or 0

    def info(self) -> dict[str, Any]:
        return {"name": self.name, "state": "running", "node": self.node, "pid": os.getpid()}

    def stats(self) -> Any:
        class Stats:
            def to_dict(self) -> dict[str, Any]:
                return {"total": {"requests": 5}}

        return Stats()

    def responds(self, timeout_s: float) -> bool:
        return self.healthy


class Rig:
    """A service in this thread, and in another one what a test does once the device is usable."""

    def __init__(
        self,
        base: Path,
        *,
        uri: str = "null:1M",
        take_over: bool = False,
        fail_requests: bool = False,
        **overrides: Any,
    ) -> None:
        self.base = base
        self.device: FakeDevice
        config = make_config(name="vd0", uri=uri, **overrides)
        modes = {"take_over": take_over, "fail_requests": fail_requests}
        self.service = Service(config, base, make_device=self._make, **modes)
        self.path = base / "vd0"
        self.result: Any = None
        self.error: BaseException | None = None

    def _make(self, config: Config, base: Path) -> FakeDevice:
        self.device = FakeDevice(config, base)
        return self.device

    def run(self, act: Callable[[], Any]) -> None:
        """Serve until `act`, whose result or error is kept, has ended the service."""
        threads = []

        def ready(info: dict[str, Any]) -> None:
            assert info["run_dir"] == str(self.path)
            threads.append(threading.Thread(target=self._act, args=(act,)))
            threads[0].start()

        self.service.run(ready)
        for thread in threads:
            thread.join(10)

    def _act(self, act: Callable[[], Any]) -> None:
        try:
            self.result = act()
        except BaseException as error:
            self.error = error
            os.kill(os.getpid(), signal.SIGTERM)

    def call(self, method: str, **params: Any) -> Any:
        with RpcClient(self.path) as client:
            return client.call(method, params)


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
    monkeypatch.setattr(usage, "find_users", lambda node: list(users))
    return users


def test_commands_are_answered_and_delete_ends_it(rig: Rig) -> None:
    def act() -> None:
        assert rig.call("ping") == {"name": "vd0", "pid": os.getpid()}
        assert rig.call("info")["node"] == "/dev/vdfake"
        assert rig.call("stats") == {"total": {"requests": 5}}
        assert rig.call("delete", timeout_s=3.0) == {"name": "vd0", "pid": os.getpid()}

    rig.run(act)
    assert rig.device.stops == [(3.0, False)]


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
    assert rig.device.stops == [(daemon.STOP_TIMEOUT_S, False)]


def test_delete_refuses_while_in_use_and_force_goes_ahead(rig: Rig, in_use: list[str]) -> None:
    def act() -> None:
        with pytest.raises(errors.DeviceBusyError, match=r"in use: mounted on /mnt; .*--force"):
            rig.call("delete")
        assert rig.call("info")["state"] == "running"
        assert not rig.device.stops
        rig.call("delete", force=True)

    rig.run(act)
    assert rig.device.stops == [(daemon.STOP_TIMEOUT_S, True)]


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
    monkeypatch.setattr(daemon, "CLIENT_LOOK_S", 0.02)
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


def test_info_while_it_is_being_removed_and_no_second_delete(rig: Rig) -> None:
    rig.device.stop_gate.clear()

    def act() -> None:
        first = threading.Thread(target=rig.call, args=("delete",))
        first.start()
        while not rig.device.stops:
            time.sleep(0.01)
        assert rig.call("info")["state"] == "stopping"
        for method in ("delete", "stats"):
            with pytest.raises(errors.DeviceBusyError, match="being removed"):
                rig.call(method)
        rig.device.stop_gate.set()
        first.join(10)

    rig.run(act)
    assert len(rig.device.stops) == 1


def test_refused_delete_leaves_signals_to_work(rig: Rig, in_use: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes while `delete` still looks for users is not lost when `delete` then refuses."""
    looked = threading.Event()

    def find_users(node: str) -> list[str]:
        looked.set()
        time.sleep(0.2)
        return ["mounted on /mnt"]

    monkeypatch.setattr(usage, "find_users", find_users)

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
    assert rig.device.stops == [(daemon.STOP_TIMEOUT_S, False)]


def test_device_is_running_until_its_removal_is_decided(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, go_on = threading.Event(), threading.Event()

    def find_users(node: str) -> list[str]:
        looked.set()
        assert go_on.wait(10)
        return []

    monkeypatch.setattr(usage, "find_users", find_users)

    def act() -> None:
        caller = threading.Thread(target=rig.call, args=("delete",))
        caller.start()
        try:
            assert looked.wait(5)
            assert rig.call("info")["state"] == "running"
            assert rig.call("stats") == {"total": {"requests": 5}}
            with pytest.raises(errors.DeviceBusyError, match="being removed already"):
                rig.call("delete")
        finally:
            go_on.set()
            caller.join(10)

    rig.run(act)


def test_delete_tells_what_the_kernel_has_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path / "run", transport="kernel")
    rig.device.failure = errors.TimedOutError("device vd0: its driver did not let go of it within 40 s")
    monkeypatch.setattr(left, "in_kernel", lambda name: True)

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
    monkeypatch.setattr(usage, "find_users", lambda node: [])
    monkeypatch.setattr(left, "in_kernel", lambda name: False)
    rig = Rig(tmp_path / "run", transport="kernel")
    yield rig
    if rig.error is not None:
        raise rig.error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_a_kernel_device_to_the_next_server(
    kernel_rig: Rig, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    kernel_rig.run(lambda: os.kill(os.getpid(), number))
    assert (kernel_rig.device.hand_overs, kernel_rig.device.stops) == ([daemon.STOP_TIMEOUT_S], [])
    assert kernel_rig.path.is_dir()
    assert "vd0: left in the kernel as /dev/vdfake" in caplog.text
    assert "`vdusefast recover vd0` goes on with it, `vdusefast del vd0` removes it" in caplog.text


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


def test_hand_over_by_command_ends_the_server(kernel_rig: Rig) -> None:
    def act() -> None:
        assert kernel_rig.call("hand_over", timeout_s=4.0)["name"] == "vd0"

    kernel_rig.run(act)
    assert (kernel_rig.device.hand_overs, kernel_rig.device.stops) == ([4.0], [])
    assert not kernel_rig.service.deleted
    assert not run_dir.is_held(kernel_rig.path)


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
    monkeypatch.setattr(left, "remove_broken", removed.append)
    first = kernel_rig.device
    first.start_error = DeviceBrokenError("device vd0 is broken")
    kernel_rig.run(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert removed == [kernel_rig.path]
    assert kernel_rig.device is not first
    assert len(kernel_rig.device.stops) == 1


def test_broken_device_in_use_is_refused(kernel_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise errors.DeviceBusyError("vd0: it is broken and in use")

    monkeypatch.setattr(left, "remove_broken", refuse)
    kernel_rig.device.start_error = DeviceBrokenError("device vd0 is broken")
    with pytest.raises(errors.DeviceBusyError, match="broken and in use"):
        kernel_rig.service.run(lambda _: pytest.fail("not ready"))


def test_new_server_takes_over_from_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is asked when the new one has come as far as it can, and ends before the device is started."""
    monkeypatch.setattr(left, "in_kernel", lambda name: False)
    held = RunDirectory("vd0", tmp_path / "run")
    asked: list[Any] = []

    def hand_over(params: daemon.HandOverParams) -> dict[str, Any]:
        asked.append(params.timeout_s)
        threading.Timer(0.1, held.release).start()
        return {}

    server = RpcServer(tmp_path / "run/vd0", {"hand_over": Method(daemon.HandOverParams, hand_over)})
    with server:
        rig = Rig(tmp_path / "run", transport="kernel", take_over=True)
        assert asked == []
        rig.run(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert asked == [daemon.STOP_TIMEOUT_S]
    assert (rig.device.starts, len(rig.device.hand_overs)) == ([(None, False)], 1)


def test_old_server_that_cannot_be_asked_keeps_its_device(tmp_path: Path) -> None:
    with RunDirectory("vd0", tmp_path / "run"):
        rig = Rig(tmp_path / "run", transport="kernel", take_over=True)
        with pytest.raises(errors.DeviceBusyError, match=f"held by pid {os.getpid()}, which takes no commands"):
            rig.service.run(lambda _: pytest.fail("not ready"))
    assert rig.device.starts == []


def test_server_for_a_removal_fails_requests(kernel_rig: Rig) -> None:
    rig = Rig(kernel_rig.base, transport="kernel", fail_requests=True)
    rig.run(lambda: rig.call("delete"))
    assert rig.error is None
    assert rig.device.starts == [(True, True)]


# -- systemd


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Return the socket of a service manager with an abstract name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0vdusefast-test-{os.getpid()}")
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@vdusefast-test-{os.getpid()}")
        yield listener


def receive(listener: socket.socket) -> str:
    """Return what comes next, "" when nothing comes within the socket's limit."""
    try:
        return listener.recv(4096).decode()
    except TimeoutError:
        return ""


def test_systemd_is_told_of_everything(manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "150000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    rig = Rig(tmp_path / "run")
    assert "NOTIFY_SOCKET" not in os.environ

    def act() -> list[str]:
        seen = [manager.recv(4096).decode() for _ in range(5)]
        rig.device.failure = errors.WorkerError("queue 0: its worker died")
        while "its worker died" not in seen[-1]:
            seen.append(manager.recv(4096).decode())
        rig.device.healthy = False
        manager.settimeout(0.4)
        pings = len(list(iter(lambda: receive(manager), "")))
        assert pings <= 2  # those that were on their way
        manager.settimeout(5)
        rig.call("delete")
        return [*seen, manager.recv(4096).decode()]

    rig.run(act)
    assert rig.error is None
    seen = rig.result
    assert seen[:2] == ["STATUS=starting", "READY=1\nSTATUS=serving /dev/vdfake"]
    assert seen[2:5] == ["WATCHDOG=1"] * 3
    assert "STATUS=failed: queue 0: its worker died" in seen
    assert seen[-1] == "STOPPING=1\nSTATUS=stopping"


def test_systemd_waits_as_long_as_we_do(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_use: list[str]
) -> None:
    """For the driver at the start, and for a client of vhost-vdpa at the end."""
    monkeypatch.setattr(daemon, "CLIENT_LOOK_S", 0.02)
    monkeypatch.setattr(daemon, "EXTEND_EVERY_S", 0.05)
    monkeypatch.setattr(left, "in_kernel", lambda name: False)
    rig = Rig(tmp_path / "run", uri="memory:1M", transport="kernel", attach_timeout_s=300)
    rig.device.node = "/dev/vhost-vdpa-0"

    def act() -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        seen = [manager.recv(4096).decode() for _ in range(6)]
        in_use.clear()
        return seen

    rig.run(act)
    assert rig.error is None
    assert rig.result[0] == "STATUS=starting\nEXTEND_TIMEOUT_USEC=390000000"
    assert rig.result[2] == "STOPPING=1\nSTATUS=stopping"
    assert rig.result[3:] == ["EXTEND_TIMEOUT_USEC=90000000"] * 3


def test_notifier_by_path_and_without_a_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    silent = sd_notify.Notifier()
    assert (silent.active, silent.watchdog_s) == (False, 0.0)
    silent.send(READY=1)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    notifier = sd_notify.Notifier()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        notifier.send(STATUS="two\nlines")
        assert listener.recv(100) == b"STATUS=two lines"
    assert not caplog.text
    notifier.send(READY=1)
    assert "cannot tell the service manager READY=1" in caplog.text


@pytest.mark.parametrize(
    ("variables", "service"),
    [
        ({}, False),
        ({"NOTIFY_SOCKET": "@x"}, True),
        ({"SYSTEMD_EXEC_PID": str(os.getpid()), "INVOCATION_ID": "1"}, True),
        ({"SYSTEMD_EXEC_PID": str(os.getpid() + 1), "INVOCATION_ID": "1"}, False),  # a service has started our parent
    ],
)
def test_service_is_told_from_what_a_service_has_started(
    variables: dict[str, str], service: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NOTIFY_SOCKET", "SYSTEMD_EXEC_PID", "INVOCATION_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sd_notify.is_service() == service


def test_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for pid, seconds in ((str(os.getpid() + 1), 0.0), (str(os.getpid()), 30.0)):
        monkeypatch.setenv("NOTIFY_SOCKET", "@x")
        monkeypatch.setenv("WATCHDOG_USEC", "30000000")
        monkeypatch.setenv("WATCHDOG_PID", pid)
        assert sd_notify.Notifier().watchdog_s == seconds
