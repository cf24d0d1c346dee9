"""The end of the machine: whether it has come, and what of ours is still there at its very end.

systemd stops services and unmounts file systems side by side. A server that ended at once would leave file systems that
wait for it for ever, so it serves until nobody uses its device any more. What nothing else but systemd's last step ends
(a file system that a process keeps busy, a volume on top of the device) is served to the end (final_kill.py).
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SYSTEMD_IS_INIT = Path("/run/systemd/system")
LOOK_S = 0.3  # how often is looked whether a device is still in use
JOBS_LOOKS = 3  # in a row, that must find nobody else's stop job: systemd may be between two of them
SYSTEMCTL_LIMIT_S = 10.0
UNIT = re.compile(r"vdusefast[-@].*\.service")  # of a device, or of what looks after them


def is_going_down() -> bool:
    """Return whether systemd is shutting the machine down. False where another program is process 1."""
    return in_final_stage() or _systemctl("is-system-running").strip() == "stopping"


def in_final_stage() -> bool:
    """Return whether all services have been stopped, and systemd-shutdown unmounts what is left."""
    try:
        return Path("/proc/1/comm").read_text().startswith("systemd-shutdow")
    except OSError:
        return False


class Bystanders:
    """Looks whether systemd still stops or unmounts anything else: only that may end the use of a device."""

    def __init__(self) -> None:
        self._idle_looks = 0

    def are_done(self) -> bool:
        """Return whether several looks in a row have found nothing. To be called every LOOK_S."""
        running = [line.split() for line in _systemctl("list-jobs", "--no-legend", "--plain", "--full").splitlines()]
        others = [job for job in running if len(job) == 4 and job[3] == "running" and not UNIT.fullmatch(job[1])]
        self._idle_looks = 0 if others or not running else self._idle_looks + 1
        return self._idle_looks >= JOBS_LOOKS


def wait_until_unused(users: Callable[[], list[str]], go_on: Callable[[list[str]], None], *, give_up: bool) -> bool:
    """Wait for the end of the use of a device. Returns whether it has come; with `give_up`, False once nothing ends it.

    users: returns who uses it. go_on: called with them again and again.
    """
    bystanders = Bystanders()
    while found := users():
        go_on(found)
        if give_up and bystanders.are_done():
            return False
        time.sleep(LOOK_S)
    return True


def _systemctl(*words: str) -> str:
    """Return what systemctl prints, whatever its status is; nothing where systemd does not answer."""
    if not SYSTEMD_IS_INIT.is_dir():
        return ""
    try:
        done = subprocess.run(
            ["systemctl", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=SYSTEMCTL_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
