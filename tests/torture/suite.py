"""Runs the torture suite as a user does, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_S = 170


@dataclass
class Result:
    """What a run has printed, and its report."""

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
