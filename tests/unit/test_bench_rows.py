"""bench/speed.py: rows, goals, medians; and how the output of callgrind, perf and strace is read. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))

import speed  # noqa: E402 (needs the path set above)
from rows import contestants, counted, report, table  # noqa: E402

from vdusefast.config import load_config  # noqa: E402

SETUP = contestants.Setup(0.1, 0, 1, Path("/t"), Path("/d"), {"queue_size": 512})
CALLGRIND = """\
# callgrind format
events: Ir
fl=/w/_datapath.c
fn=round
10 100
fi=/w/csrc/base/barrier.h
137 30
fe=/w/_datapath.c
12 5
cfn=submit
calls=7 0
12 700
13 20

fl=/w/csrc/engine_null.c
fn=submit
4 21
totals: 176
"""


def row(**changed: Any) -> table.Row:
    return table.Row(
        **({"name": "r", "what": "w", "figure": "ours", "references": ("a", "b"), "wanted": 1.0} | changed)
    )


def stats(requests: int, batches: int) -> Any:
    return SimpleNamespace(requests=requests, batches=batches)


def test_ratio_is_to_the_best_of_the_references_in_each_round() -> None:
    figures = {"ours": [200.0, 90.0, 300.0], "a": [100.0, 10.0, 100.0], "b": [50.0, 30.0, 300.0]}
    result = table.evaluate(row(), figures)
    assert result is not None
    assert (result.value, result.spread, result.rounds) == (2.0, 0.5, 3)
    assert table.evaluate(row(), {}) is None


@pytest.mark.parametrize(
    ("changed", "value", "verdict"),
    [
        ({"wanted": 1.7, "moonshot": 1.9}, 1.69, "missed"),
        ({"wanted": 1.7, "moonshot": 1.9}, 1.7, "reached"),
        ({"wanted": 1.7, "moonshot": 1.9}, 1.95, "moonshot"),
        ({"wanted": 250.0, "moonshot": 120.0, "at_most": True}, 251.0, "missed"),
        ({"wanted": 250.0, "moonshot": 120.0, "at_most": True}, 250.0, "reached"),
        ({"wanted": 250.0, "moonshot": 120.0, "at_most": True}, 100.0, "moonshot"),
        ({"wanted": None}, 5.0, ""),
    ],
)
def test_verdict(changed: dict[str, Any], value: float, verdict: str) -> None:
    assert table.Result(row(**changed), value, 0.0, 1).verdict == verdict


def test_every_row_has_what_it_needs_and_each_contestant_runs_once_a_round() -> None:
    names = table.needed(table.ROWS)
    assert len(names) == len(set(names))
    for one in table.ROWS:
        assert one.figure in names or one.figure in (table.INSTRUCTIONS, table.CALLS)
        assert set(one.references) <= set(names)
    assert set(names) == set(table.CONTESTANTS)


def test_table_tells_goals_and_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    less = row(name="i", references=(), wanted=250.0, moonshot=120.0, at_most=True, digits=0)
    report.print_results([table.Result(less, 480.4, 0.02, 5), table.Result(row(), 1.5, 0.1, 5)], sys.stdout)
    out = capsys.readouterr().out
    assert "| i | w | 480 | 2 % | 5 | <= 250 | <= 120 | missed |" in out
    assert "| r | w | 1.50 | 10 % | 5 | 1.00 |  | reached |" in out
    report.print_figures({"x": [2000.0, 4000.0], "few": [0.5]}, sys.stdout)
    assert "| x | 3k IOPS | 33 % | 2k, 4k |" in capsys.readouterr().out
    everything = report.report([table.Result(less, 480.4, 0.02, 5)], {"ours": [480.4]}, {"i": ["n"]}, {"rounds": 1})
    assert json.loads(json.dumps(everything))["rows"][0]["verdict"] == "missed"


# -- counted


def test_callgrind_costs_are_self_costs_by_function_and_line() -> None:
    costs = counted.parse_callgrind(CALLGRIND)
    assert costs == Counter(
        {
            ("round", "/w/_datapath.c", 10): 100,
            ("round", "/w/csrc/base/barrier.h", 137): 30,
            ("round", "/w/_datapath.c", 12): 5,
            ("round", "/w/_datapath.c", 13): 20,
            ("submit", "/w/csrc/engine_null.c", 4): 21,
        }
    )


def test_difference_of_two_runs_is_what_the_further_requests_took() -> None:
    pause = ("round", "/w/barrier.h", 137)
    few: counted.Costs = Counter({("start", "s.c", 1): 1000, pause: 10, ("round", "r.c", 2): 50})
    many: counted.Costs = Counter(
        {("start", "s.c", 1): 1000, pause: 14, ("round", "r.c", 2): 250, ("late", "l.c", 3): 20}
    )
    found = counted.difference((stats(10, 5), few), (stats(30, 10), many), 137)
    assert found.per_request == pytest.approx(11.2)
    assert found.idle_turns == pytest.approx(0.2)
    assert found.batch == 4.0
    assert found.by_function == [("round", pytest.approx(10.2)), ("late", 1.0)]
    with pytest.raises(contestants.RowError, match="no more requests"):
        counted.difference((stats(10, 5), few), (stats(10, 5), many), 137)


def test_pause_is_found_in_the_source() -> None:
    line = counted.relax_line()
    assert counted.RELAX in (ROOT / "csrc" / "base" / "barrier.h").read_text().splitlines()[line - 1]


def test_words_of_perf_and_strace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted.perf_count("12345,,raw_syscalls:sys_enter,987,100.00,,\n") == 12345
    assert counted.perf_count("<not counted>,,raw_syscalls:sys_enter,0,0.00,,\n") is None
    assert counted.perf_count("event syntax error: 'raw_syscalls:sys_enter'\n") is None
    path = tmp_path / "out"
    path.write_text(
        "% time     seconds  usecs/call     calls    errors syscall\n"
        "------ ----------- ----------- --------- --------- ----------------\n"
        " 50.00    0.000012           1        41         3 read\n"
        " 50.00    0.000012           1       100           io_uring_enter\n"
        "------ ----------- ----------- --------- --------- ----------------\n"
        "100.00    0.000024           0       141         3 total\n"
    )
    assert counted._strace_total(path) == 141
    monkeypatch.setattr(counted, "START_S", 0.0)
    with pytest.raises(contestants.RowError, match="strace left no sum"):
        counted._strace_total(tmp_path / "none")


def test_tools_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(contestants.RowError, match="apt-get install valgrind"):
        counted.instructions(SETUP)
    with pytest.raises(contestants.RowError, match="apt-get install strace"):
        counted.system_calls(SETUP, "null:1G")
    assert not counted.perf_usable()


def test_load_of_a_counted_run_is_the_one_that_was_asked_for() -> None:
    cpus = sorted(counted.os.sched_getaffinity(0))
    setup = contestants.Setup(0.1, cpus[0], cpus[-1], Path("/t"), Path("/d"))
    config = contestants.device_config(setup, "null:1G")
    found = counted.run_requests(setup, config, 2000, counted.default_command())
    assert 2000 <= found.requests < 2000 + contestants.IODEPTH


# -- the bare exchange


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["-p"], ["-p", "-q", "4", "-d", "1"]], ids=["split", "packed", "packed, tight"])
def test_bare_exchange_goes_round_the_ring(tmp_path: Path, words: list[str]) -> None:
    cpus = sorted(counted.os.sched_getaffinity(0))
    build = ["make", "-s", "-C", str(ROOT / "bench" / "micro"), f"BUILD={tmp_path}", str(tmp_path / "ring_exchange")]
    subprocess.run(build, check=True, timeout=60)
    pinned = ["-c", str(cpus[-1]), "-C", str(cpus[0])]
    found = contestants.parse_json([str(tmp_path / "ring_exchange"), "-t", "0.2", *pinned, *words])
    assert found["ring"] == ("packed" if "-p" in words else "split")
    assert found["requests"] > 0


def test_bare_exchange_has_the_format_of_our_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(contestants, "parse_json", lambda words: asked.append(words) or {"iops": 1})
    for packed in (False, True):
        config = SimpleNamespace(device=SimpleNamespace(packed=packed))
        monkeypatch.setattr(contestants, "device_config", lambda _setup, _uri, config=config: config)
        contestants.ring_exchange(SETUP)
    assert ["-p" in words for words in asked] == [False, True]


# -- our device and the command


def test_configuration_survives_its_file(tmp_path: Path) -> None:
    config = contestants.device_config(SETUP, "null:1G", queues=2, cpus=[], engine="null")
    path = tmp_path / "c.toml"
    path.write_text(contestants.config_text(config))
    assert load_config(path) == config
    assert (config.device.queue_size, config.device.queues) == (512, 2)


def test_program_that_fails_is_told() -> None:
    assert contestants.parse_json(["sh", "-c", "echo hello; echo '{\"a\": 1}'"]) == {"a": 1}
    with pytest.raises(contestants.RowError, match="status 3: bad"):
        contestants.parse_json(["sh", "-c", "echo bad >&2; exit 3"])
    with pytest.raises(contestants.RowError, match="cannot be started"):
        contestants.parse_json(["/nonexistent/tool"])


def test_row_that_cannot_be_counted_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    options = speed.parse_options(["--rows", "instructions", "--rounds", "1"])
    assert speed.run(options, SETUP) == 1
    assert "instructions: not measured: valgrind is not installed" in capsys.readouterr().out


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    for name, iops in (("null", 700e3), ("bare ring exchange", 1000e3)):
        monkeypatch.setitem(
            table.CONTESTANTS, name, lambda _setup, name=name, iops=iops: order.append(name) or cast(float, iops)
        )
    assert speed.run(speed.parse_options(["--rows", "exchange", "--rounds", "2"]), SETUP) == 0
    assert order == ["bare ring exchange", "null"] * 2
    assert (
        "| exchange | null / bare ring exchange | 0.70 | 0 % | 2 | 0.70 | 0.90 | reached |" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "nosuch"], "no such row: nosuch; there are instructions, "),
        (["--rows", ","], "no such row"),
        (["--rounds", "0"], "at least 1"),
        (["--set", "nosuch=1"], "write KEY=VALUE once"),
    ],
)
def test_words_that_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.parse_options(words)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_list_names_every_row() -> None:
    words = [sys.executable, str(ROOT / "bench" / "speed.py"), "--list"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*table.BY_NAME, speed.IDLE]
