"""Programs of this machine that the guest kit runs or needs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from bench.vm.errors import GuestError


def search_path() -> str:
    """Return where programs are looked for: those of an administrator count for an ordinary user, too."""
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


def run_tool(
    arguments: list[str], *, limit_s: float, env: dict[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a command and return its output. Raises GuestError with the end of what it complained about."""
    try:
        done = subprocess.run(
            arguments,
            check=False,
            capture_output=True,
            text=True,
            timeout=limit_s,
            env={**(env or os.environ), "PATH": search_path()},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise GuestError(
            f"{arguments[0]} is missing; ./bootstrap.sh test installs or names what a guest needs"
        ) from None
    except subprocess.TimeoutExpired:
        raise GuestError(
            f"{' '.join(arguments[:3])} did not end within {limit_s:.0f} s; is the network there?"
        ) from None
    if done.returncode != 0:
        complaint = " ".join(done.stderr.split())[-600:]
        raise GuestError(f"{' '.join(arguments[:3])} failed: {complaint}")
    return done.stdout
