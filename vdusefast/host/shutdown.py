"""The shutdown of the machine: whether it has begun, and which of our devices must be served to its very end.

systemd stops services and unmounts file systems at the same time. If a server ended at once, file systems on its device
would wait for ever. So it serves until nobody uses the device. Some uses end only in systemd's last step: a file system
that a process keeps busy, a volume on top of the device. They are served to the end (final_kill.py).
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SYSTEMD_IS_INIT = Path("/run/systemd/system")
LOOK_S = 0.3  # how often the use of a device is checked
JOBS_LOOKS = 3  # checks in a row without a stop job of others: systemd may be between two jobs
SYSTEMCTL_LIMIT_S = 10.0
UNIT = re.compile(r"vdusefast[-@].*\.service")  # units of a device, or of services that manage devices


def is_going_down() -> bool:
    """Return whether systemd is shutting the machine down. False where another program is process 1."""
    return in_final_stage() or _systemctl("is-system-running").strip() == "stopping"


def in_final_stage() -> bool:
    """Return whether all services have been stopped, and systemd-shutdown unmounts the remaining file systems."""
    try:
        return Path("/proc/1/comm").read_text().startswith("systemd-shutdow")
    except OSError:
        return False


class Bystanders:
    """Checks whether systemd still stops or unmounts anything else: only that may end the use of a device."""

    def __init__(self) -> None:
        self._idle_looks = 0

    def are_done(self) -> bool:
        """Return whether several checks in a row have found nothing. Call it every LOOK_S."""
        running = [line.split() for line in _systemctl("list-jobs", "--no-legend", "--plain", "--full").splitlines()]
        others = [job for job in running if len(job) == 4 and job[3] == "running" and not UNIT.fullmatch(job[1])]
        self._idle_looks = 0 if others or not running else self._idle_looks + 1
        return self._idle_looks >= JOBS_LOOKS


def wait_until_unused(users: Callable[[], list[str]], go_on: Callable[[list[str]], None], *, give_up: bool) -> bool:
    """Wait until a device is not in use. Returns whether it is free; with `give_up`, False once nothing ends the use.

    users: returns its users. go_on: called with them again and again.
    """
    bystanders = Bystanders()
    while found := users():
        go_on(found)
        if give_up and bystanders.are_done():
            return False
        time.sleep(LOOK_S)
    return True


def _systemctl(*arguments: str) -> str:
    """Return the output of systemctl, whatever its status is; "" if systemd does not answer."""
    if not SYSTEMD_IS_INIT.is_dir():
        return ""
    try:
        done = subprocess.run(
            ["systemctl", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=SYSTEMCTL_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
