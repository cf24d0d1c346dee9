"""The systemd service that a server runs in: its name, and commands that make systemd reload or restart it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vdusefast.errors import DeviceBusyError, TimedOutError, VdusefastError

SHOW_TIMEOUT_S = 20.0
_SERVICE = re.compile(r"^(?:0::|\d+:name=systemd:)(?:/.*)?/([^/]+\.service)(?:/|$)")
_USER_MANAGER = "/user@"  # it has the services below


def own_unit(cgroup_path: Path = Path("/proc/self/cgroup")) -> str:
    """Return the service of the system's manager that this process belongs to, such as vdusefast@vd0.service, or ""."""
    try:
        lines = cgroup_path.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        found = _SERVICE.match(line)
        if found and _USER_MANAGER not in line:
            return found[1]
    return ""


def can_reload(unit: str) -> bool:
    """Return whether `reload` works. Raises VdusefastError where systemd cannot be asked."""
    return _show(unit, "CanReload") == "yes"


def reload(unit: str, timeout_s: float) -> None:
    """Have systemd run ExecReload of the unit, and wait for it. Raises VdusefastError with its status text."""
    _command(unit, "reload", timeout_s)


def restart(unit: str, timeout_s: float) -> None:
    """Have systemd stop and start the unit, and wait for it. Raises VdusefastError with its status text."""
    _command(unit, "restart", timeout_s)


def _command(unit: str, verb: str, timeout_s: float) -> None:
    done = _systemctl(unit, [verb, "--", unit], timeout_s)
    if done.returncode:
        why = _show(unit, "StatusText") or done.stderr.strip() or f"status {done.returncode}"
        raise VdusefastError(f"systemctl {verb} {unit} failed: {why}")


def _show(unit: str, name: str) -> str:
    done = _systemctl(unit, ["show", "--value", f"--property={name}", "--", unit], SHOW_TIMEOUT_S)
    return done.stdout.strip()


def _systemctl(unit: str, arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemctl")
    if program is None:
        raise DeviceBusyError(f"systemd runs the server, as {unit}, and there is no systemctl here: run it on the host")
    try:
        return subprocess.run(
            [program, "--no-ask-password", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise TimedOutError(f"systemctl {arguments[0]} {unit}: no result within {timeout_s:g} s") from None
