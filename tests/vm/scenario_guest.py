"""A guest that runs checks in the background, while tests wait for their results."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from bench.vm import machine

RUNNER = machine.ROOT / "tests/vm/guest/runner.py"
RUN = machine.ROOT / "bench/vm/run"
LIMIT_S = 3300
END_LIMIT_S = 30
OUTPUT_LINES = 40
LOADED = ("vduse", "virtio_vdpa", "vhost_vdpa", "virtio_blk")


class ScenarioGuest:
    """A guest of one kernel. It runs all checks of `modules`, and leaves results and log in `directory`.

    skipped: beginnings of the names of checks that are left out. more: words for bench/vm/run.
    """

    def __init__(
        self,
        kernel: str,
        modules: Iterable[str],
        directory: Path,
        skipped: Iterable[str] = (),
        more: Iterable[str] = (),
    ) -> None:
        self._directory = directory
        self._results = directory / "checks.jsonl"
        chosen = list(modules)
        only = [word for module in chosen for word in ("--only", f"{module}.")]
        skip = [word for name in skipped for word in ("--skip", name)]
        # The checks of no_modules load them step by step; without these checks they have to be there.
        load = [] if "no_modules" in chosen else [word for name in LOADED for word in ("--module", name)]
        words = [
            # Ends, with its guest, when pytest is killed.
            *("setpriv", "--pdeathsig", "TERM", sys.executable, str(RUN)),
            *("--kernel", kernel, "--timeout", str(LIMIT_S), "--verbose", *load, *more),
            # Two CPUs, and two that are offline until a check needs them: drivers count what the machine may have.
            *("--cpus", "4", "--append", "maxcpus=2"),
            *("--results", str(directory), "--log", str(directory / "log")),
            *("--", "python", str(RUNNER), machine.RESULTS, *only, *skip),
        ]
        with (directory / "output").open("wb") as output:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def wait_until_started(self) -> None:
        """Return once the first check runs, or the guest has ended: from then on no process of it is new."""
        while not self._results.exists() and self._process.poll() is None:
            time.sleep(0.05)

    def result(self, check: str) -> tuple[bool, str]:
        """Wait until a check has ended; returns whether all was well, and what it said.

        Raises AssertionError when the guest ends before.
        """
        while True:
            ended = self._process.poll() is not None  # asked first: its last line is there then
            for line in self._lines():
                if line["name"] == check:
                    return bool(line["ok"]), str(line["detail"])
            if ended:
                raise AssertionError(f"the guest has ended without {check}:\n{self.output()}")
            time.sleep(0.1)

    def _lines(self) -> list[dict[str, object]]:
        with contextlib.suppress(FileNotFoundError):
            lines = self._results.read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        return []

    def kernel_log(self) -> str:
        """Return the whole kernel log, once the guest has ended."""
        self._process.wait(LIMIT_S + END_LIMIT_S)
        return (self._directory / "log").read_text()

    def output(self) -> str:
        """Return the end of what the runner and the kit have printed."""
        lines = (self._directory / "output").read_text(errors="replace").splitlines()
        return "\n".join(lines[-OUTPUT_LINES:])

    def close(self) -> None:
        """End the guest if it still runs."""
        self._process.terminate()
        self._process.wait(END_LIMIT_S)
