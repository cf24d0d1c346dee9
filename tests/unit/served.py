"""A device in its server on the loopback transport, and the commands as processes: for tests of both."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

BASE = Path(os.environ["VDUSEFAST_RUN_DIR"])
CONFIG = """
[device]
name = "vd0"
transport = "loopback"
queues = 2
serial = "S-1"
[backend]
uri = "memory:8M"
"""


def vdusefast(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vdusefast", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


def ended(pid: int) -> bool:
    """Return whether a process that is not our child has gone, waiting for it a while."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            return bool(select.select([fd], [], [], 10)[0])
        finally:
            os.close(fd)
    return True
