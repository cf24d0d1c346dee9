"""Verified load on an image: `python -m vdusefast.bench raw` in a process of its own, whose workers may be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
END_LIMIT_S = 60.0
START_LIMIT_S = 20.0


class Load:
    """A running load. `result` returns its outcome."""

    def __init__(self, uri: str, directory: Path, *words: str) -> None:
        """Start it. `words` are further ones of the command line."""
        self._report = directory / "report.json"
        words = words if "--queues" in words else ("--queues", "1", *words)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vdusefast.bench", "raw", "--backend", uri),
                *("--name", "load", "--output-format", "json", "--output", str(self._report)),
                *words,
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def worker(self, module: str = "vdusefast.worker.main") -> psutil.Process:
        """Return the worker, or the relay, waiting for there to be one that has loaded librbd."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            for child in psutil.Process(self._process.pid).children():
                try:
                    if module in " ".join(child.cmdline()) and child.num_threads() > 1:
                        return child
                except psutil.Error:
                    continue
            time.sleep(0.02)
        raise AssertionError(f"no worker: {self.end()}")

    def end(self) -> str:
        """Wait for its end. Returns what it complained about."""
        try:
            return self._process.communicate(timeout=END_LIMIT_S)[1]
        finally:
            self._process.kill()
            self._process.wait()

    def result(self) -> Result:
        """Wait for its end, and return the report."""
        said = self.end()
        report = json.loads(self._report.read_text()) if self._report.exists() else {}
        assert self._process.returncode == 0, f"{said}{report.get('vdusefast', {}).get('verify')}"
        return Result(report, said)


class Result:
    """The report of a load, and its output before that."""

    def __init__(self, report: dict[str, Any], said: str) -> None:
        self.report = report
        self.said = said

    def assert_clean(self) -> None:
        """Nothing was wrong, nothing failed, and something was verified."""
        checks = self.report["vdusefast"]["verify"]
        assert sum(check["blocks_verified"] for check in checks) > 0, checks
        assert [(check["verify_errors"], check["request_errors"]) for check in checks] == [(0, 0)] * len(checks), checks


def verified(uri: str, directory: Path, words: Sequence[str]) -> Result:
    """Run a verified load to its end."""
    return Load(uri, directory, "--verify", "crc32c", *words).result()
