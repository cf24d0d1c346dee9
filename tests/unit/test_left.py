"""Devices whose server has ended: what is found of them, and the commands that go on with them or remove them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vdusefast import api, errors
from vdusefast.api import Device
from vdusefast.backends import probe
from vdusefast.base import time_limits
from vdusefast.cli import app as cli
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.control import supervisor
from vdusefast.host import node_users, processes, sysfs, vdpa
from vdusefast.server import hand_over, launch, lifecycle, registry
from vdusefast.server.launch import Mode
from vdusefast.server.rpc import Method, NoParams, RpcServer
from vdusefast.server.rpc_client import RpcClient
from vdusefast.server.systemd import manager as service_manager
from vdusefast.state import orphans, saved_state
from vdusefast.state.run_dir import RunDirectory
from vdusefast.transport import kernel_control
from vdusefast.transport.loopback import LoopbackTransport

pytestmark = pytest.mark.usefixtures("sees_all_processes")

BASE = Path(os.environ["VDUSEFAST_RUN_DIR"])
CONFIG = resolve_cpus(make_config(name="vd0", uri="null:8M", transport="kernel"))


class FakeMachine:
    """A kernel with devices in several states, and what was done to it."""

    def __init__(self) -> None:
        self.created = {"vd0"}
        self.attached = {"vd0"}
        self.broken: set[str] = set()
        self.node = "/dev/vdx"
        self.users: list[str] = []
        self.pending = 0
        self.done: list[str] = []

    def unbind(self, name: str) -> None:
        self.done.append(f"unbind {name}")

    def device_delete(self, name: str) -> None:
        self.done.append(f"delete {name}")
        self.attached.discard(name)

    def destroy(self, name: str) -> None:
        self.done.append(f"destroy {name}")
        self.created.discard(name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    made = FakeMachine()
    monkeypatch.setattr(sysfs, "created", lambda name: name in made.created)
    monkeypatch.setattr(sysfs, "attached", lambda name: name in made.attached)
    monkeypatch.setattr(sysfs, "node", lambda name: made.node if name in made.attached else "")
    monkeypatch.setattr(sysfs, "unbind", made.unbind)
    monkeypatch.setattr(vdpa, "device_delete", made.device_delete)
    monkeypatch.setattr(kernel_control, "destroy_device", made.destroy)
    monkeypatch.setattr(kernel_control, "is_left_broken", lambda name: name in made.broken)
    monkeypatch.setattr(node_users, "find_users", lambda node: list(made.users))
    monkeypatch.setattr(node_users, "pending_requests", lambda node: made.pending)
    return made


@contextmanager
def directory_left(*, transport: str = "kernel", state: bool = True, config: Config = CONFIG) -> Iterator[Path]:
    """Have a run directory that a server has left, and remove what remains of it."""
    directory = RunDirectory("vd0", BASE, transport)
    if state:
        write_state(directory.path, config)
    directory.release()
    yield directory.path
    if directory.path.exists():
        RunDirectory("vd0", BASE).close()


def write_state(path: Path, config: Config = CONFIG) -> None:
    from vdusefast.backends import open_store
    from vdusefast.control.device_model import BlockDevice

    with open_store(config.backend) as store:
        spec = BlockDevice(config, store).spec()
    saved = saved_state.make_state(config, spec, LoopbackTransport())
    saved_state.save(path / "state", msgspec.structs.replace(saved, transport="kernel"))


@pytest.fixture
def left_path(machine: FakeMachine) -> Iterator[Path]:
    with directory_left() as path:
        yield path


def choose(recover: bool | None, config: Config = CONFIG, kind: str = "kernel") -> Any:
    """Ask `left.choose` as a server does."""
    directory = RunDirectory("vd0", BASE)
    try:
        return orphans.choose(directory, config, kind, recover)
    finally:
        directory.release()


# -- what is done with what was left


@pytest.mark.parametrize("recover", [None, True])
def test_device_that_was_left_is_taken_over(left_path: Path, machine: FakeMachine, recover: bool | None) -> None:
    for _ in range(2):  # also when it was not on the bus yet
        assert choose(recover).config == CONFIG
        machine.attached.clear()
    assert machine.done == []


def test_another_device_is_refused_and_nothing_is_touched(left_path: Path, machine: FakeMachine) -> None:
    before = (left_path / "state").read_bytes()
    other = resolve_cpus(make_config(name="vd0", uri="null:8M", transport="kernel", queues=2))
    with pytest.raises(errors.ConfigError, match=r"device\.queues"):
        choose(None, other)
    with pytest.raises(errors.ConfigError, match=r"device\.transport"):
        choose(None, kind="loopback")
    assert (left_path / "state").read_bytes() == before
    assert machine.done == []


def test_device_that_is_not_to_be_taken_over_is_not_lost(left_path: Path, machine: FakeMachine) -> None:
    with pytest.raises(errors.DeviceBusyError, match="vdusefast recover vd0 goes on with it"):
        choose(False)
    machine.attached.clear()  # then nobody can have used it
    assert choose(False) is None
    assert machine.done == ["destroy vd0"]
    assert not (left_path / "state").exists()


def test_device_whose_server_died_before_it_wrote_anything_is_made_anew(machine: FakeMachine) -> None:
    machine.attached.clear()
    with directory_left(state=False):
        assert choose(None) is None
    assert machine.done == ["destroy vd0"]


@pytest.mark.parametrize("recover", [None, True])
def test_device_that_nobody_knows_how_to_go_on_with(machine: FakeMachine, recover: bool | None) -> None:
    with directory_left(state=False):
        with pytest.raises(errors.DeviceBusyError, match=r"is not there; .*vdusefast add CONFIG --claim"):
            choose(recover)
        with pytest.raises(errors.DeviceBusyError, match="vdusefast add CONFIG --claim"):
            orphans.load_state(BASE / "vd0")
    assert machine.done == []


@pytest.mark.parametrize(("transport", "created"), [("loopback", True), ("kernel", False)])
def test_name_whose_device_is_gone_or_somebody_elses_is_taken(
    machine: FakeMachine, transport: str, created: bool
) -> None:
    if not created:
        machine.created.clear()
        machine.attached.clear()
    with directory_left(transport=transport):
        assert choose(None) is None
        with pytest.raises(errors.DeviceNotFoundError, match="nothing to go on with"):
            choose(True)
    assert machine.done == []


def test_new_name_has_nothing_to_go_on_with(machine: FakeMachine) -> None:
    machine.created.clear()
    machine.attached.clear()
    device = Device(CONFIG)
    with pytest.raises(errors.DeviceNotFoundError, match="nothing to go on with"):
        device.start(recover=True)
    assert not (BASE / "vd0").exists()


# -- broken ones


def test_broken_device_that_nobody_uses_is_removed(left_path: Path, machine: FakeMachine) -> None:
    orphans.remove_broken(left_path)
    assert machine.done == ["unbind vd0", "delete vd0", "destroy vd0"]
    assert (left_path / "state").exists()


def test_broken_device_is_left_to_whoever_uses_it(left_path: Path, machine: FakeMachine) -> None:
    machine.users = ["mounted on /mnt"]
    with pytest.raises(errors.DeviceBusyError, match=r"in use: mounted on /mnt; end that, then: vdusefast recover vd0"):
        orphans.remove_broken(left_path)
    machine.pending = 3
    with pytest.raises(errors.DeviceBusyError, match=r"3 of /dev/vdx's requests wait in it.*Reboot"):
        orphans.remove_broken(left_path)
    held = RunDirectory("vd0", BASE)
    with pytest.raises(errors.DeviceBusyError, match="is being served already"):
        orphans.remove_broken(left_path)
    held.release()
    assert machine.done == []


def test_broken_device_that_the_kernel_does_not_let_go_of_is_told(
    left_path: Path, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_name: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(vdpa, "device_delete", refuse)
    with pytest.raises(errors.VdusefastError, match="device vd0: cannot be detached: Input/output error"):
        orphans.remove_broken(left_path)


def test_pending_requests_are_those_of_the_block_device(tmp_path: Path) -> None:
    (tmp_path / "sys/block/vdx").mkdir(parents=True)
    (tmp_path / "sys/block/vdx/inflight").write_text("       2        5\n")
    assert node_users.pending_requests("/dev/vdx", tmp_path) == 7
    for node in ("/dev/vhost-vdpa-0", ""):
        assert node_users.pending_requests(node, tmp_path) == 0


# -- what is shown


def test_dead_and_broken_are_shown_with_what_to_do(
    left_path: Path, machine: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    for state, words in (("dead", "where requests wait"), ("broken", "which is broken")):
        assert cli.run(["list"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["vd0", state, "/dev/vdx"]
        assert cli.run(["show", "vd0", "--json"]) == 0
        info = json.loads(capsys.readouterr().out)
        assert (info["state"], info["advice"]) == (state, orphans.advice("vd0"))
        assert words in info["advice"]
        assert "vdusefast recover vd0" in info["advice"]
        assert cli.run(["show", "vd0"]) == 0
        assert "vdusefast recover" in capsys.readouterr().out
        assert cli.run(["stats", "vd0"]) == 1
        assert capsys.readouterr().err == f"vdusefast: {orphans.advice('vd0')}\n"
        machine.broken.add("vd0")


# -- commands


class Started:
    """What was asked of background.start, in place of a process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Config, Mode]] = []
        self.then: Any = lambda: None
        monkeypatch.setattr(launch, "start", self._start)

    def _start(self, config: Config, *, mode: Mode = Mode.ADD) -> dict[str, Any]:
        self.asked.append((config, mode))
        self.then()
        return {"name": "vd0", "node": "/dev/vdx", "pid": 5, "transport": "kernel"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(monkeypatch)


class FakeServer:
    """A server of vd0 that answers as told, and ends when its device is deleted."""

    def __init__(self, machine: FakeMachine, **info: Any) -> None:
        self._machine = machine
        self.called: list[tuple[str, Any]] = []
        self.is_unused = False  # as the command says that has looked
        self.refusal: errors.VdusefastError | None = None
        self.directory = RunDirectory("vd0", BASE, "kernel")
        self.info = {"name": "vd0", "state": "running", "pid": 7, "transport": "kernel", "systemd": False, **info}
        from vdusefast.server.service import DeleteParams

        methods = {"info": Method(NoParams, lambda _: self.info), "delete": Method(DeleteParams, self._delete)}
        self.rpc = RpcServer(self.directory.path, methods)
        self.rpc.start()

    def _delete(self, params: Any) -> dict[str, Any]:
        self.called.append(("delete", params.force))
        self.is_unused = params.is_unused
        if self.refusal is not None:
            raise self.refusal
        self._machine.attached.clear()
        self._machine.created.clear()
        self.directory.close()
        threading.Timer(0.01, self.rpc.close).start()
        return {}

    def close(self) -> None:
        self.rpc.close()
        self.directory.close()


@contextmanager
def serving(machine: FakeMachine, **info: Any) -> Iterator[FakeServer]:
    server = FakeServer(machine, **info)
    write_state(server.directory.path)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(autouse=True)
def servers_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is this process, for whose end `del` would wait."""

    def gone(_pid: int) -> int:
        raise ProcessLookupError

    monkeypatch.setattr(os, "pidfd_open", gone)


@pytest.mark.parametrize("command", ["recover", "restart"])
def test_device_that_was_left_is_served_by_its_configuration(
    left_path: Path, started: Started, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([command, "vd0"]) == 0
    assert capsys.readouterr().out == "/dev/vdx\n"
    assert cli.run([command, "vd0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pid"] == 5
    # Only `recover` is an operator's word that a store that has lost data is well.
    assert started.asked == [(CONFIG, Mode.RECOVER if command == "recover" else Mode.ADD)] * 2


@pytest.mark.parametrize("command", [["recover", "vd0"], ["restart", "vd0"], ["add", "vd0", "--backend", "null:4M"]])
def test_other_store_is_taken_where_that_is_asked_for(left_path: Path, started: Started, command: list[str]) -> None:
    """And what is written down is as it was when the start fails."""
    saved = saved_state.load(left_path / "state")
    assert saved is not None
    saved = msgspec.structs.replace(saved, identity={"kind": "file", "inode": "12"})
    saved_state.save(left_path / "state", saved)
    seen = []

    def look() -> None:
        state = saved_state.load(left_path / "state")
        assert state is not None
        seen.append(state.identity)
        raise errors.BackendError("vd0: cannot be opened")

    started.then = look
    assert cli.run(command) == 1
    assert saved_state.load(left_path / "state") == saved
    assert cli.run([*command, "--other-store"]) == 1
    assert saved_state.load(left_path / "state") == saved
    assert seen == [saved.identity, {}]


@pytest.mark.parametrize("command", ["recover", "restart"])
def test_nothing_to_go_on_with_is_3(
    machine: FakeMachine, started: Started, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.created.clear()
    machine.attached.clear()
    assert cli.run([command, "vd0"]) == 3
    assert "no such device" in capsys.readouterr().err
    with directory_left():
        assert cli.run([command, "vd0"]) == 3
        assert "has ended and left nothing to go on with: vdusefast del vd0" in capsys.readouterr().err
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


def test_broken_device_whose_server_runs_is_made_anew(
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
    assert started.asked == [(CONFIG, Mode.ADD)]


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
    assert started.asked == [(CONFIG, Mode.TAKE_OVER_UNSEEN)] * 3


class FakeManager:
    """What service_manager is asked for, in place of systemd."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str]] = []
        self.reloads = True
        self.refusal: errors.VdusefastError | None = None
        monkeypatch.setattr(service_manager, "can_reload", lambda unit: self.reloads)
        for verb in ("reload", "restart"):
            monkeypatch.setattr(service_manager, verb, lambda unit, limit_s, verb=verb: self._ask(verb, unit))

    def _ask(self, verb: str, unit: str) -> None:
        self.asked.append((verb, unit))
        if self.refusal is not None:
            raise self.refusal


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> FakeManager:
    return FakeManager(monkeypatch)


SERVICE = {"systemd": True, "unit": "vdusefast@vd0.service"}


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


def test_broken_device_of_a_service_is_made_anew_by_systemd(
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
    assert started.asked == [(CONFIG, Mode.TAKE_OVER)]


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


@pytest.mark.parametrize(("words", "mode"), [([], Mode.ADD), (["--force"], Mode.FAIL)])
def test_dead_device_is_served_to_be_deleted(
    left_path: Path, machine: FakeMachine, started: Started, words: list[str], mode: Mode
) -> None:
    """Else the kernel would wait for its requests."""
    servers: list[FakeServer] = []
    started.then = lambda: servers.append(FakeServer(machine))
    assert cli.run(["del", "vd0", *words]) == 0
    assert started.asked == [(CONFIG, mode)]
    assert servers[0].called == [("delete", bool(words))]
    assert not left_path.exists()


def test_dead_device_in_use_is_served_again(
    left_path: Path, machine: FakeMachine, started: Started, capsys: pytest.CaptureFixture[str]
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
    left_path: Path, machine: FakeMachine, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.broken.add("vd0")
    machine.users = ["mounted on /mnt"]
    assert cli.run(["del", "vd0"]) == 4
    assert "in use: mounted on /mnt" in capsys.readouterr().err
    machine.users = []
    assert cli.run(["del", "vd0"]) == 0
    assert (machine.done, started.asked) == (["unbind vd0", "delete vd0", "destroy vd0"], [])
    assert not left_path.exists()


def test_dead_device_that_nothing_uses_is_deleted_without_a_server(
    left_path: Path, machine: FakeMachine, started: Started
) -> None:
    machine.attached.clear()
    assert orphans.advice("vd0").endswith("which nothing uses: vdusefast del vd0")
    assert cli.run(["del", "vd0"]) == 0
    assert (machine.done, started.asked) == (["destroy vd0"], [])
    assert not left_path.exists()


def test_dead_device_without_a_state_is_left_alone(
    machine: FakeMachine, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    with directory_left(state=False) as path:
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
    assert waited["resize"] > probe.PROBE_LIMIT_S + api.RESIZE_TIMEOUT_S
    assert waited["delete"] > 7 + supervisor.LETTING_GO_S + api.MARGIN_S
    assert waited["hand_over"] > api.STOP_TIMEOUT_S
