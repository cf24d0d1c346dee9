"""The commands that adopt, restart and remove orphaned devices, and those that have a server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from orphan_rig import (
    BASE,
    CONFIG,
    SERVICE,
    FakeMachine,
    FakeManager,
    FakeServer,
    Started,
    fake_machine,
    orphaned_directory,
    serving,
)

from vdusefast import errors
from vdusefast.backends import probe
from vdusefast.base import time_limits
from vdusefast.base.start_mode import StartMode
from vdusefast.cli import app as cli
from vdusefast.host import processes
from vdusefast.server import hand_over, lifecycle, registry
from vdusefast.server.rpc_client import RpcClient
from vdusefast.state import orphans, saved_state
from vdusefast.state.run_dir import RunDirectory

pytestmark = pytest.mark.usefixtures("sees_all_processes")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return fake_machine(monkeypatch)


@pytest.fixture
def orphan_path(machine: FakeMachine) -> Iterator[Path]:
    with orphaned_directory() as path:
        yield path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(monkeypatch)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> FakeManager:
    return FakeManager(monkeypatch)


@pytest.fixture(autouse=True)
def servers_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is this process, for whose end `del` would wait."""

    def gone(_pid: int) -> int:
        raise ProcessLookupError

    monkeypatch.setattr(os, "pidfd_open", gone)


@pytest.mark.parametrize("command", ["recover", "restart"])
def test_orphan_is_served_with_its_configuration(
    orphan_path: Path, started: Started, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([command, "vd0"]) == 0
    assert capsys.readouterr().out == "/dev/vdx\n"
    assert cli.run([command, "vd0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pid"] == 5
    # Only `recover` is an operator's word that a store that has lost data is well.
    assert started.asked == [(CONFIG, StartMode.RECOVER if command == "recover" else StartMode.ADD)] * 2


@pytest.mark.parametrize("command", [["recover", "vd0"], ["restart", "vd0"], ["add", "vd0", "--backend", "null:4M"]])
def test_other_store_is_taken_where_that_is_asked_for(orphan_path: Path, started: Started, command: list[str]) -> None:
    """And what is written down is as it was when the start fails."""
    saved = saved_state.load(orphan_path / "state")
    assert saved is not None
    saved = msgspec.structs.replace(saved, identity={"kind": "file", "inode": "12"})
    saved_state.save(orphan_path / "state", saved)
    seen = []

    def look() -> None:
        state = saved_state.load(orphan_path / "state")
        assert state is not None
        seen.append(state.identity)
        raise errors.BackendError("vd0: cannot be opened")

    started.then = look
    assert cli.run(command) == 1
    assert saved_state.load(orphan_path / "state") == saved
    assert cli.run([*command, "--other-store"]) == 1
    assert saved_state.load(orphan_path / "state") == saved
    assert seen == [saved.identity, {}]


@pytest.mark.parametrize("command", ["recover", "restart"])
def test_nothing_to_adopt_is_3(
    machine: FakeMachine, started: Started, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.created.clear()
    machine.attached.clear()
    assert cli.run([command, "vd0"]) == 3
    assert "no such device" in capsys.readouterr().err
    with orphaned_directory():
        assert cli.run([command, "vd0"]) == 3
        assert "has ended and left nothing to adopt: vdusefast del vd0" in capsys.readouterr().err
    assert started.asked == []


def test_device_that_is_well_has_nothing_to_recover(
    machine: FakeMachine, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(machine):
        assert cli.run(["recover", "vd0"]) == 4
    assert "is being served by pid 7 (state running): there is nothing to recover" in capsys.readouterr().err
    with RunDirectory("vd0", BASE):
        assert cli.run(["recover", "vd0"]) == 4
    assert "which takes no commands" in capsys.readouterr().err
    assert started.asked == []


def test_broken_device_whose_server_runs_is_created_again(
    machine: FakeMachine, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(machine, state="broken") as server:
        machine.pending = 1
        assert cli.run(["recover", "vd0"]) == 4
        assert "requests wait in it" in capsys.readouterr().err
        machine.pending, machine.users = 0, ["open by pid 9 (dd)"]
        assert cli.run(["recover", "vd0"]) == 4
        assert "in use: open by pid 9 (dd)" in capsys.readouterr().err
        assert (server.called, started.asked) == ([], [])
        machine.users = []
        assert cli.run(["recover", "vd0"]) == 0
        assert server.called == [("delete", False)]
    assert started.asked == [(CONFIG, StartMode.ADD)]


def test_restart_that_fails_says_why_and_who_serves(
    machine: FakeMachine, started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lifecycle, "TAKEN_BACK_TIMEOUT_S", 0.2)

    def fail() -> None:
        raise errors.BackendError("file:/srv/d.img: no such file")

    started.then = fail
    nobody = "nobody serves it now, and its requests wait: vdusefast"
    for serving_pid, words in (
        (7, "pid 7 serves it"),
        (0, "a process in another PID namespace, such as a container's serves it"),
        (None, nobody),
    ):
        monkeypatch.setattr(lifecycle, "serving_pid", lambda path, pid=serving_pid: pid)
        with serving(machine):
            assert cli.run(["restart", "vd0", "--unseen"]) == 1
        assert f"file:/srv/d.img: no such file; {words}" in capsys.readouterr().err
    assert started.asked == [(CONFIG, StartMode.TAKE_OVER_UNSEEN)] * 3


def test_restart_of_a_service_is_a_reload(
    machine: FakeMachine, started: Started, manager: FakeManager, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(machine, node="/dev/vdx", **SERVICE):
        assert cli.run(["restart", "vd0"]) == 0
        assert capsys.readouterr().out == "/dev/vdx\n"
        manager.refusal = errors.VdusefastError("systemctl reload x failed: reload failed: no such file; pid 7 serves")
        assert cli.run(["restart", "vd0"]) == 1
        assert "reload failed: no such file" in capsys.readouterr().err
    assert manager.asked == [("reload", "vdusefast@vd0.service")] * 2
    assert started.asked == []


@pytest.mark.parametrize(("reloads", "words"), [(False, []), (True, ["--unseen"])])
def test_service_that_cannot_be_reloaded_is_restarted_after_a_proof(
    machine: FakeMachine,
    manager: FakeManager,
    monkeypatch: pytest.MonkeyPatch,
    reloads: bool,
    words: list[str],
) -> None:
    proofs: list[bool] = []
    refusal: list[errors.VdusefastError] = []

    def prove(_device: object, *, look: bool = True) -> None:
        proofs.append(look)
        for error in refusal:
            raise error

    monkeypatch.setattr("vdusefast.api.Device.prove", prove)
    manager.reloads = reloads
    with serving(machine, node="/dev/vdx", **SERVICE):
        assert cli.run(["restart", "vd0", *words]) == 0
        refusal.append(errors.BackendError("no such file"))
        assert cli.run(["restart", "vd0", *words]) == 1
    assert manager.asked == [("restart", "vdusefast@vd0.service")]
    assert proofs == [not words] * 2


def test_broken_device_of_a_service_is_created_again_by_systemd(
    machine: FakeMachine, started: Started, manager: FakeManager
) -> None:
    with serving(machine, node="/dev/vdx", state="broken", **SERVICE) as server:
        machine.users = ["open by pid 9 (dd)"]
        assert cli.run(["recover", "vd0"]) == 4
        machine.users = []
        assert cli.run(["recover", "vd0"]) == 0
        assert (server.called, started.asked) == ([], [])
    assert manager.asked == [("restart", "vdusefast@vd0.service")]


@pytest.mark.parametrize(("command", "state"), [("recover", "broken"), ("restart", "running")])
def test_server_of_another_manager_is_left_to_it(
    machine: FakeMachine, started: Started, command: str, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(machine, state=state, systemd=True, unit="") as server:
        assert cli.run([command, "vd0"]) == 4
        assert (server.called, started.asked) == ([], [])
    assert "is run by a service manager: have that one restart it" in capsys.readouterr().err


def test_restart_starts_the_new_server_first(machine: FakeMachine, started: Started) -> None:
    with serving(machine) as server:
        assert cli.run(["restart", "vd0"]) == 0
        assert server.called == []  # the new one asks it
    assert started.asked == [(CONFIG, StartMode.TAKE_OVER)]


@pytest.mark.parametrize(
    ("info", "status", "words"),
    [
        ({"transport": "loopback"}, 1, "a loopback device ends with its server"),
        ({"state": "broken"}, 4, "is broken, which a restart does not mend: vdusefast recover vd0"),
    ],
)
def test_what_a_restart_is_no_help_for(
    machine: FakeMachine,
    started: Started,
    info: dict[str, Any],
    status: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(machine, **info):
        assert cli.run(["restart", "vd0"]) == status
    assert words in capsys.readouterr().err
    assert started.asked == []


@pytest.mark.parametrize(("words", "mode"), [([], StartMode.ADD), (["--force"], StartMode.FAIL)])
def test_dead_device_is_served_to_be_deleted(
    orphan_path: Path, machine: FakeMachine, started: Started, words: list[str], mode: StartMode
) -> None:
    """Else the kernel would wait for its requests."""
    servers: list[FakeServer] = []
    started.then = lambda: servers.append(FakeServer(machine))
    assert cli.run(["del", "vd0", *words]) == 0
    assert started.asked == [(CONFIG, mode)]
    assert servers[0].called == [("delete", bool(words))]
    assert not orphan_path.exists()


def test_dead_device_in_use_is_served_again(
    orphan_path: Path, machine: FakeMachine, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    servers: list[FakeServer] = []

    def serve() -> None:
        servers.append(FakeServer(machine))
        servers[0].refusal = errors.DeviceBusyError("vd0: /dev/vdx is in use: mounted on /mnt; or --force")

    started.then = serve
    assert cli.run(["del", "vd0"]) == 4
    assert "in use: mounted on /mnt; or --force (it is served again)" in capsys.readouterr().err
    servers[0].close()


def test_dead_and_broken_device_is_deleted_without_a_server(
    orphan_path: Path, machine: FakeMachine, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.broken.add("vd0")
    machine.users = ["mounted on /mnt"]
    assert cli.run(["del", "vd0"]) == 4
    assert "in use: mounted on /mnt" in capsys.readouterr().err
    machine.users = []
    assert cli.run(["del", "vd0"]) == 0
    assert (machine.done, started.asked) == (["unbind vd0", "delete vd0", "destroy vd0"], [])
    assert not orphan_path.exists()


def test_dead_device_that_nothing_uses_is_deleted_without_a_server(
    orphan_path: Path, machine: FakeMachine, started: Started
) -> None:
    machine.attached.clear()
    assert orphans.advice("vd0").endswith("which nothing uses: vdusefast del vd0")
    assert cli.run(["del", "vd0"]) == 0
    assert (machine.done, started.asked) == (["destroy vd0"], [])
    assert not orphan_path.exists()


def test_dead_device_without_a_state_is_left_alone(
    machine: FakeMachine, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    with orphaned_directory(state=False) as path:
        for words in (["del", "vd0"], ["del", "vd0", "--force"], ["recover", "vd0"]):
            assert cli.run(words) == 4
            assert "vdusefast del vd0 --force --claim removes it" in capsys.readouterr().err
        with pytest.raises(errors.DeviceBusyError, match="vdusefast recover vd0"):
            registry.remove_dead(path)
    assert (machine.done, started.asked) == ([], [])


def test_command_looks_in_place_of_a_server_in_a_pid_namespace(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "is_in_first_namespace", lambda pid: False)
    for seen, users, status, is_unused in (
        (True, ["open by pid 7 (cat)"], 4, None),
        (True, [], 0, True),
        (False, ["open by pid 7 (cat)"], 0, False),  # the server decides
    ):
        monkeypatch.setattr(processes, "sees_all", lambda seen=seen: seen)
        machine.users, machine.created, machine.attached = users, {"vd0"}, {"vd0"}
        with serving(machine, node="/dev/vdx") as server:
            assert cli.run(["del", "vd0"]) == status
            assert server.called == ([] if is_unused is None else [("delete", False)])
            assert server.is_unused == bool(is_unused)
        said = capsys.readouterr().err
        assert ("/dev/vdx is in use: open by pid 7 (cat); end that first, or --force" in said) == (status == 4)


def test_commands_wait_longer_than_the_server_takes(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: dict[str, float] = {}
    margin_s = time_limits.MARGIN_S

    def call(self: RpcClient, method: str, params: Any = None, timeout_s: float = 10.0) -> Any:
        waited[method] = timeout_s
        return {"size_bytes": 1, "before_bytes": 1}

    with serving(machine) as server:
        monkeypatch.setattr(RpcClient, "call", call)
        assert cli.run(["resize", "vd0", "2M"]) == 0
        assert cli.run(["del", "vd0", "--timeout", "7"]) == 1  # nothing has removed it
        monkeypatch.setattr(time_limits, "MARGIN_S", 0.1)
        with pytest.raises(errors.TimedOutError, match="does not let go"):
            hand_over.ask(server.directory.path)
    assert waited["resize"] > probe.PROBE_LIMIT_S + time_limits.RESIZE_TIMEOUT_S
    assert waited["delete"] > 7 + time_limits.LETTING_GO_S + margin_s
    assert waited["hand_over"] > time_limits.STOP_TIMEOUT_S
