"""Run by test_store_udev.py in namespaces of its own: systemd-udevd, and a device over the loop device that is named.

/dev, /run and /sys are this process's alone, as udev changes nodes and links, and keeps notes. Prints a line
for each step: whether udev has finished its event.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from vdusefast import Device, make_config

SETTLE_S = 60
NODES = ("null", "zero", "full", "random", "urandom")


def run(*words: str) -> None:
    subprocess.run(words, check=True, timeout=2 * SETTLE_S)


def replace_directories(loop: str, base: Path) -> None:
    """Mount a /dev with few nodes, an empty /run, and the /sys of this network namespace."""
    new = base / "dev"
    new.mkdir()
    run("mount", "-t", "tmpfs", "dev", str(new))
    for node in [*(f"/dev/{name}" for name in NODES), loop]:
        status = os.stat(node)
        os.mknod(new / Path(node).name, status.st_mode, status.st_rdev)
    (new / "shm").mkdir()
    run("mount", "--move", str(new), "/dev")
    run("mount", "-t", "tmpfs", "run", "/run")
    run("mount", "-t", "sysfs", "sysfs", "/sys")


def settles(loop: str, limit_s: int = SETTLE_S) -> bool:
    """Have udev handle a new event of the loop device. Returns whether it has done so within the limit."""
    run("udevadm", "trigger", "--action=change", f"--name-match={loop}")
    words = ["udevadm", "settle", f"--timeout={limit_s}"]
    return subprocess.run(words, capture_output=True, timeout=2 * SETTLE_S, check=False).returncode == 0


def main() -> None:
    loop, base = sys.argv[1], Path(sys.argv[2])
    replace_directories(loop, base)
    run("/lib/systemd/systemd-udevd", "--daemon")
    try:
        run("udevadm", "control", "--ping")
        with open(loop, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            print("locked", settles(loop, 2))
        print("free", settles(loop))
        for read_only in (False, True):
            config = make_config(name="store", uri=f"file:{loop}", queues=2, read_only=read_only)
            with Device(config, run_dir=base) as device, device.driver() as driver:
                print("read" if read_only else "written", settles(loop))
                if not read_only:
                    driver.write(0, b"x" * 4096)
                assert driver.read(0, 4096) == b"x" * 4096
            print("left", settles(loop))
    finally:
        run("udevadm", "control", "--exit")


main()
