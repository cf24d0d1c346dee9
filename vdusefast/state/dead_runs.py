"""Run directories of commands that were killed: those named after a process, which no next server will adopt."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from vdusefast.base.kinds import TransportKind
from vdusefast.errors import DeviceBusyError, VdusefastError
from vdusefast.host import run_dirs
from vdusefast.state.run_dir import CONTENTS, RunDirectory

_log = logging.getLogger("vdusefast")


def name_of_process(kind: str) -> str:
    """Return the device name of this process, of a command that serves a device for its own time only."""
    return f"{kind}-{os.getpid()}"


def remove_dead(kind: str) -> None:
    """Remove the run directories that earlier commands of this kind have left, killed: `name_of_process` named them.

    One is dead when its process is, nobody has its lock, and its device was no kernel's, which a next server may adopt.
    The directory of another user stays, and so does one with files that are not ours. What cannot be removed is logged.
    """
    base = run_dirs.base_directory()
    if base is None:
        return
    try:
        names = run_dirs.device_names(base)
    except VdusefastError as error:
        _log.debug("%s", error)
        return
    for name in names:
        prefix, _, pid = name.rpartition("-")
        if prefix == kind and pid.isdecimal() and not _is_alive(int(pid)):
            _remove(base / name)


def _is_alive(pid: int) -> bool:
    """Return whether another process has this number: it may be about to make the directory, and starts undisturbed."""
    return pid != os.getpid() and Path(f"/proc/{pid}").exists()


def _remove(path: Path) -> None:
    try:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or run_dirs.is_held(path):
            return
        directory = RunDirectory(path.name, path.parent)
    except (FileNotFoundError, DeviceBusyError):
        return  # it has been removed, or is being served
    except (OSError, VdusefastError) as error:
        _log.debug("%s stays: %s", path, error)
        return
    try:
        found = set(os.listdir(path))
        was_ours = directory.transport == TransportKind.LOOPBACK or found <= {"lock"}
        if was_ours and not any(name not in CONTENTS and not name.startswith("relay-") for name in found):
            directory.close()
    except (OSError, VdusefastError) as error:
        _log.debug("%s stays: %s", path, error)
    finally:
        directory.release()
