"""Orphaned devices of a made-up kernel, and what stands in for servers, systemd and the start of a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vdusefast import errors
from vdusefast.base.start_mode import StartMode
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.host import node_users, sysfs, vdpa
from vdusefast.server import launch
from vdusefast.server.rpc import Method, NoParams, RpcServer
from vdusefast.server.systemd import manager as service_manager
from vdusefast.state import saved_state
from vdusefast.state.run_dir import RunDirectory
from vdusefast.transport import kernel_control
from vdusefast.transport.loopback import LoopbackTransport

BASE = Path(os.environ["VDUSEFAST_RUN_DIR"])
CONFIG = resolve_cpus(make_config(name="vd0", uri="null:8M", transport="kernel"))
SERVICE = {"systemd": True, "unit": "vdusefast@vd0.service"}


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


def fake_machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """Have the kernel be a made-up one, until the test ends."""
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
def orphaned_directory(*, transport: str = "kernel", state: bool = True, config: Config = CONFIG) -> Iterator[Path]:
    """Have a run directory of an orphan, and remove the rest of it at the end."""
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


class Started:
    """In place of launch.start: keeps what it was asked for, and starts no process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Config, StartMode]] = []
        self.then: Any = lambda: None
        monkeypatch.setattr(launch, "start", self._start)

    def _start(self, config: Config, *, mode: StartMode = StartMode.ADD) -> dict[str, Any]:
        self.asked.append((config, mode))
        self.then()
        return {"name": "vd0", "node": "/dev/vdx", "pid": 5, "transport": "kernel"}


class FakeServer:
    """A server of vd0 that answers as told, and ends when its device is deleted."""

    def __init__(self, machine: FakeMachine, **info: Any) -> None:
        self._machine = machine
        self.called: list[tuple[str, Any]] = []
        self.is_unused = False  # as the command says that has looked
        self.refusal: errors.VdusefastError | None = None
        self.directory = RunDirectory("vd0", BASE, "kernel")
        self.info = {"name": "vd0", "state": "running", "pid": 7, "transport": "kernel", "systemd": False, **info}
        from vdusefast.server.served_device import DeleteParams

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


class FakeManager:
    """In place of service_manager: keeps what it was asked for, and asks no systemd."""

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
