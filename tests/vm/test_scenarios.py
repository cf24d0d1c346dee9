"""The checks of tests/vm/guest, each on both kernels; conftest.py says how they come to run there."""

from __future__ import annotations

import sys

import pytest
from scenario_guest import END_LIMIT_S, LIMIT_S, RUNNER, ScenarioGuest

from bench.vm import cache

sys.path.append(str(RUNNER.parent))
import checks
from kernel_log import complaints

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 2 * END_LIMIT_S)]


@pytest.mark.parametrize("check", [check.name for check in checks.load()])
@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_check(guests: dict[str, ScenarioGuest], kernel: str, check: str) -> None:
    ok, detail = guests[kernel].result(check)
    assert ok, detail


@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_kernel_log_is_clean_from_the_boot_on(guests: dict[str, ScenarioGuest], kernel: str) -> None:
    log = guests[kernel].kernel_log()
    assert "Linux version" in log, guests[kernel].output()
    assert complaints(log) == []
