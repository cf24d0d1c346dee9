"""The arguments that start one of our processes: Python, with this package from its own directory."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parents[2])  # the directory that holds the package


def command(module: str, function: str = "main", *, options: tuple[str, ...] = (), at_once: bool = False) -> list[str]:
    """Return the arguments of a process that calls one of our functions with its further arguments, for its status.

    module: below the package. options: of Python. at_once: the process ends without the interpreter's clean-up.
    Nothing is imported from the directory that the caller happens to be in (-P), and the package comes after the
    standard library.
    """
    leave = "os._exit" if at_once else "sys.exit"
    code = (
        f"import os, sys; sys.path.append({HERE!r}); from vdusefast.{module} import {function} as run; "
        f"{leave}(run(sys.argv[1:]))"
    )
    return [sys.executable, "-P", *options, "-c", code]
