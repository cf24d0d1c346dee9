"""Servers that `vdusefast add` starts where systemd is process 1: as services of their own.

A process of a login session or of the service that called `add` would be ended with that, before file systems on its
device are unmounted, and nobody would start it again after a crash.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vdusefast.errors import VdusefastError
from vdusefast.host.shutdown import SYSTEMD_IS_INIT
from vdusefast.server.foreign_process import ForeignProcess
from vdusefast.server.systemd.unit import needed_units

if TYPE_CHECKING:
    from vdusefast.config import Config

COMMAND_LIMIT_S = 30.0
END_LOOK_S = 0.05
_NAMESPACES = ("mnt", "net", "pid", "user")
# As in systemd/vdusefast@.service, which says why. No start is tried again when the first one fails: see launch.py.
PROPERTIES = (
    *("Type=notify", "NotifyAccess=all", "Restart=always", "RestartSec=200ms", "StartLimitIntervalSec=0"),
    *("RestartPreventExitStatus=2 5 7", "SuccessExitStatus=7", "KillMode=process"),
    *("TimeoutStartSec=90", "TimeoutStopSec=90", "WatchdogSec=30", "TimeoutAbortSec=10"),
    *("OOMScoreAdjust=-900", "LimitMEMLOCK=infinity", "LimitNOFILE=65536"),
    # Not before local-fs.target: file systems that are mounted by hand are unmounted after what comes after that.
    *("DefaultDependencies=no", "Conflicts=shutdown.target", "Before=shutdown.target"),
)


def refusal() -> str:
    """Return why systemd cannot start a server for us, "" when it can."""
    if not can_ask():
        return "systemd is not process 1, or not for us"
    try:
        for name in _NAMESPACES:
            if os.stat(f"/proc/self/ns/{name}").st_ino != os.stat(f"/proc/1/ns/{name}").st_ino:
                return f"in a namespace of its own ({name})"
        if not os.path.samestat(os.stat("/"), os.stat("/proc/1/root")):
            return "in a root directory of its own"
    except OSError as error:
        return f"process 1 cannot be looked at: {error.strerror}"
    return ""


def can_ask() -> bool:
    """Return whether systemd is process 1 and does what this user asks for, from whatever namespace."""
    try:
        is_init = Path("/proc/1/comm").read_text().strip() == "systemd" and SYSTEMD_IS_INIT.is_dir()
    except OSError:
        return False
    return is_init and os.geteuid() == 0 and shutil.which("systemd-run") is not None


def start_passive(unit: str, description: str, properties: Sequence[str], stop_command: Sequence[str] = ()) -> None:
    """Have a service run without a process. stop_command: what it does when it is stopped. Raises VdusefastError.

    Nothing where it runs already.
    """
    if _run("systemctl", "is-active", unit).stdout.strip() in ("active", "activating", "deactivating"):
        return
    arguments = ["--quiet", "--no-block", "--collect", f"--unit={unit}", f"--description={description}"]
    arguments += [f"--property={each}" for each in properties]
    if stop_command:
        arguments.append(f"--property=ExecStop={_line(stop_command)}")
    done = _run("systemd-run", *arguments, "--", "/bin/true")
    if done.returncode and _run("systemctl", "is-active", "--quiet", unit).returncode:
        raise VdusefastError(f"{unit}: systemd does not start it: {done.stderr.strip()}")


def _line(arguments: Sequence[str]) -> str:
    """Return a command as a unit has it; systemd.service(5)."""
    quoted = (argument.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$") for argument in arguments)
    return " ".join(f'"{argument}"' for argument in quoted)


def unit_name(device: str) -> str:
    """Return the name of the service of a device."""
    return f"vdusefast-{device}.service"


def start(config: Config, command: Sequence[str], reload_command: Sequence[str]) -> None:
    """Have systemd start the server of a device, and return as soon as it begins to. Raises VdusefastError.

    What the store is on is unmounted, or taken off the network, after the server has ended.
    """
    device = config.device.name
    unit = unit_name(device)
    stop_unit(unit)  # one that waits to be started again: this is that start
    _run("systemctl", "reset-failed", unit)
    properties = [*PROPERTIES, *_caller_properties(), f"ExecReload={_line(reload_command)}"]
    # Only an order: what is wanted and never comes would be waited for.
    properties += [f"After={name}" for name in needed_units(config, command[0])]
    arguments = [
        "--quiet",
        "--no-block",
        "--collect",
        f"--unit={unit}",
        f"--description=vdusefast block device {device}",
    ]
    arguments += [f"--property={each}" for each in properties]
    done = _run("systemd-run", *arguments, "--", *(argument.replace("$", "$$") for argument in command))
    if done.returncode:
        raise VdusefastError(f"{device}: systemd does not start its server: {done.stderr.strip()}")


def has_ended(device: str) -> bool:
    """Return whether a device's service neither runs nor is about to."""
    shown = _run("systemctl", "show", "--property=ActiveState", "--property=Job", unit_name(device)).stdout.split()
    waits = any(line.startswith("Job=") and line not in ("Job=", "Job=0") for line in shown)
    return not waits and any(line in ("ActiveState=inactive", "ActiveState=failed") for line in shown)


def stop(device: str) -> None:
    """Have a service that has not begun to serve end."""
    stop_unit(unit_name(device))


def stop_unit(unit: str, *, wait: bool = True) -> None:
    """Stop a service, if there is such a one. Raises VdusefastError when systemd does not answer."""
    _run("systemctl", "stop", *([] if wait else ["--no-block"]), unit)


class ServiceProcess(ForeignProcess):
    """The main process of a device's own service."""


def _caller_properties() -> list[str]:
    """Return what the server inherits from us where it differs from what systemd gives it."""
    properties = []
    if (cpus := os.sched_getaffinity(0)) != os.sched_getaffinity(1):
        properties.append(f"CPUAffinity={' '.join(map(str, sorted(cpus)))}")
    if nice := os.nice(0):
        properties.append(f"Nice={nice}")
    return properties


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of systemd's. Raises VdusefastError when it does not end."""
    try:
        return subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_LIMIT_S,
            start_new_session=True,  # a Ctrl-C is for us, who then undo what was begun
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VdusefastError(f"{arguments[0]} {arguments[1]}: systemd does not answer: {error}") from None
