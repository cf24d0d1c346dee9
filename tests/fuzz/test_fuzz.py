"""Fuzzing as part of the tests: the corpus and every input that once failed, then a minute of new ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
HARNESS = ROOT / "build" / "fuzz" / "fuzz_queue"
REGRESSIONS = sorted(p for p in (HERE / "regressions").iterdir() if p.is_file())


def run(*command: str | Path, timeout_s: int) -> str:
    """Run to the end; its output. Fails the test with that output on any finding."""
    ended = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    return ended.stdout


@pytest.fixture(scope="module")
def harness() -> Path:
    run(HERE / "build.sh", timeout_s=240)
    return HARNESS


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_corpus_has_no_finding(harness: Path) -> None:
    inputs = sorted((HERE / "corpus").iterdir())
    assert len(inputs) > 50
    assert f"Executed {HERE / 'corpus' / inputs[0].name}" in run(harness, *inputs, timeout_s=120)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.name)
def test_regression(harness: Path, path: Path) -> None:
    run(harness, path, timeout_s=60)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_fuzzing(harness: Path) -> None:
    output = run(HERE / "run.sh", "60", timeout_s=280)
    executions = next(int(line.split()[-1]) for line in output.splitlines() if "number_of_executed_units" in line)
    assert executions > 10_000
