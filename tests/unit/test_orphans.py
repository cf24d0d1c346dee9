"""Orphaned devices: what is found of them, what a server adopts, and how a broken one is removed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from orphan_rig import BASE, CONFIG, FakeMachine, fake_machine, orphaned_directory

from vdusefast import errors
from vdusefast.api import Device
from vdusefast.base.start_mode import StartMode
from vdusefast.cli import app as cli
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.host import node_users, vdpa
from vdusefast.state import orphans
from vdusefast.state.run_dir import RunDirectory

pytestmark = pytest.mark.usefixtures("sees_all_processes")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return fake_machine(monkeypatch)


@pytest.fixture
def orphan_path(machine: FakeMachine) -> Iterator[Path]:
    with orphaned_directory() as path:
        yield path


def choose(mode: StartMode, config: Config = CONFIG, kind: str = "kernel") -> Any:
    """Ask `orphans.choose` as a server does."""
    directory = RunDirectory("vd0", BASE)
    try:
        return orphans.choose(directory, config, kind, mode)
    finally:
        directory.release()


# -- what a server does with an orphan


@pytest.mark.parametrize("mode", [StartMode.ADD, StartMode.ADOPT])
def test_orphan_is_adopted(orphan_path: Path, machine: FakeMachine, mode: StartMode) -> None:
    for _ in range(2):  # also when it was not on the bus yet
        assert choose(mode).config == CONFIG
        machine.attached.clear()
    assert machine.done == []


def test_another_device_is_refused_and_nothing_is_touched(orphan_path: Path, machine: FakeMachine) -> None:
    before = (orphan_path / "state").read_bytes()
    other = resolve_cpus(make_config(name="vd0", uri="null:8M", transport="kernel", queues=2))
    with pytest.raises(errors.ConfigError, match=r"device\.queues"):
        choose(StartMode.ADD, other)
    with pytest.raises(errors.ConfigError, match=r"device\.transport"):
        choose(StartMode.ADD, kind="loopback")
    assert (orphan_path / "state").read_bytes() == before
    assert machine.done == []


def test_orphan_that_is_not_to_be_adopted_is_not_lost(orphan_path: Path, machine: FakeMachine) -> None:
    with pytest.raises(errors.DeviceBusyError, match="vdusefast recover vd0 adopts it"):
        choose(StartMode.NEW)
    machine.attached.clear()  # then nobody can have used it
    assert choose(StartMode.NEW) is None
    assert machine.done == ["destroy vd0"]
    assert not (orphan_path / "state").exists()


def test_device_whose_server_died_before_it_wrote_anything_is_created_again(machine: FakeMachine) -> None:
    machine.attached.clear()
    with orphaned_directory(state=False):
        assert choose(StartMode.ADD) is None
    assert machine.done == ["destroy vd0"]


@pytest.mark.parametrize("mode", [StartMode.ADD, StartMode.ADOPT])
def test_orphan_without_a_saved_state_is_not_adopted(machine: FakeMachine, mode: StartMode) -> None:
    with orphaned_directory(state=False):
        with pytest.raises(errors.DeviceBusyError, match=r"is missing; .*vdusefast add CONFIG --claim"):
            choose(mode)
        with pytest.raises(errors.DeviceBusyError, match="vdusefast add CONFIG --claim"):
            orphans.load_state(BASE / "vd0")
    assert machine.done == []


@pytest.mark.parametrize(("transport", "created"), [("loopback", True), ("kernel", False)])
def test_name_whose_device_is_gone_or_of_another_transport_is_free(
    machine: FakeMachine, transport: str, created: bool
) -> None:
    if not created:
        machine.created.clear()
        machine.attached.clear()
    with orphaned_directory(transport=transport):
        assert choose(StartMode.ADD) is None
        with pytest.raises(errors.DeviceNotFoundError, match="nothing to adopt"):
            choose(StartMode.ADOPT)
    assert machine.done == []


def test_new_name_has_nothing_to_adopt(machine: FakeMachine) -> None:
    machine.created.clear()
    machine.attached.clear()
    device = Device(CONFIG)
    with pytest.raises(errors.DeviceNotFoundError, match="nothing to adopt"):
        device.start(mode=StartMode.ADOPT)
    assert not (BASE / "vd0").exists()


# -- broken ones


def test_broken_device_that_nobody_uses_is_removed(orphan_path: Path, machine: FakeMachine) -> None:
    orphans.remove_broken(orphan_path)
    assert machine.done == ["unbind vd0", "delete vd0", "destroy vd0"]
    assert (orphan_path / "state").exists()


def test_broken_device_in_use_is_not_removed(orphan_path: Path, machine: FakeMachine) -> None:
    machine.users = ["mounted on /mnt"]
    with pytest.raises(errors.DeviceBusyError, match=r"in use: mounted on /mnt; end that, then: vdusefast recover vd0"):
        orphans.remove_broken(orphan_path)
    machine.pending = 3
    with pytest.raises(errors.DeviceBusyError, match=r"3 of /dev/vdx's requests wait in it.*Reboot"):
        orphans.remove_broken(orphan_path)
    held = RunDirectory("vd0", BASE)
    with pytest.raises(errors.DeviceBusyError, match="is being served already"):
        orphans.remove_broken(orphan_path)
    held.release()
    assert machine.done == []


def test_broken_device_that_the_kernel_keeps_is_an_error(
    orphan_path: Path, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_name: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(vdpa, "device_delete", refuse)
    with pytest.raises(errors.VdusefastError, match="device vd0: cannot be detached: Input/output error"):
        orphans.remove_broken(orphan_path)


def test_pending_requests_are_those_of_the_block_device(tmp_path: Path) -> None:
    (tmp_path / "sys/block/vdx").mkdir(parents=True)
    (tmp_path / "sys/block/vdx/inflight").write_text("       2        5\n")
    assert node_users.pending_requests("/dev/vdx", tmp_path) == 7
    for node in ("/dev/vhost-vdpa-0", ""):
        assert node_users.pending_requests(node, tmp_path) == 0


# -- what is shown


def test_dead_and_broken_are_shown_with_what_to_do(
    orphan_path: Path, machine: FakeMachine, capsys: pytest.CaptureFixture[str]
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
