"""What `make soak` makes of other people's tests (tests/vm/test_other_suites.py): output, limits and the table."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "vm/guest"))
import blktests
import side_by_side
import xfstests
from side_by_side import FAILED, LOOP, NOT_RUN, OURS, PASSED, Place, Verdict

LIMIT_S = 1.0
CHECK = """#!/bin/sh
sleep 0.2
echo 'FSTYP         -- ext4'
echo
printf 'generic/002       '
echo ' 2s'
printf 'generic/015       '
echo '[not run] no room'
printf 'generic/034        3s ... '
echo ' 4s'
printf 'generic/042       '
echo '- output mismatch (see 042.out.bad)'
echo '    --- 042.out'
echo '    +++ 042.out.bad'
"""
ENDS = "echo 'Ran: generic/002'\necho 'Failures: generic/042'\n"
HANGS = "printf 'generic/059       '\nexec sleep 60\n"
NAMES = ["generic/002", "generic/015", "generic/034", "generic/042", "generic/059"]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def verdicts(ours: str, loop: str) -> dict[str, Verdict]:
    return {OURS: Verdict("one", ours, 1, "why"), LOOP: Verdict("one", loop, 1, "why")}


@pytest.mark.parametrize("loop", [PASSED, NOT_RUN])
def test_failure_on_ours_alone_fails(loop: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = {str(number): verdicts(PASSED, PASSED) for number in range(5)}
    assert side_by_side.report({**good, "one": verdicts(FAILED, loop)}) == 1
    said = capsys.readouterr().out
    assert "FAILS ON OURS ALONE" in said
    assert "on ours alone fail: one" in said
    assert "one failed on ours: why" in said


@pytest.mark.parametrize(("ours", "loop"), [(FAILED, FAILED), (PASSED, FAILED), (NOT_RUN, NOT_RUN), (NOT_RUN, PASSED)])
def test_other_outcomes_are_shown(ours: str, loop: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert side_by_side.report({"good": verdicts(PASSED, PASSED), "one": verdicts(ours, loop)}) == 0
    assert f"\none   {ours:7}" in capsys.readouterr().out


def test_suite_that_hardly_runs_fails() -> None:
    assert side_by_side.report({"good": verdicts(PASSED, PASSED), "1": {}, "2": {}}) == 1


def test_command_that_takes_too_long_is_killed_with_what_it_has_started() -> None:
    started_s = time.monotonic()
    status, _ = side_by_side.attempt(["sh", "-c", "sleep 60 & sleep 60"], LIMIT_S)
    assert status is None
    assert time.monotonic() - started_s < 30


def test_command_leaves_no_process() -> None:
    assert side_by_side.attempt(["sh", "-c", "sleep 60 & exit 3"], 30) == (3, "")


def test_output_of_xfstests(tmp_path: Path) -> None:
    program(tmp_path / "check", CHECK + ENDS)
    check = xfstests.Check(Place(OURS, ("", ""), tmp_path), tmp_path, {}, NAMES)
    found = list(check.follow())
    assert [(verdict.test, verdict.result) for verdict in found] == list(
        zip(NAMES[:4], [PASSED, NOT_RUN, PASSED, FAILED], strict=True)
    )
    assert found[1].detail == "[not run] no room"
    assert found[3].detail.endswith("+++ 042.out.bad")
    assert not check.was_killed


def test_hanging_test_of_xfstests_fails_and_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "check", CHECK + HANGS)
    check = xfstests.Check(Place(OURS, ("", ""), tmp_path), tmp_path, {}, NAMES)
    while len(check.told()) < len(NAMES):
        time.sleep(0.01)
    monkeypatch.setattr(xfstests, "LIMIT_S", LIMIT_S)
    last = list(check.follow())[-1]
    assert (last.test, last.result) == ("generic/059", FAILED)
    assert last.detail.startswith("no end within 1 s")
    assert check.was_killed


def test_blktests_that_take_a_disk(tmp_path: Path) -> None:
    program(tmp_path / "tests/block/005", "#!/bin/bash\n\ntest_device() {\n}\n")
    program(tmp_path / "tests/block/006", "#!/bin/bash\n\ntest() {\n}\n")
    program(tmp_path / "tests/block/004", "#!/bin/bash\n\ntest_device() {\n}\n")
    assert blktests.names(tmp_path) == ["block/004", "block/005"]


@pytest.mark.parametrize(
    ("said", "result"),
    [
        ("block/005 => vdb (schedulers)    [passed]\n    runtime  9s\n", PASSED),
        ("block/005 => vdb (schedulers)    [failed]\n    output\n", FAILED),
        ("block/005 => vdb (schedulers)    [not run]\n    no fio\n", NOT_RUN),
        ("block/005 => vdb (one) [passed]\nblock/005 => vdb (two) [failed]\n", FAILED),
        ("", FAILED),
    ],
)
def test_output_of_blktests(said: str, result: str, tmp_path: Path) -> None:
    program(tmp_path / "check", f"#!/bin/sh\ncat <<END\n{said}END\n")
    (found,) = blktests.run(Place(OURS, ("/dev/vdb", ""), tmp_path), tmp_path, ["block/005"])
    assert (found.test, found.result) == ("block/005", result)
