"""Attach VDUSE devices to the kernel's vDPA bus, and detach them: the generic netlink family `vdpa`.

Both calls return after the bus driver has probed or released the device. Another thread must answer its control
messages meanwhile. Needs CAP_NET_ADMIN.

Source: Linux 7.3, include/uapi/linux/vdpa.h.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess

from vdusefast.errors import KernelSupportError
from vdusefast.host import netlink, sysfs

MGMTDEV_NAME = "vduse"

_CMD_DEV_NEW = 3
_CMD_DEV_DEL = 4
_ATTR_MGMTDEV_DEV_NAME = 2
_ATTR_DEV_NAME = 4
# Errors that mean that netlink cannot be used here, rather than that it refuses a command.
_NO_NETLINK = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EPERM, errno.EACCES)


def device_new(name: str) -> None:
    """Attach the VDUSE device `name` to the bus. Blocks until a driver has probed it, if there is one.

    Raises OSError with the kernel's words (EPERM, EINVAL: no such device or a queue is not set up, EEXIST, ...),
    KernelSupportError when the kernel has no vDPA.
    """
    arguments = ["add", "name", name, "mgmtdev", MGMTDEV_NAME]
    _run(
        _CMD_DEV_NEW, netlink.text(_ATTR_DEV_NAME, name) + netlink.text(_ATTR_MGMTDEV_DEV_NAME, MGMTDEV_NAME), arguments
    )


def device_delete(name: str) -> None:
    """Detach the device `name` from the bus. Blocks until its driver has released it.

    Raises OSError (ENODEV: it is not attached), KernelSupportError.
    """
    _run(_CMD_DEV_DEL, netlink.text(_ATTR_DEV_NAME, name), ["del", name])


def family_id() -> int:
    """Return the number of the netlink family `vdpa`.

    Raises KernelSupportError when there is none, OSError when netlink is not allowed.
    """
    with netlink.open_socket() as sock:
        return _family_id(sock)


def _run(command: int, attributes: bytes, arguments: list[str]) -> None:
    """Send a command; `arguments` are the same command for iproute2's `vdpa`."""
    try:
        sock = netlink.open_socket()
    except OSError as error:
        tool = shutil.which("vdpa", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if error.errno not in _NO_NETLINK or tool is None:
            raise
        _run_tool([tool, "dev", *arguments])
        return
    with sock:
        netlink.ask(sock, _family_id(sock), command, attributes)


def _run_tool(command: list[str]) -> None:
    """Run iproute2's `vdpa`, for a sandbox that allows netlink to it but not to this process."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise OSError(errno.EIO, f"{' '.join(command)}: {'; '.join(lines)}")


def _family_id(sock: socket.socket) -> int:
    try:
        return netlink.family_id(sock, "vdpa")
    except FileNotFoundError:
        if sysfs.bus_loaded():
            raise KernelSupportError(
                "the vDPA bus takes commands in the machine's own network namespace only: run it there (podman run "
                "--network=host; Kubernetes: hostNetwork: true)"
            ) from None
        raise KernelSupportError("the kernel has no vDPA bus: modprobe vduse") from None
