"""Operations on a whole device: recover, restart, remove, with or without a server.

The commands call these functions, and so do the shutdown unit and the benchmarks.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from vdusefast.base.kinds import TransportKind
from vdusefast.base.start_mode import StartMode
from vdusefast.base.time_limits import STOP_TIMEOUT_S, TAKEN_BACK_TIMEOUT_S, client_s, start_s, stop_s, take_over_s
from vdusefast.errors import DeviceBusyError, DeviceNotFoundError, TimedOutError, VdusefastError
from vdusefast.host import node_users, processes, run_dirs
from vdusefast.host.containers import pid_text
from vdusefast.server import launch, registry
from vdusefast.server.hand_over import serving_pid
from vdusefast.server.launch import InterruptedStartError
from vdusefast.server.rpc_client import NoServerError, RpcClient
from vdusefast.server.systemd import manager as service_manager
from vdusefast.state import claim, orphans, saved_state

if TYPE_CHECKING:
    from vdusefast.base.json_types import Json

REBUILD_TIMEOUT_S = 30.0
TAKEN_BACK_LOOK_S = 0.1
END_TIMEOUT_S = 10.0
END_LOOK_S = 0.02


def recover(name: str, *, other_store: bool = False) -> Json:
    """Adopt an orphaned device, recreate a broken one, or flush a store again that has lost data.

    other_store: also if the store of this name is another one than before. Returns the device's info. Raises
    VdusefastError.
    """
    path = registry.find(name)
    try:
        client = RpcClient(path)
    except NoServerError:
        return recover_dead(path, other_store=other_store, forgive=True)
    with client:
        return client.call("forgive") if client.call("info").get("store_failure") else _rebuild_served(client, path)


def restart(name: str, *, other_store: bool = False, unseen: bool = False) -> Json:
    """Replace the server of a device, and return the device's info. Raises VdusefastError; the old server serves then.

    unseen: do not open the store first.
    """
    path = registry.find(name)
    try:
        with RpcClient(path) as client:
            info = client.call("info")
    except NoServerError:
        return recover_dead(path, other_store=other_store)
    refuse_restart(info)
    with accepting(path, other_store):
        return (_restart_service if info.get("systemd") else _replace_server)(path, info, unseen)


def delete(name: str, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S, claimed: bool = False) -> None:
    """Remove a device, unless it is in use. Raises VdusefastError.

    force: also one in use; requests that are pending fail. timeout_s: for these. claimed: with `force`, also a device
    of the kernel whose run directory is lost.
    """
    try:
        path = registry.find(name)
    except DeviceNotFoundError:
        if claimed and orphans.is_attached(name):
            _delete_claimed(name, timeout_s)
        elif not force or not registry.remove_left(name):
            raise
        return
    try:
        client = RpcClient(path)
    except NoServerError:
        if run_dirs.is_held(path):
            raise DeviceBusyError(registry.embedded_text(path)) from None
        if claimed and orphans.is_lost(path):
            _delete_claimed(name, timeout_s)
        else:
            _delete_dead(path, force, timeout_s)
        return
    with client:
        delete_served(client, path, force, timeout_s)


def refuse_restart(info: Json) -> None:
    """Raise VdusefastError for a device that no other server can take over."""
    name = info["name"]
    if info["transport"] != TransportKind.KERNEL:
        raise VdusefastError(f"{name}: cannot be restarted: a {info['transport']} device ends with its server")
    if info["state"] == "broken":
        raise DeviceBusyError(f"{name}: is broken, which a restart does not mend: vdusefast recover {name}")


def _replace_server(path: Path, _info: Json, unseen: bool) -> Json:
    """Have a new process in the background take a device over. Returns the device's info."""
    try:
        return _serve(path, StartMode.TAKE_OVER_UNSEEN if unseen else StartMode.TAKE_OVER)
    except InterruptedStartError:
        raise
    except VdusefastError as error:
        raise type(error)(f"{error}; {who_serves(path)}") from None


def _restart_service(path: Path, info: Json, unseen: bool) -> Json:
    """Have systemd reload the service of a device, which replaces its server, and return the device's info.

    A unit without ExecReload is restarted, once it is proved that a new server can serve the device.
    """
    from vdusefast.api import Device  # with all that serves a device, which few commands need

    unit = _unit(info)
    config = orphans.load_state(path).config
    limit_s = client_s(take_over_s(config.device.attach_timeout_s))
    if not unseen and service_manager.can_reload(unit):
        service_manager.reload(unit, limit_s)
    else:
        Device(config, run_dir=path.parent).prove(look=not unseen)
        service_manager.restart(unit, limit_s)
    return registry.describe(path.name)


def _unit(info: Json) -> str:
    """Return the service that runs a server. Raises DeviceBusyError."""
    if unit := info.get("unit"):
        return str(unit)
    raise DeviceBusyError(
        f"{info['name']}: its server (pid {info['pid']}) is run by a service manager: have that one restart it"
    )


def who_serves(path: Path) -> str:
    """Say who serves a device after a restart that has failed; the old server needs a moment to take it back."""
    deadline = time.monotonic() + TAKEN_BACK_TIMEOUT_S
    while (pid := serving_pid(path)) is None and time.monotonic() < deadline:
        time.sleep(TAKEN_BACK_LOOK_S)
    if pid is not None:
        return f"{pid_text(pid)} serves it"
    return f"nobody serves it now, and its requests wait: vdusefast recover {path.name}; see {path / 'log'}"


def accepting(path: Path, other_store: bool) -> AbstractContextManager[None]:
    """Return a context in which an orphaned device may be adopted with another store, if `other_store`."""
    return saved_state.any_store(path / "state") if other_store else nullcontext()


def recover_dead(path: Path, *, other_store: bool = False, forgive: bool = False) -> Json:
    """Serve an orphaned device in the background, and return its info.

    other_store: also when its store is another one than before. forgive: flush its store again although it has lost
    data. Raises DeviceNotFoundError when the kernel has none, DeviceBusyError when a process holds it, VdusefastError.
    """
    if run_dirs.is_held(path):
        raise DeviceBusyError(registry.embedded_text(path))
    if not orphans.is_left(path):
        raise DeviceNotFoundError(
            f"{path.name}: its server has ended and left nothing to adopt: vdusefast del {path.name}, then add it"
        )
    with accepting(path, other_store):
        return _serve(path, StartMode.RECOVER if forgive else StartMode.ADD)


def _serve(path: Path, mode: StartMode) -> Json:
    """Serve a device by the configuration that it was served by, in the background, and return its info."""
    config = orphans.load_state(path).config
    return launch.start(config, mode=mode)


def _rebuild_served(client: RpcClient, path: Path) -> Json:
    """Recreate a broken device whose server still runs. Raises DeviceBusyError for one that is well or in use."""
    info = client.call("info")
    if info["state"] != "broken":
        raise DeviceBusyError(
            f"{path.name}: is being served by pid {info['pid']} (state {info['state']}): there is nothing to recover"
        )
    orphans.refuse_users(path.name)
    config = orphans.load_state(path).config  # which goes with the device
    if info.get("systemd"):
        service_manager.restart(_unit(info), client_s(REBUILD_TIMEOUT_S + start_s(config.device.attach_timeout_s)))
        return registry.describe(path.name)
    delete_served(client, path, False, REBUILD_TIMEOUT_S)
    return launch.start(config)


def _delete_dead(path: Path, force: bool, timeout_s: float) -> None:
    """Remove an orphaned device. If a driver has it, a server serves it once more for that.

    Otherwise the kernel would wait for its pending requests, and no other vDPA device of the machine could be added or
    removed meanwhile. A broken device needs no server: the kernel waits for no answers then.
    """
    if orphans.is_left(path) and orphans.is_attached(path.name):
        if not orphans.is_broken(path.name):
            _serve(path, StartMode.FAIL if force else StartMode.ADD)
            try:
                with RpcClient(path) as client:
                    delete_served(client, path, force, timeout_s)
            except DeviceBusyError as error:
                raise DeviceBusyError(f"{error} (it is served again)") from None
            return
        orphans.remove_broken(path)
    registry.remove_dead(path)


def _delete_claimed(name: str, timeout_s: float) -> None:
    """Remove a device of the kernel whose run directory is lost: serve it with errors, then delete it."""
    launch.start(claim.removal_config(name), mode=StartMode.CLAIM_FAIL)
    path = registry.base_directory() / name
    with RpcClient(path) as client:
        delete_served(client, path, True, timeout_s)


def delete_served(client: RpcClient, path: Path, force: bool, timeout_s: float) -> None:
    """Have the server remove its device, and wait until all of it is gone. Raises VdusefastError."""
    in_kernel = run_dirs.was_in_kernel(path)
    pid = client.server_pid
    pid_fd = _open_process(pid)
    try:
        params: dict[str, object] = {"force": force, "timeout_s": timeout_s}
        if not force and _look_for_server(client, path.name):
            params["is_unused"] = True
        client.call("delete", params, client_s(stop_s(timeout_s)))
        if not (_ends(pid_fd) if pid > 0 else _lets_go(path)):
            who = pid_text(pid)
            raise TimedOutError(f"{path.name}: removed, but its server ({who}) does not end; see {path / 'log'}")
    finally:
        if pid_fd >= 0:
            os.close(pid_fd)
    _check_gone(path, in_kernel and orphans.in_kernel(path.name))


def _look_for_server(client: RpcClient, name: str) -> bool:
    """Look for users in place of a server whose PID namespace hides the machine's processes. Returns whether we did.

    Raises DeviceBusyError when there are some.
    """
    if processes.is_in_first_namespace(client.server_pid) or not processes.sees_all():
        return False
    node = str(client.call("info").get("node") or "")
    users = node_users.find_users(node)
    if users:
        raise DeviceBusyError(node_users.refusal(name, node, users))
    return bool(node)


def _open_process(pid: int) -> int:
    """Return a descriptor that is readable once a process has ended, -1 where there is none to be had.

    It has ended already, which the next call will tell, or runs in a PID namespace that we do not see.
    """
    if pid <= 0:
        return -1
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _ends(pid_fd: int) -> bool:
    return pid_fd < 0 or bool(select.select([pid_fd], [], [], END_TIMEOUT_S)[0])


def _lets_go(path: Path) -> bool:
    """Return whether a server that we cannot see releases its run directory, which it does last."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while path.is_dir() and run_dirs.is_held(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(END_LOOK_S)
    return True


def _check_gone(path: Path, kernel_device_left: bool) -> None:
    if kernel_device_left:
        raise VdusefastError(
            f"{path.name}: its server has ended, but the kernel still has /dev/vduse/{path.name}; try "
            f"vdusefast del {path.name} --force in a while"
        )
    if path.is_dir() and not run_dirs.is_held(path):  # else somebody has added a device of that name meanwhile
        raise VdusefastError(f"{path.name}: its server has ended, but {path} is still there; remove it")
