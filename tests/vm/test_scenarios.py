"""The checks of tests/vm/guest, each on both kernels; conftest.py says how they come to run there."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import pytest
from scenario_guest import END_LIMIT_S, LIMIT_S, RUNNER, ScenarioGuest

from bench.vm import cache

sys.path.append(str(RUNNER.parent))
import checks
import qemu_machine
import scenario_stack
from kernel_log import complaints

TREES = [(qemu_machine.SUITE, qemu_machine.PACKAGES), scenario_stack.TREE]  # conftest.py fetches them

OLDER = cache.KERNELS[:-1]
pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 2 * END_LIMIT_S)]


def chosen() -> Iterator[object]:
    """Give each kernel with the checks that run on it, now or in `make soak`."""
    names = [check.name for check in checks.load() if check.name.partition(".")[0] not in checks.SOAK_ONLY]
    for kernel, name in itertools.product(cache.KERNELS, names):
        is_later = name.startswith(checks.left_out(is_newest=kernel not in OLDER))
        if not is_later:
            yield kernel, name
        if is_later or name.startswith(checks.WITH_LONG_FORM):
            yield pytest.param(kernel, name, marks=pytest.mark.soak, id=f"{kernel}-{name}-soak")


@pytest.mark.parametrize(("kernel", "check"), list(chosen()))
def test_check(guests: dict[str, ScenarioGuest], kernel: str, check: str) -> None:
    ok, detail = guests[kernel].result(check)
    assert ok, detail


LOGS = [
    *cache.KERNELS,
    *(pytest.param(kernel, marks=pytest.mark.soak, id=f"{kernel}-soak") for kernel in cache.KERNELS),
]


@pytest.mark.parametrize("kernel", LOGS)
def test_kernel_log_is_clean_from_the_boot_on(guests: dict[str, ScenarioGuest], kernel: str) -> None:
    log = guests[kernel].kernel_log()
    assert "Linux version" in log, guests[kernel].output()
    assert complaints(log) == []
