"""Devices that systemd serves, as process 1 of a guest. The checks are in tests/vm/guest/systemd_service.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.vm import cache, guest
from bench.vm.kernel_log import findings
from bench.vm.machine import RESULTS, ROOT, GuestConfig

SCRIPT = ROOT / "tests/vm/guest/systemd_service.py"
sys.path.append(str(SCRIPT.parent))
from systemd_service import ORDER, SHORT  # noqa: E402

SHORT_LIMIT_S, LIMIT_S = 900, 1800  # for a guest on a host that is busy with others; a quarter on one that is not

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 30)]


class Run:
    """The results of one guest's checks, and how the guest ended."""

    def __init__(self, kernel: str, checks: tuple[str, ...], directory: Path, limit_s: float) -> None:
        python = f"cd {ROOT} && {sys.executable} {SCRIPT}"
        config = GuestConfig(
            kernel=kernel, timeout_s=limit_s, systemd=True, disk="256M", before=f"{python} prepare", results=directory
        )
        self.outcome, self.out, self.err = guest.captured(config, ["python", str(SCRIPT), RESULTS, *checks])
        (directory / "kernel.log").write_text(self.outcome.kernel_log)
        lines = (directory / "checks.jsonl").read_text().splitlines()
        self.results: dict[str, dict[str, Any]] = {result["check"]: result for result in map(json.loads, lines)}

    def verify(self, checks: tuple[str, ...]) -> None:
        """Raise AssertionError for a check that failed, an unclean kernel log, or a guest that hung at its end."""
        said = f"{self.out}\n{self.err}\n{self.outcome.kernel_log[-6000:]}"
        assert list(self.results) == list(checks), said
        for result in self.results.values():
            assert result["ok"], f"{result['check']}: {result['detail']}"
        assert self.outcome.went_down == "Restarting system", said
        assert findings(self.outcome.kernel_log) == []  # no I/O errors, above all


def test_crash_and_upgrade_are_a_pause_for_a_file_system_of_fstab(tmp_path: Path) -> None:
    """Killed and reloaded: no I/O error, no unmount. The others are in the long form."""
    Run(cache.KERNELS[0], SHORT, tmp_path, SHORT_LIMIT_S).verify(SHORT)


@pytest.mark.soak
@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_all_ways_to_restart_a_service(kernel: str, tmp_path: Path) -> None:
    Run(kernel, ORDER, tmp_path, LIMIT_S).verify(ORDER)
