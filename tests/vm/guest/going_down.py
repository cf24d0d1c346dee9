"""Bring devices of this guest, whose process 1 is systemd, into states, and end the guest.

    going_down.py HOW STATE...
    going_down.py client NODE whole|torn    (for some states: drives a vhost device until it is killed)

HOW: poweroff, reboot or reboot-f. STATE: a device of this name in this state; see STATES. All are added in a login
session of root's, which systemd-logind ends, as an administrator or a desktop does it. Without a STATE there is the
session and no device: what the guest itself takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]  # this directory, and the checkout

import vhost  # noqa: E402

STORE = Path("/var/tmp/going-down")
ENDING = {"poweroff": ["systemctl", "poweroff"], "reboot": ["reboot"], "reboot-f": ["reboot", "-f"]}
SESSION = ("PAMName=login", "User=root", "Type=oneshot", "RemainAfterExit=yes", f"WorkingDirectory={Path.cwd()}")
WAIT_S = 60.0
VDUSE_CLASS, VIRTIO_VDPA = Path("/sys/class/vduse"), Path("/sys/bus/vdpa/drivers/virtio_vdpa")
BROKEN_S = 1  # what an administrator has set msg_timeout to
DATA = b"x" * (4 << 20)


def sh(*words: object, check: bool = True) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"{words}: status {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def in_session(*words: object) -> str:
    """Run a command in a login session of root's, and return what it prints. Processes that it has started stay."""
    unit = f"login-{time.monotonic_ns()}"
    out = STORE / unit
    properties = [f"--property={each}" for each in (*SESSION, f"StandardOutput=append:{out}")]
    try:
        sh("systemd-run", "--quiet", f"--unit={unit}", *properties, "--", *words)
    except SystemExit as error:
        print(error, sh("journalctl", "--no-pager", "-u", unit), flush=True)
        sh("systemd-run", "--quiet", f"--unit={unit}b", *properties[2:], "--", *words)
    return out.read_text()


def add_all(names: list[str]) -> None:
    """Add devices, in this process's session, and print where each is served."""
    from vdusefast.cli import app as cli

    for name in names:
        image = os.environ.get("VDUSEFAST_VM_DISK", "") if name == "mounted" else ""
        if not image:
            image = str(STORE / f"{name}.img")
            sh("truncate", "-s", "64M", image)
        bus = "vhost" if name in CLIENTS else "virtio"
        if status := cli.run(["add", name, "--backend", f"file:{image}", "--queues", "1", "--bus", bus]):
            raise SystemExit(f"{name}: status {status}")
    print(Path("/proc/self/cgroup").read_text().strip(), flush=True)


def info(name: str) -> dict[str, Any]:
    """Return what a device's server says of it."""
    from vdusefast.server import registry

    return registry.describe(name)


def pid_of(name: str) -> int:
    """Return the process id of a device's server."""
    return int(info(name)["pid"])


def mount(name: str, node: str) -> Path:
    """Mount a file system and leave it with data that is not written yet."""
    sh("mkfs.ext4", "-q", node)
    path = Path("/mnt") / name
    path.mkdir(parents=True, exist_ok=True)
    sh("mount", node, path)
    (path / "data").write_bytes(DATA)
    return path


def idle(_node: str) -> None:
    """Nobody uses it."""


def mounted(node: str) -> None:
    """A file system that was mounted by hand, with data that is not written yet. Its store outlives the guest."""
    mount("mounted", node)


def busy(node: str) -> None:
    """A program of a session writes to it."""
    write = f"dd if=/dev/zero of={node} bs=64k oflag=direct conv=notrunc"
    in_session("sh", "-c", f"nohup {write} >/dev/null 2>&1 & sleep 0.5")


def held(node: str) -> None:
    """A file system that a process keeps busy which nothing but the last kill ends."""
    path = mount("held", node)
    options = [f"--property={each}" for each in ("DefaultDependencies=no", f"WorkingDirectory={path}")]
    sh("systemd-run", "--quiet", "--unit=holder", *options, "sleep", "1000")


def stopped(_node: str) -> None:
    """Its server hangs."""
    os.kill(pid_of("stopped"), signal.SIGSTOP)


def orphan(_node: str) -> None:
    """Its server was killed, and nobody serves it again."""
    end_server("orphan")


def mounted_orphan(node: str) -> None:
    """The same with a file system on it, with data that is not written yet."""
    mount("mounted_orphan", node)
    end_server("mounted_orphan")


def client(node: str) -> None:
    """A program of a session does I/O on a vhost device, as a virtual machine does."""
    start_client("client", node, "whole")


def client_orphan(node: str) -> None:
    """The same, and its server was killed."""
    start_client("client_orphan", node, "whole")
    end_server("client_orphan")


def failed(node: str) -> None:
    """A queue that is not served, since its driver has broken its ring."""
    start_client("failed", node, "torn")


def broken(_node: str) -> None:
    """The kernel has given it up, since its server did not answer. The server lives."""
    os.kill(break_device("broken"), signal.SIGCONT)
    wait_for("the server to see that broken is broken", lambda: info("broken")["state"] == "broken")


def broken_orphan(_node: str) -> None:
    """The same, and its server was killed."""
    kill_for_good("broken_orphan", break_device("broken_orphan"))


def break_device(name: str) -> int:
    """Have the kernel give a device up. Returns the pid of its server, which is stopped."""
    pid = pid_of(name)
    (VDUSE_CLASS / name / "msg_timeout").write_text(str(BROKEN_S))
    os.kill(pid, signal.SIGSTOP)
    (VIRTIO_VDPA / "unbind").write_text(name)
    return pid


def use(node: str, ring: str) -> None:
    """Be the driver of a vhost device: one flush after another, or a ring that no device can follow."""
    with vhost.VhostClient(node) as driver:
        driver.start(enabled=(0,))
        driver.submit(0, vhost.T_FLUSH, 0)
        driver.finish(0, WAIT_S)
        print("started", flush=True)
        if ring == "torn":
            driver.tear(0)
            time.sleep(10000)
        while True:
            driver.submit(0, vhost.T_FLUSH, 0)
            driver.finish(0, 10000)


def start_client(name: str, node: str, ring: str) -> None:
    """Start use() in a session, and wait until the device is in use, or has failed."""
    out = STORE / f"{name}.out"
    in_session("sh", "-c", f"nohup {sys.executable} {__file__} client {node} {ring} >{out} 2>&1 &")
    wait_for(f"the client of {name}", lambda: out.exists() and "started" in out.read_text())
    if ring == "torn":
        wait_for(f"a failure of {name}", lambda: bool(info(name)["failure"]))


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"no sign of {what} within {WAIT_S:g} s")
        time.sleep(0.1)


def end_server(name: str) -> None:
    """Kill a server for good."""
    pid = pid_of(name)
    os.kill(pid, signal.SIGSTOP)  # it does not end by itself
    kill_for_good(name, pid)


def kill_for_good(name: str, pid: int) -> None:
    """Kill a stopped server, and have systemd start no other one."""
    sh("systemctl", "stop", "--no-block", f"vdusefast-{name}.service", check=False)
    os.kill(pid, signal.SIGKILL)
    wait_for(f"the end of the server of {name}", lambda: not Path(f"/proc/{pid}").exists())


# In this order: the watchdog ends a server that hangs.
STATES: dict[str, Callable[[str], None]] = {
    function.__name__: function
    for function in (
        *(idle, mounted, busy, held, client, failed, broken, orphan, mounted_orphan, client_orphan, broken_orphan),
        stopped,
    )
}
CLIENTS = ("client", "client_orphan", "failed")  # on a vhost device


def main(how: str, *states: str) -> None:
    """Run the command line. Does not return."""
    if how == "add":
        add_all(list(states))
        return
    if how == "client":
        use(*states)
        return
    STORE.mkdir(parents=True, exist_ok=True)
    sh("modprobe", "-a", "vduse", "virtio_vdpa", "vhost_vdpa", "virtio_blk", "ext4")
    disk = os.environ.get("VDUSEFAST_VM_DISK", "")
    said = in_session("env", f"VDUSEFAST_VM_DISK={disk}", sys.executable, __file__, "add", *states)
    print(said, flush=True)
    nodes = dict(zip(states, said.split(), strict=False))
    for state in STATES:
        if state in states:
            STATES[state](nodes[state])
            print(state, flush=True)
    Path("/dev/kmsg").write_text("guest: going down\n")
    subprocess.run(ENDING[how], check=False)
    time.sleep(10000)


if __name__ == "__main__":
    main(*sys.argv[1:])
