"""A copy of the package in which the recipes of docs/adding.md are followed, and a program that uses what was added."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

Edits = Mapping[str, Sequence[tuple[str, str]]]  # of a file: what stands there once, and what is put before it


def copy_package(tree: Path, *, built: bool) -> None:
    """Copy the sources into `tree`, with the extensions if `built`."""
    left_out = shutil.ignore_patterns("__pycache__", "bench", *([] if built else ["*.so"]))
    for name in ("csrc", "vdusefast"):
        shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)


def follow(tree: Path, edits: Edits) -> None:
    """Make the edits, of which a recipe allows two files at most."""
    assert len(edits) <= 2
    for name, inserted in edits.items():
        text = (tree / name).read_text()
        for before, new in inserted:
            assert text.count(before) == 1, (name, before)
            text = text.replace(before, new + before)
        (tree / name).write_text(text)


def use(tree: Path, program: str, *words: str | Path) -> None:
    """Run a Python program with the copy."""
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
