"""Orphaned kernel devices, whose server has ended: find one, say how to adopt it, and remove a broken one.

When a server is killed, or hands its device over, the device stays in the kernel, where requests wait for the next
server. The state for that server is in the run directory. Nothing here serves: a device with pending requests is not
touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vdusefast.errors import DeviceBusyError, DeviceNotFoundError
from vdusefast.host import node_users, run_dirs, sysfs
from vdusefast.state import run_dir, saved_state
from vdusefast.state.saved_state import SavedState
from vdusefast.transport import TransportError, kernel_control

if TYPE_CHECKING:
    from vdusefast.base.start_mode import StartMode
    from vdusefast.config import Config


def in_kernel(name: str) -> bool:
    """Return whether the kernel has a VDUSE device of that name, or a device on the vDPA bus."""
    return sysfs.created(name) or sysfs.attached(name)


def is_left(path: Path) -> bool:
    """Return whether the kernel has the device of the run directory at `path`, and nobody serves it.

    Raises VdusefastError when its lock cannot be opened.
    """
    return run_dirs.was_in_kernel(path) and in_kernel(path.name) and not run_dirs.is_held(path)


def is_lost(path: Path) -> bool:
    """Return whether the kernel has a device of the run directory's name in use that has no saved state."""
    return sysfs.attached(path.name) and not (path / "state").exists()


def is_broken(name: str) -> bool:
    """Return whether a device that nobody serves is broken."""
    return sysfs.created(name) and kernel_control.is_left_broken(name)


def is_attached(name: str) -> bool:
    """Return whether the vDPA bus has a device of that name."""
    return sysfs.attached(name)


def choose(directory: run_dir.RunDirectory, config: Config, transport: str, mode: StartMode) -> SavedState | None:
    """Return the state of the device to adopt, None when a new one is to be created.

    directory: locked by us, with the files of its last holder. transport: the configured kind. mode: not one that
    claims. A kernel device that nothing uses and that cannot be adopted is destroyed. Raises DeviceNotFoundError,
    ConfigError if the orphan is another device, DeviceBusyError if it cannot or must not be adopted, VdusefastError,
    OSError.
    """
    name = directory.path.name
    was_kernel = directory.was_in_kernel and in_kernel(name)
    is_orphan = was_kernel and (directory.state_path.exists() or sysfs.attached(name))
    if mode.must_adopt or (mode.may_adopt and is_orphan):
        state = saved_state.load(directory.state_path)
        if state is not None:
            saved_state.check_config(state, config, transport)
            return state
        if not was_kernel:
            raise DeviceNotFoundError(f"{name}: there is nothing to adopt: no server has left a device")
        if sysfs.attached(name):
            raise DeviceBusyError(lost_text(name))
    elif was_kernel and sysfs.attached(name):
        raise DeviceBusyError(advice(name))
    if was_kernel:
        destroy(name)
    directory.state_path.unlink(missing_ok=True)  # the state of a device that is gone
    return None


def load_state(path: Path) -> SavedState:
    """Return the state that the last server of the run directory at `path` has saved. Raises VdusefastError."""
    state = saved_state.load(path / "state")
    if state is None:
        raise DeviceBusyError(lost_text(path.name) if sysfs.attached(path.name) else advice(path.name))
    return state


def advice(name: str) -> str:
    """Return the advice for an orphaned device."""
    if not sysfs.attached(name):
        return f"{name}: its server has ended and left /dev/vduse/{name}, which nothing uses: vdusefast del {name}"
    node = sysfs.node(name)
    waits = f"{name}: its server has ended, and the kernel still has the device{f' as {node}' if node else ''}"
    if is_broken(name):
        return (
            f"{waits}, which is broken: a message was not answered within its msg_timeout: "
            f"vdusefast recover {name} recreates it once nobody uses it"
        )
    return f"{waits}, where requests wait: vdusefast recover {name} adopts it, vdusefast del {name} removes it"


def lost_text(name: str) -> str:
    """Return why a device without a saved state cannot be adopted, and the remedy."""
    from vdusefast.state import claim

    node = sysfs.node(name)
    return (
        f"{name}: the kernel has the device{f' as {node}' if node else ''}, but the state that its last server saved "
        f"is missing; {claim.advice(name)}"
    )


def destroy(name: str) -> bool:
    """Destroy a kernel device that is not on the bus. Returns whether there was one.

    Raises DeviceBusyError when a process holds it.
    """
    if not sysfs.created(name) or sysfs.attached(name):
        return False
    kernel_control.destroy_device(name)
    return True


def refuse_users(name: str) -> None:
    """Raise DeviceBusyError while the node of a broken device is in use, or has pending requests.

    Such requests never end, and detaching the device from its driver would wait for them in the kernel for ever.
    """
    node = sysfs.node(name)
    waiting = node_users.pending_requests(node)
    if waiting:  # checked first, because opening such a node may hang as well
        raise DeviceBusyError(
            f"{name}: it is broken, and {waiting} of {node}'s requests wait in it and cannot be ended: to remove it "
            "would hang in the kernel, and every vDPA command of this machine after it. Reboot (`sync` hangs, too)"
        )
    users = node_users.find_users(node)
    if users:
        raise DeviceBusyError(
            f"{name}: it is broken and cannot be recreated while {node} is in use: {node_users.describe(users)}; "
            f"end that, then: vdusefast recover {name}"
        )


def remove_broken(path: Path) -> None:
    """Remove a broken device that nobody serves from the kernel; its run directory stays.

    Its messages fail at once, so nobody has to answer them while it is detached from its driver. Raises
    DeviceBusyError when somebody uses it or serves it, VdusefastError.
    """
    name = path.name
    from vdusefast.host import vdpa

    directory = run_dir.RunDirectory(name, path.parent)
    try:
        refuse_users(name)
        sysfs.unbind(name)
        if sysfs.attached(name):
            vdpa.device_delete(name)
        destroy(name)
    except OSError as error:
        raise TransportError(f"device {name}: cannot be detached: {error.strerror}") from error
    finally:
        directory.release()
