"""Tests in guests: Debian's kernels 6.12 and 7.3, booted under software emulation by bench/vm.

One boot of a kernel serves many tests. The checks are functions in tests/vm/guest/scenario_*.py that run inside: see
checks.py there for how one is registered, and runner.py for how they run. On this side test_scenarios.py has one test
for each check and kernel. The fixture `guests` boots every kernel that a chosen test asks for, and has it run all
checks of the modules that the chosen tests belong to, in order, since a check may build on the one before it. The
runner writes a line of JSON as each check ends; a test waits for the line of its check.

To run checks by hand, with their output as it comes:

    bench/vm/run --kernel 7.3 --timeout 600 -- python tests/vm/guest/runner.py /tmp --only block.

A missing program fails a CI run; elsewhere tests marked `vm` are skipped, and the program is named.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import pytest
from scenario_guest import RUNNER, ScenarioGuest

from bench.vm import cache, machine
from bench.vm.errors import GuestError

sys.path.append(str(RUNNER.parent))
import checks

BOOT_LIMIT_S = 180  # for a test that boots a guest of its own, on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests that boot a guest the time for it."""
    for item in items:
        if item.get_closest_marker("vm") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(BOOT_LIMIT_S))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch what no test has the time to fetch: kernels, and the trees that a module's TREES names (cache.tree).

    Where that fails, the tests say why.
    """
    chosen = [i for i in session.items if isinstance(i, pytest.Function) and i.get_closest_marker("vm")]
    if not chosen or session.config.option.collectonly or machine.missing_tools():
        return
    with contextlib.suppress(GuestError):
        cache.libblkio()
        for kernel in cache.KERNELS:
            cache.kernel(kernel)
        for suite, names in {tree for item in chosen for tree in getattr(item.module, "TREES", ())}:
            cache.tree(suite, names)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave a test out where no guest can run; in CI, where everything has to be installed, fail it."""
    if item.get_closest_marker("vm") and (missing := machine.missing_tools()):
        said = f"no guest without {', '.join(missing)}; ./bootstrap.sh test installs or names what is missing"
        if os.environ.get("CI") == "true":
            pytest.fail(said, pytrace=False)
        pytest.skip(said)


@pytest.fixture(scope="session")
def guests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ScenarioGuest]]:
    """Boot each kernel that a chosen test asks for, side by side, with the checks of the chosen tests' modules."""
    wanted: dict[str, dict[str, None]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and "guests" in item.fixturenames:
            modules = wanted.setdefault(item.callspec.params["kernel"], {})
            if check := item.callspec.params.get("check"):
                modules[check.partition(".")[0]] = None
    with contextlib.ExitStack() as stack:
        running = {}
        for kernel, modules in wanted.items():
            directory = tmp_path_factory.mktemp(f"guest-{kernel}-")
            is_long = request.config.option.soak
            skipped = () if is_long else checks.left_out(is_newest=kernel == cache.KERNELS[-1])
            # The long form has CPUs that really run side by side.
            words = ["--env", "VDUSEFAST_LONG=1", "--clock", "host"] if is_long else []
            running[kernel] = ScenarioGuest(kernel, modules or ["kernel_log"], directory, skipped, words)
            stack.callback(running[kernel].close)
        for guest in running.values():
            guest.wait_until_started()
        yield running
