"""The library that a program preloads to use a loopback device as a disk (csrc/preload/), and its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import machinery
from pathlib import Path
from typing import TYPE_CHECKING

from vdusefast.errors import VdusefastError

if TYPE_CHECKING:
    from vdusefast.driver.attach_server import AttachServer

DISK_VARIABLE = "VDUSEFAST_DISK"  # the stand-in path, for programs and shells
_SEPARATORS = " :"  # of LD_PRELOAD


def library_path() -> Path | None:
    """Return where the library is, None when it has not been built."""
    for suffix in machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_preload{suffix}")
        if path.exists():
            return path
    return None


def environment(server: AttachServer, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a program that has the disk of `server`. base: what it has else; None: ours.

    Raises VdusefastError when the library cannot be preloaded.
    """
    path = library_path()
    if path is None:
        raise VdusefastError("the library driver/_preload has not been built: run make build")
    if any(separator in str(path) for separator in _SEPARATORS):
        raise VdusefastError(f"{path}: LD_PRELOAD takes no path with a space or a colon; install vdusefast elsewhere")
    variables = dict(os.environ if base is None else base)
    others = variables.get("LD_PRELOAD", "")
    variables["LD_PRELOAD"] = f"{path}:{others}" if others else str(path)
    variables[DISK_VARIABLE] = str(server.path)
    return {**variables, **server.environment}
