"""Bring devices of this guest, whose process 1 is systemd, into states, and end the guest.

    going_down.py HOW STATE...

HOW: poweroff, reboot or reboot-f. STATE: a device of this name in this state; see STATES. All are added in a login
session of root's, which systemd-logind ends, as an administrator or a desktop does it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2])]  # the checkout

STORE = Path("/var/tmp/going-down")
ENDING = {"poweroff": ["systemctl", "poweroff"], "reboot": ["reboot"], "reboot-f": ["reboot", "-f"]}
SESSION = ("PAMName=login", "User=root", "Type=oneshot", "RemainAfterExit=yes", f"WorkingDirectory={Path.cwd()}")
WAIT_S = 60.0
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
        if status := cli.run(["add", name, "--backend", f"file:{image}", "--queues", "1"]):
            raise SystemExit(f"{name}: status {status}")
    print(Path("/proc/self/cgroup").read_text().strip(), flush=True)


def pid_of(name: str) -> int:
    """Return the process id of a device's server."""
    from vdusefast.server import registry

    return int(registry.describe(name)["pid"])


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


def end_server(name: str) -> None:
    """Kill a server for good."""
    pid = pid_of(name)
    os.kill(pid, signal.SIGSTOP)  # it does not end by itself
    sh("systemctl", "stop", "--no-block", f"vdusefast-{name}.service", check=False)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


# In this order: the watchdog ends a server that hangs.
STATES: dict[str, Callable[[str], None]] = {
    function.__name__: function for function in (idle, mounted, busy, held, orphan, mounted_orphan, stopped)
}


def main(how: str, *states: str) -> None:
    """Run the command line. Does not return."""
    if how == "add":
        add_all(list(states))
        return
    STORE.mkdir(parents=True, exist_ok=True)
    sh("modprobe", "-a", "vduse", "virtio_vdpa", "virtio_blk", "ext4")
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
