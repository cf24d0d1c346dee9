"""The differences of a container: a /dev of its own, process numbers that mean nothing elsewhere, and lesser rights.

Nothing here changes anything. docs/containers.md explains how to run a server in a container.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

PROC = Path("/proc")
ALL_USERS = ["0", "0", "4294967295"]  # uid_map of the initial user namespace
DOCUMENT = "docs/containers.md"


def pid_namespace() -> int:
    """Return the number of this process's PID namespace, 0 where that cannot be seen."""
    try:
        return (PROC / "self/ns/pid").stat().st_ino
    except OSError:
        return 0


def pid_text(pid: int) -> str:
    """Return how a process is named in messages. pid: 0 is one that has no number in this PID namespace."""
    return f"pid {pid}" if pid > 0 else "a process in another PID namespace, such as a container's"


def is_initial_user_namespace() -> bool:
    """Return whether root here is root of the machine; True where that cannot be seen."""
    try:
        return (PROC / "self/uid_map").read_text().split() == ALL_USERS
    except OSError:
        return True


def has_own_dev(directory: Path = Path("/dev")) -> bool:
    """Return whether the kernel makes no nodes in /dev, because what is mounted there is not the machine's devtmpfs."""
    kind = ""
    try:
        lines = (PROC / "self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) > 4 and fields[4] == str(directory) and after:
            kind = after.split()[0]  # the last one is on top
    return kind != "devtmpfs"


def is_same_node(path: str, number: str) -> bool:
    """Return whether `path` is a device node of that number, such as "254:16"."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    kind = stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)
    return kind and number == f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def missing_node_text(name: str, node: str, number: str) -> str:
    """Return how to reach a device whose node is not in this /dev."""
    kind = "c" if "vhost-vdpa" in node else "b"
    major, _, minor = number.partition(":")
    return (
        f"{name}: this /dev is not the machine's and has no node of the device, which is {node} ({number}) on the "
        f"host: give it to containers by --device={node}; here, where the device cgroup allows it: "
        f"mknod {node} {kind} {major} {minor}"
    )


def refused_node_text(path: str, error: OSError) -> str:
    """Return why root cannot open a node of VDUSE: in a container, not only its mode can forbid it."""
    if error.errno == errno.EPERM:
        try:
            rule = f"c {os.major(os.stat(path).st_rdev)}:* rw"
        except OSError:
            rule = "c MAJOR:* rw"
        option = f"--device-cgroup-rule='{rule}'"
        return f"no permission for {path}: the device cgroup forbids it: start the container with {option}"
    if error.errno == errno.EACCES and not is_initial_user_namespace():
        return f"no permission for {path}: root of this user namespace is not root of the machine: run it without one"
    if error.errno == errno.EACCES and os.geteuid() == 0:
        return f"no permission for {path}: is it on a mount with nodev? In a container: --volume=/dev/vduse:/dev/vduse"
    return f"no permission for {path}: be root, or change its owner by a udev rule"
