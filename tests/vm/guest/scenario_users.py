"""The users of a device, as the kernel knows them and not by names, seen from its own and other namespaces."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path

import guest
from checks import check
from guest import MIB

POINT = guest.WORK / "point"
IN_PID_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000


@contextlib.contextmanager
def started(*words: object) -> Iterator[int]:
    """Run a command that says one line when it is ready, until its standard input ends. Yields its pid."""
    with subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process.pid
        finally:
            process.stdin.close()
            process.wait(30)


@contextlib.contextmanager
def loop_device(path: str | Path) -> Iterator[str]:
    """Attach a loop device to a file or node."""
    guest.sh("modprobe", "loop")
    node = guest.sh("losetup", "--find", "--show", path).strip()
    try:
        yield node
    finally:
        guest.sh("losetup", "--detach", node)


def refused(says: str) -> str:
    return guest.refused("del", "vd0", status=4, says=says)


@check(limit_s=90)
def loop_device_over_a_bind_mount() -> str:
    """As kubelet holds a raw block volume: its backing file is nothing below /dev."""
    volume = guest.WORK / "kubelet/plugins/volumeDevices/pod"
    volume.parent.mkdir(parents=True)
    volume.touch()
    with guest.device("vd0", "memory:16M") as node:
        guest.sh("mount", "--bind", node, volume)
        with loop_device(volume) as loop:
            line = refused(rf"{node} is in use: used by {loop.removeprefix('/dev/')};")
            assert len(Path(loop).read_bytes()) == 16 * MIB
        guest.sh("umount", volume)
    return line


@check(limit_s=90)
def swap_and_device_mapper() -> list[str]:
    """Swap on a node of another name, and a mapping over the disk."""
    other = guest.WORK / "of another name"
    lines = []
    with guest.device("vd0", "memory:16M") as node:
        os.mknod(other, os.stat(node).st_mode, os.stat(node).st_rdev)
        guest.sh("mkswap", node)
        guest.sh("swapon", other)
        try:
            lines.append(refused(f"in use: swap on {other}"))
        finally:
            guest.sh("swapoff", other)
        guest.sh("modprobe", "dm_mod")
        guest.sh("dmsetup", "create", "--noudevsync", "upper", text_in=f"0 16384 linear {node} 0\n")
        try:
            lines.append(refused(r"in use: used by dm-\d+ \(upper\)"))
        finally:
            guest.sh("dmsetup", "remove", "--noudevsync", "upper")
    return lines


@check(limit_s=120)
def mount_and_process_in_other_namespaces() -> list[str]:
    """Seen from the machine's own namespaces."""
    POINT.mkdir(exist_ok=True)
    lines = []
    guest.sh("modprobe", "ext4")
    with guest.device("vd0", "memory:16M") as node:
        guest.sh("mkfs.ext4", "-q", node)
        script = f"mount {node} {POINT} && echo ready && cat"
        with started("unshare", "--mount", "--propagation", "private", "sh", "-c", script) as pid:
            lines.append(refused(rf"mounted on {POINT} in the mount namespace of pid {pid} "))
        with started(*IN_PID_NAMESPACE, "sh", "-c", f"exec 5<{node} && echo ready && cat"):
            lines.append(refused(r"in use: open by pid \d+ \("))
    return lines


@check(limit_s=150)
def command_in_a_pid_namespace() -> str:
    """The server sees who uses the device; the command in another PID namespace only waits for it."""
    node = guest.fork_server("vd0", "memory:16M")
    with open(node, "rb"):
        line = guest.refused("del", "vd0", status=4, says=rf"pid {os.getpid()}\b", under=IN_PID_NAMESPACE)
    guest.sh(*IN_PID_NAMESPACE, *guest.vdusefast_words("del", "vd0"), timeout_s=guest.COMMAND_S)
    assert not guest.node_of("vd0")
    return line


def serve_in_a_pid_namespace(report_fd: int) -> None:
    """Be the first process of new namespaces, serve vd0 there, and try to remove it. Ends with the server."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWPID | CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    first = os.fork()
    if first == 0:
        try:
            guest.sh("mount", "--make-rprivate", "/")
            guest.sh("mount", "-t", "proc", "proc", "/proc")
            node = guest.fork_server("vd0", "memory:16M")
            line = refused(f"whether {node} is open cannot be seen from here: .* PID namespace .*--force")
        except BaseException:
            line = traceback.format_exc()
        os.write(report_fd, line.encode())
        os.close(report_fd)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        os._exit(0)
    os.close(report_fd)
    os.waitpid(first, 0)


@check(limit_s=120)
def server_in_a_pid_namespace() -> list[str]:
    """It does not see who has the disk open. A command that does looks in its place, others are refused."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_fd)
            serve_in_a_pid_namespace(write_fd)
        finally:
            os._exit(0)
    os.close(write_fd)
    with open(read_fd) as report:
        lines = [report.read()]
    assert lines[0].startswith("vdusefast: "), lines[0]
    node = guest.node_of("vd0")
    with open(node, "rb"):
        lines.append(refused(rf"{node} is in use: open by pid {os.getpid()}\b"))
    guest.delete("vd0")
    os.waitpid(pid, 0)
    assert not guest.node_of("vd0")
    return lines
