"""A guest whose process 1 is systemd, which runs the checks of guest/systemd_service.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.vm import guest
from bench.vm.kernel_log import findings
from bench.vm.machine import RESULTS, ROOT, GuestConfig

SCRIPT = ROOT / "tests/vm/guest/systemd_service.py"


class SystemdGuest:
    """The results of one guest's checks, and how the guest ended.

    over: a directory whose files lie over the host's, with another systemd.
    """

    def __init__(
        self, kernel: str, checks: Sequence[str], directory: Path, limit_s: float, over: Path | None = None
    ) -> None:
        python = f"cd {ROOT} && {sys.executable} {SCRIPT}"
        config = GuestConfig(
            kernel=kernel,
            timeout_s=limit_s,
            systemd=True,
            over=over,
            disk="256M",
            before=f"{python} prepare",
            results=directory,
        )
        self.outcome, self.out, self.err = guest.captured(config, ["python", str(SCRIPT), RESULTS, *checks])
        (directory / "kernel.log").write_text(self.outcome.kernel_log)
        results = directory / "checks.jsonl"
        assert results.exists(), self._said()
        self.results: dict[str, dict[str, Any]] = {
            result["check"]: result for result in map(json.loads, results.read_text().splitlines())
        }

    def verify(self, checks: Sequence[str]) -> None:
        """Raise AssertionError for a check that failed, an unclean kernel log, or a guest that hung at its end."""
        assert list(self.results) == list(checks), self._said()
        for result in self.results.values():
            assert result["ok"], f"{result['check']}: {result['detail']}"
        assert self.outcome.went_down == "Restarting system", self._said()
        assert findings(self.outcome.kernel_log) == []  # no I/O errors, above all

    def _said(self) -> str:
        return f"{self.out}\n{self.err}\n{self.outcome.kernel_log[-6000:]}"
