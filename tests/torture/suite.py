"""Runs the torture suite as a user does, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbd_rig import kept_nbdkit

ROOT = Path(__file__).parents[2]
LIMIT_S = 170


@dataclass
class Result:
    """The output of a run, and its report."""

    status: int
    text: str
    report: dict[str, Any]


def torture(tmp_path: Path, *words: str, package: Path = ROOT) -> Result:
    """Run `python -m vdusefast.bench torture` with the package in the directory `package`."""
    report = tmp_path / "torture.json"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "vdusefast.bench", "torture", "--json", str(report), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    return Result(done.returncode, done.stdout, json.loads(report.read_text()) if report.exists() else {})


@contextmanager
def slow_nbdkit(tmp_path: Path, *, multi_conn: bool = True) -> Iterator[list[str]]:
    """Run an nbdkit some of whose writes take long, and yield words for `torture` with which old writes meet new ones.

    The area is small, so that blocks are written again soon, and the load lasts longer than a worker's start.
    """
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    script = Path(__file__).with_name("slow_disk.py")
    plugin = ("python", str(script), f"file={image}", f"multi_conn={int(multi_conn)}")
    with kept_nbdkit(tmp_path / "nbd", *plugin) as server:
        yield ["--backend", server.uri, "--size", "256K", "--load", "0.5s"]
