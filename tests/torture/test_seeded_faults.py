"""The torture suite can fail: data paths with faults built into them (csrc/base/seed_fault.h) are found out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from suite import ROOT, slow_nbdkit, torture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FORGET, WRITE_EARLY, FLUSH_EARLY, DISORDER, REPEAT, DEADLY, NO_FENCE = range(1, 8)
KILLS = "worker=400"  # a run ends with the first loss: after some 30 kills, seldom 100; each takes a quarter second


def build(fault: int, target: Path) -> Path:
    """Return `target` with a copy of the package in it whose data path has `fault`, 0 for none."""
    built = "backends._nbd" if fault == NO_FENCE else "worker._datapath"  # the extension with the fault
    ignored = shutil.ignore_patterns(f"{built.rpartition('.')[2]}.*.so", "__pycache__")
    shutil.copytree(ROOT / "vdusefast", target / "vdusefast", ignore=ignored)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(target), "--build-temp", str(target / "objects")],
        cwd=ROOT,
        env={
            **os.environ,
            "VDUSEFAST_SEED_FAULT": str(fault),
            "VDUSEFAST_EXTENSIONS": built,
            "VDUSEFAST_OPTIMIZE": "-O1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return target


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Return a package with the fault that the test is about."""
    return build(request.param, tmp_path_factory.mktemp(f"fault{request.param}"))


@pytest.mark.parametrize("faulty", [FORGET, WRITE_EARLY, DISORDER, REPEAT], indirect=True)
def test_a_fault_is_found_by_a_few_kills(faulty: Path, tmp_path: Path) -> None:
    result = torture(tmp_path, "--engine", "sync", "--kills", KILLS, "--give-up", "5s", package=faulty)
    assert result.status == 1, result.text
    assert result.report["lost"], result.text
    assert "LOST" in result.text


@pytest.mark.parametrize("faulty", [0], indirect=True)
def test_the_same_build_without_a_fault_passes(faulty: Path, tmp_path: Path) -> None:
    result = torture(tmp_path, "--engine", "sync", "--kills", "worker=20", "--give-up", "5s", package=faulty)
    assert result.status == 0, result.text


@pytest.mark.parametrize("faulty", [FLUSH_EARLY], indirect=True)
def test_an_early_answer_to_a_flush_is_found_by_a_store_that_fails_it(faulty: Path, tmp_path: Path) -> None:
    """No kill of a process shows whether flushed data survives: only a loss of the machine's power does.

    The test of the data path checks that a flush is answered with its outcome, and so not before it.
    """
    test = "tests/datapath/test_bad_host.py::test_flush_of_a_failing_store_is_an_error"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    for package, status in ((faulty, pytest.ExitCode.TESTS_FAILED), (ROOT, pytest.ExitCode.OK)):
        done = subprocess.run(
            command,
            cwd=ROOT,
            # -P: the package in the current directory is the one without the fault.
            env={**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == status, done.stdout


@pytest.mark.parametrize("faulty", [NO_FENCE], indirect=True)
def test_a_write_that_a_server_carries_out_late_is_found_by_a_few_kills(faulty: Path, tmp_path: Path) -> None:
    """About one kill in four shows it."""
    with slow_nbdkit(tmp_path) as words:
        result = torture(tmp_path, *words, "--kills", "worker=24,supervisor=4,group=4", package=faulty)
    assert result.status == 1, result.text
    assert "generation" in {lost["what"] for lost in result.report["lost"]}, result.text


WRITE_THE_DEADLY_SECTOR = """
import logging, os, sys, time, vdusefast
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
config = vdusefast.make_config(name="deadly", uri="file:" + sys.argv[1])
with vdusefast.Device(config) as device, device.driver() as driver:
    began = time.monotonic()
    try:
        driver.write(65536, b"x" * 512)
    except OSError as error:
        print("REFUSED", error)
    print("PAUSE", time.monotonic() - began)
    driver.write(512, b"y" * 512)
    assert driver.read(512, 512) == b"y" * 512
    driver.write(65536 + 512, b"z" * 512)
    print("RESTARTS", device.queues()[0].restarts)
"""


@pytest.mark.parametrize("faulty", [DEADLY], indirect=True)
def test_a_request_that_kills_its_workers_is_answered_with_an_error_and_the_queue_goes_on(
    faulty: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store.img"
    store.write_bytes(bytes(1 << 20))
    done = subprocess.run(
        [sys.executable, "-P", "-c", WRITE_THE_DEADLY_SECTOR, str(store)],
        env={**os.environ, "PYTHONPATH": str(faulty)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    assert "REFUSED" in done.stdout, done.stdout
    assert "RESTARTS 3\n" in done.stdout
    assert "(write at byte 65536) has ended 3 workers: answered with IOERR" in done.stdout
    assert store.read_bytes()[128 * 512 : 130 * 512] == bytes(512) + b"z" * 512
