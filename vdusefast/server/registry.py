"""The devices of this machine, by their run directories: which exist, and which server has each."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from vdusefast.base.json_types import Json
from vdusefast.base.kinds import TransportKind
from vdusefast.errors import DeviceBusyError, DeviceNotFoundError, TimedOutError, VdusefastError
from vdusefast.host import run_dirs, sysfs
from vdusefast.server.rpc_client import HungUpError, NoServerError, RpcClient
from vdusefast.state import run_dir

LIST_TIMEOUT_S = 2.0  # for all devices together
NAMES_SHOWN_MAX = 8
NAME_MAX_BYTES = 255
# States beside those of a device that answers (api.DeviceState).
DEAD = "dead"  # its server has ended
BROKEN = "broken"  # the same, and the kernel has given the device up
SILENT = "silent"  # its server does not answer
EMBEDDED = "embedded"  # held by a program that takes no commands, or that is still starting
HIDDEN = "hidden"  # another user's


def base_directory() -> Path:
    """Return where run directories live. Raises VdusefastError where there is no place for them."""
    return run_dirs.required_base()


def find(name: str) -> Path:
    """Return the run directory of a device. Raises DeviceNotFoundError; VdusefastError when it is another user's."""
    own = run_dirs.base_directory()
    if _is_name(name):
        if own is not None and _is_directory(own / name):
            return own / name
        system = _system_base()
        if system is not None and _is_directory(system / name):
            raise VdusefastError(f"{name}: no permission for {system / name}; be root")
    names = run_dirs.device_names(own or base_directory())
    shown = ", ".join(names[:NAMES_SHOWN_MAX]) + (", ..." if len(names) > NAMES_SHOWN_MAX else "")
    raise DeviceNotFoundError(
        f"{name}: no such device; {f'served here: {shown}' if names else 'none is served here'}{_foreign_text(name)}"
    )


def _foreign_text(name: str) -> str:
    """Say what the kernel has of a name that has no run directory."""
    if not _is_name(name) or not sysfs.created(name):
        return ""
    if sysfs.attached(name):
        from vdusefast.state import claim

        return f"; the kernel has /dev/vduse/{name}, of whatever program: {claim.advice(name)}"
    return (
        f"; /dev/vduse/{name} is another program's, or was left by a worker that could not be killed: "
        f"vdusefast del {name} --force"
    )


def _is_name(name: str) -> bool:
    """Return whether `name` can be that of one file in a directory."""
    return name not in ("", ".", "..") and "/" not in name and len(os.fsencode(name)) <= NAME_MAX_BYTES


def _is_directory(path: Path) -> bool:
    """Return whether `path` is a directory. Raises VdusefastError when that is hidden from us."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except PermissionError:
        raise VdusefastError(
            f"{path.name}: no permission for {path.parent}; be root, or the user who added it"
        ) from None
    except OSError:  # it is not there
        return False


def _system_base() -> Path | None:
    """Return the machine's own place for run directories where it is not the one that we use, None where it is."""
    if os.environ.get("VDUSEFAST_RUN_DIR") or run_dirs.base_directory() == run_dirs.SYSTEM_BASE:
        return None
    return run_dirs.SYSTEM_BASE if run_dirs.SYSTEM_BASE.is_dir() else None


def connect(name: str) -> RpcClient:
    """Return a connection to the server of a device.

    Raises DeviceNotFoundError, DeviceBusyError when its holder takes no commands, VdusefastError when it has died.
    """
    path = find(name)
    try:
        return RpcClient(path)
    except NoServerError:
        if run_dirs.is_held(path):
            raise DeviceBusyError(embedded_text(path)) from None
        from vdusefast.state import orphans

        if orphans.is_left(path):
            raise VdusefastError(orphans.advice(name)) from None
        raise VdusefastError(f"{name}: its server has died; `vdusefast del {name}` cleans up") from None


def embedded_text(path: Path) -> str:
    """Return what is to be said of a device whose holder takes no commands."""
    pid = run_dirs.holder_pid(path)
    return (
        f"{path.name}: held by {f'pid {pid}' if pid else 'a process'}, which takes no commands: "
        "it is still starting, or a program of its own; try again, or end that process"
    )


def describe_all() -> list[Json]:
    """Return one object for each device, as its server's `info` has it; others have name, state and node at least.

    Devices of root's are among them for other users, too: HIDDEN, as all is that may not be asked. All servers are
    asked before the first answer is awaited, so that one that hangs costs the others nothing.
    """
    asked: list[tuple[Path, RpcClient | None, str]] = []
    found = []
    try:
        for base in _bases():
            asked += [_ask(base / name) for name in run_dirs.device_names(base)]
        until = time.monotonic() + LIST_TIMEOUT_S
        for path, client, state in asked:
            found.append(_collect(path, client, state, max(0.05, until - time.monotonic())))
    finally:
        for _path, client, _state in asked:
            if client is not None:
                client.close()
    return [each for each in found if each is not None]


def _bases() -> list[Path]:
    """Return all places of run directories that can be looked at. Raises VdusefastError when there is none."""
    own, system = run_dirs.base_directory(), _system_base()
    if own is None:
        return [system or base_directory()]
    return [own, system] if system is not None and os.access(system, os.R_OK) else [own]


def describe(name: str) -> Json:
    """Return the `info` of one device; name, state and node when its server has died. Raises as `connect` does."""
    path = find(name)
    try:
        with RpcClient(path) as client:
            info: Json = client.call("info")
            return info
    except NoServerError:
        return _without_server(path, EMBEDDED if run_dirs.is_held(path) else DEAD)
    except HungUpError:
        if not _lets_go(path):
            raise
        return _without_server(path, DEAD)


def _lets_go(path: Path) -> bool:
    """Return whether a run directory is held by nobody, now or soon.

    A server that was killed still takes connections for a moment, until the kernel has closed all that it had.
    """
    until_s = time.monotonic() + run_dirs.DYING_S
    while run_dirs.is_held(path):
        if time.monotonic() > until_s:
            return False
        time.sleep(run_dirs.DYING_PAUSE_S)
    return True


def remove_dead(path: Path) -> None:
    """Remove the run directory of a server that has died, and a kernel device that nothing is attached to.

    Raises DeviceBusyError when a process holds it, or when the kernel's device is still attached: detaching that
    without a server waits in the kernel for ever when requests are pending, and keeps every other vDPA device of
    the machine from being added or removed.
    """
    name = path.name
    directory = run_dir.RunDirectory(name, path.parent)
    try:
        # A device of another transport has nothing in the kernel: one of its name there is somebody else's.
        if directory.was_in_kernel:
            if sysfs.attached(name):
                from vdusefast.state import orphans

                raise DeviceBusyError(orphans.advice(name))
            remove_left(name)
    except BaseException:
        directory.release()
        raise
    directory.close()


def remove_left(name: str) -> bool:
    """Destroy a kernel device that has no run directory and no place on the bus. Returns whether there is such a one.

    Raises DeviceBusyError when a process holds it.
    """
    from vdusefast.state import orphans

    return _is_name(name) and orphans.destroy(name)


def _ask(path: Path) -> tuple[Path, RpcClient | None, str]:
    """Send `info` to a device's server; without one, return the state to show."""
    try:
        client = RpcClient(path)
    except NoServerError:
        return path, None, _state_by_lock(path, EMBEDDED)
    except TimedOutError:
        return path, None, SILENT
    except VdusefastError:
        return path, None, HIDDEN
    try:
        client.send("info")
    except TimedOutError:
        client.close()
        return path, None, SILENT
    return path, client, ""


def _state_by_lock(path: Path, held: str) -> str:
    """Return the state of a device whose server has not answered: `held` while a process holds its directory."""
    try:
        return held if run_dirs.is_held(path) else DEAD
    except VdusefastError:
        return HIDDEN


def _collect(path: Path, client: RpcClient | None, state: str, timeout_s: float) -> Json | None:
    """Return what a device's server answers, None when the device has gone meanwhile."""
    if client is not None:
        try:
            info: Json = client.receive(timeout_s)
        except TimedOutError:
            state = SILENT
        except VdusefastError:
            if not path.exists():
                return None
            state = _state_by_lock(path, SILENT)  # its answer was an error, or none
        else:
            return info
    return _without_server(path, state) if path.exists() else None


def _without_server(path: Path, state: str) -> Json:
    advice = ""
    if state == DEAD:
        from vdusefast.state import orphans

        if orphans.is_left(path):
            state, advice = BROKEN if orphans.is_broken(path.name) else DEAD, orphans.advice(path.name)
        else:
            advice = f"{path.name}: its server has ended: vdusefast del {path.name} cleans up"
    return {
        "name": path.name,
        "state": state,
        "node": "" if run_dirs.holder_transport(path) == TransportKind.LOOPBACK else sysfs.node(path.name),
        "pid": run_dirs.holder_pid(path) if state in (EMBEDDED, SILENT) else 0,
        "run_dir": os.fspath(path),
        "advice": advice,
    }
