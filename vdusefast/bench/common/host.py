"""The machine that figures belong to."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from vdusefast import __version__
from vdusefast.base.json_types import Json


def host() -> Json:
    """Return the machine and the versions that the figures belong to."""
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        model = platform.processor() or model
    versions = {"vdusefast": __version__, "python": platform.python_version(), "numpy": np.__version__}
    for package in ("msgspec", "psutil"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return {"cpu": model, "kernel": platform.release(), "versions": versions}
