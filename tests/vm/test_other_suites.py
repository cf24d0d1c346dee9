"""What others test disks with, on disks of ours beside loop devices, in a guest of each kernel.

bench/README.md has the list of what runs and what does not, and says how to build blktests and xfstests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from scenario_guest import RUNNER

from bench.vm import cache, guest
from bench.vm.kernel_log import findings
from bench.vm.machine import ROOT, GuestConfig

sys.path.append(str(RUNNER.parent))
import other_programs
import side_by_side
import xfstests

SCRIPT = RUNNER.with_name("other_suites.py")
TREES = [other_programs.TREE]  # conftest.py fetches them
MODULES = ("vduse", "virtio_vdpa", "virtio_blk", "loop", "ext4", "xfs")
LIMIT_S = 5400.0

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(int(LIMIT_S) + 200)]
each_kernel = pytest.mark.parametrize("kernel", cache.KERNELS)


def built_checkout(variable: str, program: str) -> Path:
    """Return the directory that a variable of the environment names, with `program` built in it; else skip the test."""
    if not (named := os.environ.get(variable)):
        pytest.skip(f"{variable} names no built checkout; bench/README.md, The tests of others, says how to make one")
    path = Path(named).absolute()
    assert (path / program).exists(), f"{variable}: {path} has no {program}; it is not built"
    return path


def compare(kernel: str, words: Iterable[object], where: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run other_suites.py in a guest, show its table, and fail where a test fails on ours alone.

    Returns the kernel log from before the loop devices' turn.
    """
    said = bytearray()
    config = GuestConfig(kernel=kernel, memory="4G", timeout_s=LIMIT_S, modules=MODULES, directory=where)
    try:
        outcome = guest.run(config, ["python", str(SCRIPT), *map(str, words)], said.extend, said.extend)
    finally:
        text = said.decode(errors="replace")
        with capsys.disabled():
            print(f"\n{text}")
    assert outcome.status == 0, text
    ours, mark, _ = outcome.kernel_log.partition(side_by_side.LOOP_MARK)
    assert mark, text
    return ours


@each_kernel
def test_programs_of_debian(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert findings(compare(kernel, ["programs"], ROOT, capsys)) == []


@each_kernel
def test_blktests(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkout = built_checkout("VDUSEFAST_BLKTESTS", "src/loblksize")
    assert findings(compare(kernel, ["blktests", checkout], checkout, capsys)) == []


@each_kernel
@pytest.mark.parametrize("file_system", xfstests.MAKE)
def test_xfstests(kernel: str, file_system: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkout = built_checkout("VDUSEFAST_XFSTESTS", "ltp/fsx")
    log = compare(kernel, [file_system, checkout], checkout, capsys)
    assert findings(log, io_errors=False) == []  # disks that lose their writes, and file systems shut down, on purpose
