"""udev beside a device whose store is a block device: it finishes all events of that store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("beside_udev.py")


@pytest.mark.loop_device
def test_udev_finishes_the_events_of_a_store(tmp_path: Path, attach_loop: Callable[..., str]) -> None:
    """flock(2) on the store would stop it, which the first line shows."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    loop = attach_loop(image)
    words = [
        "unshare",
        "--mount",
        "--net",
        "--propagation",
        "private",
        sys.executable,
        str(SCRIPT),
        loop,
        str(tmp_path),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == ["locked False", "free True", "written True", "left True", "read True", "left True"], done.stderr
