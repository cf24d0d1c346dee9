"""The messages that the process that serves a device sends to systemd, and when."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_rig import Rig

from vdusefast import errors
from vdusefast.base.start_mode import StartMode
from vdusefast.host import node_users, run_dirs
from vdusefast.server import hand_over, sd_notify
from vdusefast.server import service as daemon
from vdusefast.state import orphans

pytestmark = pytest.mark.usefixtures("sees_all_processes")


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
        assert rig.call("info")["watchdog_s"] == 0.15  # for the server that takes over
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


def test_service_goes_on_with_the_server_that_has_taken_over(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes the main process before the old one can see that it serves; the old one does not end the service."""
    rig = Rig(tmp_path / "run", uri="file:/nowhere", transport="kernel", mode=StartMode.TAKE_OVER)
    served: list[bool] = []
    notify = rig.service._notifier.send

    def send(**fields: str | int) -> None:
        served.append((rig.path / "socket").exists())
        notify(**fields)

    monkeypatch.setattr(rig.service._notifier, "send", send)
    monkeypatch.setattr(hand_over.Successor, "wait", lambda *_: "")

    def act() -> list[str]:
        rig.call("hand_over")
        return []

    rig.run(act)
    assert rig.error is None
    seen = []
    manager.settimeout(0.2)
    while said := receive(manager):
        seen.append(said)
    assert seen[0].startswith("EXTEND_TIMEOUT_USEC=")  # the status is still the old server's
    assert seen[1:] == [f"MAINPID={os.getpid()}", "READY=1\nSTATUS=serving /dev/vdfake"]
    assert served == [False, False, True]


def test_server_that_takes_its_device_back_is_the_main_process_again(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    answers = ["its new server has ended", ""]
    alive: list[int] = []

    def wait(successor: hand_over.Successor, stop_fd: int, keep_alive: Callable[[], None]) -> str:
        for _ in range(3):  # a server that starts may take longer than the watchdog's limit
            keep_alive()
            time.sleep(0.03)
        alive.append(1)
        return answers.pop(0)

    monkeypatch.setattr(hand_over.Successor, "wait", wait)
    rig = Rig(tmp_path / "run", uri="file:/nowhere", transport="kernel")

    def act() -> list[str]:
        rig.call("hand_over")
        deadline = time.monotonic() + 20
        while not (alive and run_dirs.is_held(rig.path)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen: list[str] = []
        while not seen or not seen[-1].startswith("MAINPID="):
            seen.append(manager.recv(4096).decode())
        rig.wait_until_it_listens()
        rig.call("hand_over")
        return seen

    rig.run(act)
    assert rig.error is None
    assert rig.result[-1] == f"MAINPID={os.getpid()}"
    assert rig.result.count("WATCHDOG=1") >= 3
    assert not [said for said in rig.result if "STOPPING" in said]


def test_systemd_waits_as_long_as_we_do(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the driver at the start, and for a client of vhost-vdpa at the end."""
    in_use = ["open in qemu"]
    monkeypatch.setattr(node_users, "find_users", lambda node: list(in_use))
    monkeypatch.setattr(daemon, "CLIENT_LOOK_S", 0.02)
    monkeypatch.setattr("vdusefast.server.sd_notify.EXTEND_EVERY_S", 0.05)
    monkeypatch.setattr(orphans, "in_kernel", lambda name: False)
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
