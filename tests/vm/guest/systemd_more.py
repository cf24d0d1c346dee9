"""More of the checks of systemd_service.py: a server that `vdusefast add` started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import guest
from steady_load import SteadyLoad

OWN = "vdusefast-own.service"
LIMIT_S = 240.0  # for what takes a second or two, on a loaded host


def show(unit: str, name: str) -> str:
    """Return a property of a unit."""
    return guest.sh("systemctl", "show", "--value", f"--property={name}", unit, timeout_s=LIMIT_S).strip()


def main_pid(unit: str) -> int:
    return int(show(unit, "MainPID"))


def wait_for_server(unit: str, but: int) -> int:
    """Return the main process once the service is active with another one than `but`."""

    def served() -> bool:
        return show(unit, "ActiveState") == "active" and main_pid(unit) not in (0, but)

    guest.wait_for(f"another server than {but}", served, LIMIT_S)
    return main_pid(unit)


class Used:
    """A file system on a device, with a verified load on it, which nothing may disturb."""

    def __init__(self, name: str, unit: str) -> None:
        self.unit = unit
        self._path = Path("/mnt") / name
        self._journals = Path("/run") / f"journals-{name}"
        for path in (self._path, self._journals):
            path.mkdir()
        node = guest.node_of(name)
        guest.sh("mkfs.ext4", "-q", node, timeout_s=LIMIT_S)
        guest.sh("mount", node, self._path)
        self._load = SteadyLoad(self._path, self._journals, processes=1)
        self.wait_for_load()

    def survives(self, blow: Callable[[int], object], *, restarted: bool) -> str:
        """Have something happen to the server: the load continues after a pause. Returns how long that was."""
        self._load.longest_pause_s()
        pid, restarts = main_pid(self.unit), int(show(self.unit, "NRestarts"))
        blow(pid)
        wait_for_server(self.unit, pid)
        self.wait_for_load()
        assert int(show(self.unit, "NRestarts")) == restarts + restarted
        return f"{self._load.longest_pause_s():.1f} s"

    def wait_for_load(self) -> None:
        before = self._load.done()[0]
        guest.wait_for("the load", lambda: self._load.done()[0] > before + 20, LIMIT_S)

    def end(self) -> int:
        """Verify all that was written, and unmount. Returns how many requests there were."""
        done = self._load.done()[0]
        self._load.stop()
        guest.sh("umount", self._path, timeout_s=LIMIT_S)
        return done


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def added() -> str:
    """A server that `add` started has the unit's limits; it is started again after a kill, reloaded, and deleted."""
    guest.sh("truncate", "-s", "48M", "/run/own.img")
    guest.vdusefast("add", "own", "--backend", "file:/run/own.img", timeout_s=LIMIT_S)
    pid = main_pid(OWN)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "-900"
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max locked")] == [["unlimited"] * 2]
    used = Used("own", OWN)
    pauses = [used.survives(kill, restarted=True)]
    pauses.append(used.survives(lambda _: guest.sh("systemctl", "reload", OWN, timeout_s=LIMIT_S), restarted=False))
    pauses.append(used.survives(kill, restarted=True))
    pauses.append(used.survives(lambda _: guest.vdusefast("restart", "own", timeout_s=LIMIT_S), restarted=False))
    done = used.end()
    guest.vdusefast("del", "own", timeout_s=LIMIT_S)
    guest.wait_for("the end of the service", lambda: show(OWN, "ActiveState") == "inactive", LIMIT_S)
    time.sleep(1)
    assert (show(OWN, "ActiveState"), guest.node_of("own")) == ("inactive", "")
    return f"{done} requests; pauses after kill, reload, kill, restart: {', '.join(pauses)}"
