"""The run directories of this machine's devices: their place, their names, and the holder of each."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from vdusefast.base.kinds import TransportKind
from vdusefast.base.printable import is_utf8
from vdusefast.errors import VdusefastError
from vdusefast.host import containers, processes

SYSTEM_BASE = Path("/run/vdusefast")
DYING_S, DYING_PAUSE_S = 5.0, 0.02  # how long a server that was killed may take to end


def base_directory() -> Path | None:
    """Return where run directories live, None when each process needs a private one.

    `$VDUSEFAST_RUN_DIR`, else /run/vdusefast when that can be written, else `$XDG_RUNTIME_DIR/vdusefast`. Absolute: it
    means the same in a process with another working directory. Raises VdusefastError.
    """
    if named := os.environ.get("VDUSEFAST_RUN_DIR"):
        return _checked(absolute(Path(named)))
    system = SYSTEM_BASE
    if os.access(system if system.exists() else system.parent, os.W_OK | os.X_OK):
        return system
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return _checked(Path(runtime) / "vdusefast")
    return None


def _checked(path: Path) -> Path:
    """Return `path`, checked to be UTF-8, as servers and commands exchange it as JSON. Raises VdusefastError."""
    if not is_utf8(os.fspath(path)):
        raise VdusefastError(f"{path}: not UTF-8: set VDUSEFAST_RUN_DIR to another directory")
    return path


def absolute(path: Path) -> Path:
    """Return `path` made absolute. Raises VdusefastError when the working directory is unknown."""
    try:
        return path.absolute()
    except OSError as error:
        raise VdusefastError(
            f"{path}: the working directory is unknown: {error.strerror}; give an absolute path"
        ) from None


def device_names(base: Path) -> list[str]:
    """Return the names of the run directories below `base`, sorted; none where it does not exist.

    Raises VdusefastError when it cannot be read.
    """
    try:
        return sorted(entry.name for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise VdusefastError(f"cannot list the devices in {base}: {error.strerror}") from None


def is_held(path: Path) -> bool:
    """Return whether a living process holds the run directory at `path`.

    One that was killed holds it until the kernel has closed all that it had, which is waited for. Raises
    VdusefastError when its lock cannot be opened.
    """
    until_s = time.monotonic() + DYING_S
    while _is_locked(path):
        if time.monotonic() > until_s or not processes.is_ending(holder_pid(path)):
            return True
        time.sleep(DYING_PAUSE_S)
    return False


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise VdusefastError(
            f"{path.name}: cannot read {path}: {error.strerror}; run this as the user who added the device"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def holder_pid(path: Path) -> int:
    """Return the process that last held the run directory at `path`.

    0 if it is unknown, as of a process in another PID namespace.
    """
    return _read_holder(path)[0]


def holder_transport(path: Path) -> str:
    """Return the transport of the device that has or had the run directory at `path`, "" where that is not known."""
    return _read_holder(path)[1]


def was_in_kernel(path: Path) -> bool:
    """Return whether the device of the run directory at `path` is, or was, one of the kernel transport."""
    return holder_transport(path) == TransportKind.KERNEL


def _read_holder(path: Path) -> tuple[int, str]:
    try:
        return parse_holder((path / "lock").read_bytes())
    except OSError:
        return 0, ""


def parse_holder(text: bytes) -> tuple[int, str]:
    """Return pid and transport out of a lock file; pid is 0 where it is of another PID namespace."""
    holder, _, transport = text.decode(errors="replace").strip().partition(" ")
    pid, _, namespace = holder.partition("@")
    is_ours = not namespace or namespace == str(containers.pid_namespace())
    return (int(pid) if pid.isdecimal() and is_ours else 0), transport


def required_base() -> Path:
    """Return where run directories live. Raises VdusefastError where there is no place for them."""
    base = base_directory()
    if base is None:
        raise VdusefastError(
            f"{SYSTEM_BASE} cannot be written, $XDG_RUNTIME_DIR is not set: be root, or set VDUSEFAST_RUN_DIR"
        )
    return base
