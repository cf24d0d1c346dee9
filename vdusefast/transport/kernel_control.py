"""Calls on /dev/vduse/control and /dev/vduse/NAME: choose the protocol; create, open and destroy a device.

Source: Linux 7.3, include/uapi/linux/vduse.h and drivers/vdpa/vdpa_user/vduse_dev.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import time

from vdusefast.errors import DeviceBusyError, KernelSupportError
from vdusefast.host import containers, device_holders, sysfs
from vdusefast.transport import DeviceSpec, TransportError, uapi

DIRECTORY = "/dev/vduse"
CONTROL_NODE = f"{DIRECTORY}/control"
# The features of VDUSE itself that we use, if the kernel has them.
WANTED_FEATURES = 1 << uapi.VDUSE_F_QUEUE_READY | 1 << uapi.VDUSE_F_SUSPEND
LATEST_API_VERSION = uapi.VDUSE_API_VERSION_1

NODE_LOOK_S = 0.005  # between two checks for nodes that the kernel makes by itself
NODE_WAIT_S = 2.0  # for /dev/vduse/NAME, which devtmpfs makes at once
DESTROY_WAIT_S = 1.0  # for other processes' copies of the descriptor to be closed
LEFT_WAIT_S = 2.0  # for the workers of a server that was killed to end
REOPEN_WAIT_S = 10.0  # for the last processes of a server that has ended to do so

_U64 = struct.Struct("=Q")


def probe_control() -> tuple[int, int]:
    """Return (the newest API version, the mask of VDUSE features) that this kernel and we know. Makes nothing.

    Raises KernelSupportError, also for a lack of permission, DeviceBusyError.
    """
    fd = open_control()
    try:
        return negotiate(fd)
    finally:
        os.close(fd)


def open_control() -> int:
    """Return a descriptor of the control node. Raises KernelSupportError, DeviceBusyError."""
    try:
        return os.open(CONTROL_NODE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if sysfs.created("control"):
            raise KernelSupportError(
                f"no {CONTROL_NODE} here, though the kernel has it: start the container with "
                f"--volume={DIRECTORY}:{DIRECTORY}; see {containers.DOCUMENT}"
            ) from None
        raise KernelSupportError(
            f"no {CONTROL_NODE}: modprobe vduse (Linux 5.15 or later has it; `vdusefast check` says more)"
        ) from None
    except PermissionError as error:
        raise KernelSupportError(containers.refused_node_text(CONTROL_NODE, error)) from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DeviceBusyError(f"{CONTROL_NODE} is held by another program; try again when that has ended") from None
        raise KernelSupportError(f"{CONTROL_NODE} cannot be opened: {error.strerror}") from None


def negotiate(control: int) -> tuple[int, int]:
    """Choose the newest protocol that both sides know, and return (API version, VDUSE features).

    Raises KernelSupportError.
    """
    word = bytearray(_U64.size)
    try:
        fcntl.ioctl(control, uapi.VDUSE_GET_API_VERSION, word)
        api_version = min(_U64.unpack(word)[0], LATEST_API_VERSION)
        fcntl.ioctl(control, uapi.VDUSE_SET_API_VERSION, _U64.pack(api_version))
    except OSError as error:
        raise KernelSupportError(f"{CONTROL_NODE}: this kernel's VDUSE does not answer: {error.strerror}") from None
    try:
        fcntl.ioctl(control, uapi.VDUSE_GET_FEATURES, word)
        features = _U64.unpack(word)[0] & WANTED_FEATURES
        fcntl.ioctl(control, uapi.VDUSE_SET_FEATURES, _U64.pack(features))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTTY):
            raise KernelSupportError(f"{CONTROL_NODE}: VDUSE features: {error.strerror}") from None
        features = 0  # a kernel older than these calls
    return api_version, features


def create_device(control: int, spec: DeviceSpec, api_version: int) -> None:
    """Create a device under the protocol negotiated on `control`. Raises DeviceBusyError, TransportError."""
    groups = 1 if api_version >= uapi.VDUSE_API_VERSION_1 else 0
    described = uapi.DEV_CONFIG.pack(
        spec.name.encode(),
        0,
        spec.device_id,
        spec.offered_features,
        spec.queue_count,
        spec.vq_align_bytes,
        groups,
        groups,
        len(spec.config),
    )
    try:
        fcntl.ioctl(control, uapi.VDUSE_CREATE_DEV, bytearray(described + spec.config))
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise DeviceBusyError(
                f"device {spec.name}: the kernel has a VDUSE device of this name already, of another program or left "
                "by one that died; choose another name"
            ) from None
        raise TransportError(f"device {spec.name}: the kernel refuses to create it: {error.strerror}") from error


def open_device(name: str) -> int:
    """Return a descriptor of /dev/vduse/NAME. Raises OSError, TransportError."""
    path = f"{DIRECTORY}/{name}"
    deadline = time.monotonic() + NODE_WAIT_S
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"device {name}: no {path}; is {DIRECTORY} the machine's here? In a container: "
                    f"--volume={DIRECTORY}:{DIRECTORY}; see {containers.DOCUMENT}"
                ) from None
            time.sleep(NODE_LOOK_S)


def reopen_device(name: str) -> int:
    """Return a descriptor of /dev/vduse/NAME, whose server has ended: its last processes may have it for a moment yet.

    Raises DeviceBusyError, TransportError.
    """
    deadline = time.monotonic() + REOPEN_WAIT_S
    while True:
        try:
            return open_device(name)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise TransportError(
                    f"device {name}: cannot be adopted: /dev/vduse/{name}: {error.strerror}"
                ) from error
        if time.monotonic() > deadline:
            raise DeviceBusyError(
                f"device {name}: cannot be adopted: {_holder_text(name)}; try again when that has ended"
            )
        time.sleep(NODE_LOOK_S)


def _holder_text(name: str) -> str:
    """Return who holds the device, as its run directory does not name the holder."""
    path = f"{DIRECTORY}/{name}"
    return (
        f"{device_holders.text(path)} holds {path} open: a worker that waits in the kernel for its storage, or a "
        "server whose run directory is elsewhere, as in a container"
    )


def is_broken(fd: int) -> bool:
    """Return whether the device of `fd` (borrowed) is broken, so that nothing but its removal works."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLERR for _fd, events in poll.poll(0))


def is_left_broken(name: str) -> bool:
    """Return whether a device that nobody serves is broken; False also when that cannot be seen.

    It is opened for a moment, which changes nothing: a server that starts just then waits for that. The workers of a
    server that was killed may still have it for a moment, which is waited for.
    """
    until_s = time.monotonic() + LEFT_WAIT_S
    while True:
        try:
            fd = os.open(f"/dev/vduse/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError as error:  # it is not there, somebody has it, or we have no right to
            if error.errno != errno.EBUSY or time.monotonic() > until_s:
                return False
        time.sleep(NODE_LOOK_S)
    try:
        return is_broken(fd)
    finally:
        os.close(fd)


def destroy_device(name: str) -> None:
    """Destroy the device, waiting shortly for other processes' copies of its descriptor. Raises DeviceBusyError."""
    control = open_control()
    deadline = time.monotonic() + DESTROY_WAIT_S
    try:
        while True:
            try:
                fcntl.ioctl(control, uapi.VDUSE_DESTROY_DEV, name.encode().ljust(uapi.VDUSE_NAME_MAX_BYTES, b"\0"))
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise TransportError(f"device {name}: cannot be destroyed: {error.strerror}") from error
            if time.monotonic() > deadline:
                if sysfs.attached(name):
                    raise DeviceBusyError(
                        f"device {name}: cannot be destroyed: it is on the vDPA bus: vdpa dev del {name}"
                    )
                raise DeviceBusyError(
                    f"device {name}: cannot be destroyed: {_holder_text(name)}; when that has ended: "
                    f"vdusefast del {name} --force"
                )
            time.sleep(NODE_LOOK_S)
    finally:
        os.close(control)
