"""The suite in parts: side by side, each with its name, and one that fails makes the whole fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import parts
import pytest

LIMIT_S = 60


def start(tmp_path: Path, **tests: str) -> subprocess.Popen[str]:
    """Run each text of Python as the tests of a part with that name."""
    for name, text in tests.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    words = {name: ("-p", "no:cacheprovider", f"test_{name}.py") for name in tests}
    program = f"import parts, pathlib, sys; sys.exit(parts.run({words!r}, pathlib.Path({str(tmp_path)!r})))"
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.append({str(parts.TESTS)!r}); {program}"],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_one_part_that_fails_is_reported_whole_and_fails_the_run(tmp_path: Path) -> None:
    running = start(
        tmp_path, good="def test_it(): pass", bad="def test_it(): assert 1 == 2, 'the reason'", empty="# no test"
    )
    out, _ = running.communicate(timeout=LIMIT_S)
    assert running.returncode == 1
    lines = out.splitlines()
    assert any(line.startswith("good    | 0:") and "1 passed" in line for line in lines), out
    assert any(line.startswith("bad     | 0:") and "1 failed" in line for line in lines), out
    assert out.index("the reason") > out.index("1 failed")
    assert "FAILED test_bad.py::test_it" in out


@pytest.mark.slow
def test_parts_that_pass_make_a_run_that_passes(tmp_path: Path) -> None:
    running = start(tmp_path, one="def test_it(): pass", empty="# no test")
    assert "1 passed" in running.communicate(timeout=LIMIT_S)[0]
    assert running.returncode == 0


@pytest.mark.slow
def test_interrupt_reaches_every_part_once(tmp_path: Path) -> None:
    """So that each ends what it has started."""
    text = f"""
import pathlib, pytest, time
@pytest.fixture
def started():
    yield
    pathlib.Path("ended", __file__.split("_")[-1]).touch()
def test_it(started):
    pathlib.Path("begun", __file__.split("_")[-1]).touch()
    time.sleep({LIMIT_S})
"""
    for name in ("begun", "ended"):
        (tmp_path / name).mkdir()
    with start(tmp_path, one=text, two=text) as running:
        until_s = time.monotonic() + LIMIT_S / 2
        while len(list((tmp_path / "begun").iterdir())) < 2:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in running.communicate(timeout=LIMIT_S)[0]
    assert running.returncode == 1
    assert sorted(path.name for path in (tmp_path / "ended").iterdir()) == ["one.py", "two.py"]


@pytest.mark.parametrize(
    ("path", "kernel", "check", "part"),
    [
        ("vm/test_scenarios.py", parts.NEWEST_KERNEL, "block.serial", "newest"),
        ("vm/test_scenarios.py", parts.NEWEST_KERNEL, None, "newest"),
        ("vm/test_scenarios.py", parts.NEWEST_KERNEL, "many.by_command", "guests"),
        ("vm/test_scenarios.py", "6.12", "block.serial", "guests"),
        ("vm/test_kit.py", parts.NEWEST_KERNEL, None, "guests"),
        ("vm/test_rbd_guest.py", None, None, "servers"),
        ("datapath/test_blocks.py", None, None, "rings"),
        ("test_documents.py", None, None, "servers"),
        ("new/test_new.py", None, None, "servers"),
    ],
)
def test_every_test_belongs_to_one_part(path: str, kernel: str | None, check: str | None, part: str) -> None:
    assert parts.part_of(parts.TESTS / path, kernel, check) == part
    # And pytest looks for it there.
    assert any(
        (parts.TESTS.parent / where) in (parts.TESTS / path, *(parts.TESTS / path).parents)
        for where in parts.PARTS[part]
    )


def test_newest_kernel_is_the_one_of_the_guests() -> None:
    from bench.vm import cache

    assert cache.KERNELS[-1] == parts.NEWEST_KERNEL


def test_every_file_of_tests_is_in_one_of_the_fast_parts() -> None:
    names = [word for words in parts.fast_parts().values() for word in words if not word.startswith("-")]
    assert len(names) == len(set(names)) > parts.FAST_PARTS
    assert {Path(name).name for name in names} == {path.name for path in parts.TESTS.rglob("test_*.py")}


@pytest.mark.slow
def test_fast_tests_are_those_without_the_mark_and_none_takes_long(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    soak\n    loop_device\n    vm\n")
    busy = "until_s = time.process_time() + 2\n    while time.process_time() < until_s: pass"
    marked = "".join(f"@pytest.mark.{name}\ndef test_{name}(): assert False\n" for name in ("slow", "vm"))
    (tmp_path / "test_it.py").write_text(
        f"import pytest, time\n{marked}def test_busy():\n    {busy}\ndef test_idle(): time.sleep(2)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "--fast", "-q", "test_it.py"],
        env=os.environ | {"PYTHONPATH": str(parts.TESTS)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert "1 failed, 1 passed, 2 deselected" in done.stdout, done.stdout
    assert "FAILED test_it.py::test_busy" in done.stdout
    assert "make it faster or mark it slow" in done.stdout
