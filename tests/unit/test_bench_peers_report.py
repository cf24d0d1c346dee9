"""`bench peers`: its report and plot, and the same in a guest."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fake_peers import Json, command, run

from vdusefast.bench.common import rounds
from vdusefast.bench.peers import in_guest as peers_vm
from vdusefast.bench.peers import plot as peers_plot
from vdusefast.bench.peers.awake import Awake
from vdusefast.bench.peers.goals import goals_table
from vdusefast.bench.peers.report import print_peers, ratio_table
from vdusefast.errors import ConfigError, VdusefastError

MIB = 1 << 20


# -- report and plot


def sample() -> Json:
    runs = [run(peer, n, base * (n + 1), job) for job in ("j", "k") for peer, base in SPEEDS.items() for n in range(3)]
    return {
        "host": {"cpu": "a CPU", "kernel": "7.3"},
        "method": {
            "fio": "fio-3.33",
            "ioengine": "libaio",
            "rounds": 3,
            "runtime_s": 2.0,
            "ramp_s": 0.3,
            "queues": 1,
            "size_bytes": 64 * MIB,
            "backing": "tmpfs",
            "cpu_count": 2,
            "server_cpus": "0",
            "driver_cpus": "",
            "note": "A note.",
        },
        "peers": [{"name": peer, "title": "T", "version": "", "cache": "C"} for peer in SPEEDS],
        "not_run": [{"name": "ublk", "reason": "no server"}],
        "failed": [{"peer": "nbdkit", "job": "j", "reason": "EIO"}],
        "runs": runs,
        "table": rounds.table(runs, ["j", "k"], list(SPEEDS), "vdusefast"),
        "stopped_by": "",
    }


SPEEDS = {"vdusefast": 3000.0, "qsd": 1000.0, "null_blk": 9000.0}


def test_report_shows_iops_ratios_and_what_did_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    print_peers(sample(), sys.stdout)
    out = capsys.readouterr().out
    for text in (
        "6k ±50 %",
        "3.00 ±0 %",
        "0.33 ±0 %",
        "not run: ublk: no server",
        "failed: nbdkit in j: EIO",
        "A note.",
    ):
        assert text in out
    print_peers(sample(), sys.stdout, markdown=True)
    assert "| IOPS | vdusefast | qsd | null_blk |\n|---|---:|---:|---:|\n| j | 6k ±50 % |" in capsys.readouterr().out


def test_cost_of_a_request_is_above_that_of_null_blk(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"vdusefast": 4000.0, "qsd": 2000.0, "null_blk": 10000.0}
    runs = [run(peer, n, iops * (n + 1)) for peer, iops in speeds.items() for n in range(3)]
    ours, theirs = rounds.costs(runs, ["j"], list(speeds), "null_blk", "qsd")
    # 250 - 100 us and 500 - 100 us in round 0, half of it in round 1.
    assert (ours["peer"], ours["cost_ns"], ours["share"]) == ("vdusefast", 75e3, pytest.approx(0.375))
    assert (theirs["peer"], theirs["cost_ns"], theirs["share"]) == ("qsd", 200e3, 1.0)
    assert rounds.costs(runs, ["j"], ["vdusefast", "qsd"], "null_blk", "qsd") == []
    assert rounds.costs(runs, ["j"], ["vdusefast", "null_blk"], "null_blk", "qsd")[0]["share"] is None
    report = sample() | {"runs": runs, "table": rounds.table(runs, ["j"], list(speeds), "vdusefast")}
    print_peers(report, sys.stdout, markdown=True)
    assert "| above null_blk | vdusefast | qsd |\n|---|---:|---:|\n| j | 75 us, 0.38" in capsys.readouterr().out


def test_goals_are_judged_by_the_worst_of_their_jobs() -> None:
    jobs = ["randread 4k qd32 x1", "randwrite 4k qd32 x2", "randread 4k qd1 x1", "read 128k qd32 x1"]
    runs = [run("qsd", 0, 100.0, job) for job in jobs] + [run("loop", 0, 400.0, job) for job in jobs]
    runs += [run("vdusefast", 0, iops, job) for iops, job in zip((600.0, 300.0, 150.0, 1.0), jobs, strict=True)]
    rows = rounds.table(runs, jobs, ["vdusefast", "qsd", "loop"], "vdusefast")
    table = goals_table(rows, [], "vdusefast", counted=False)
    assert table is not None
    assert [line[1:] for line in table[1]] == [
        ("3.00", "2.5", "5", "reached"),
        ("1.50", "2", "4", "missed"),
        ("0.75", "0.8", "1.2", "missed"),
        ("1.50", "<= 1", "", "missed"),
    ]
    assert "the least of 2 (randwrite 4k qd32 x2)" in table[1][0][0]
    assert goals_table([], [], "vdusefast", counted=False) is None


def test_cost_is_a_goal_in_counted_time() -> None:
    costs = [{"job": "j", "peer": peer, "share": share} for peer, share in (("vdusefast", 0.3), ("qsd", 1.0))]
    table = goals_table([], costs, "vdusefast", counted=True)
    assert table is not None
    assert table[1] == [("cost above null_blk / that of qsd (j)", "0.30", "<= 0.4", "<= 0.2", "reached")]
    assert goals_table([], costs, "vdusefast", counted=False) is None


def test_report_without_us_has_no_ratios() -> None:
    report = sample()
    report["table"] = rounds.table([run("qsd", 0, 5)], ["j"], ["qsd"], "vdusefast")
    assert ratio_table(report) is None


@pytest.mark.slow
@pytest.mark.keeps_resources  # matplotlib keeps its fonts open
def test_plot_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    peers_plot.check_plot(path)
    peers_plot.plot(sample(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vdusefast\[plot\]"):
        peers_plot.check_plot(Path("x.png"))


def test_plot_needs_a_kind_of_picture() -> None:
    with pytest.raises(ConfigError, match=r"\.png, \.svg or \.pdf"):
        peers_plot.check_plot(Path("x.txt"))


# -- in a guest


def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Let a shell script stand in for the guest kit; $results is the directory that the guest would write to."""
    path = tmp_path / "run"
    find = 'for word; do [ "$last" = --results ] && results=$word; last=$word; done\n'
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/boots\n{find}{body}\n')
    path.chmod(0o755)
    monkeypatch.setattr(peers_vm, "KIT", path)


def test_guest_runs_the_same_options_and_its_report_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").write_text(json.dumps(sample() | {"failed": []}))
    kit(tmp_path, monkeypatch, f"cp {tmp_path}/report $results/peers.json")
    saved = tmp_path / "saved.json"
    assert command(vm="6.12", rounds=3, runtime="500ms", jobs=("rw=randread iodepth=4",), json_path=saved) == 0
    assert "3.00 ±0 %" in capsys.readouterr().out
    assert json.loads(saved.read_text())["host"]["kernel"] == "7.3"
    boot = (tmp_path / "boots").read_text()
    for words in ("--kernel 6.12", "--load-modules", "--rounds=3", "--runtime=500ms", "rw=randread bs=4096 iodepth=4"):
        assert words in boot
    assert "--clock host" in boot
    assert "--keep-awake" not in boot


def test_counted_time_takes_a_boot_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(peer: str, iops: float) -> str:
        job = "randread 4k qd1 x1"
        one = sample() | {"failed": [], "not_run": [], "runs": [run(peer, 0, iops, job)]}
        return json.dumps(one | {"peers": [{"name": peer, "title": "T", "version": "", "cache": "C"}]})

    for peer, iops in (("vdusefast", 400.0), ("qsd", 100.0)):
        (tmp_path / peer).write_text(report(peer, iops))
    body = f'case "$*" in *--peers=qsd*) p=qsd;; *) p=vdusefast;; esac; cp {tmp_path}/$p $results/peers.json'
    kit(tmp_path, monkeypatch, body)
    saved = tmp_path / "saved.json"
    assert command(vm="7.3", icount=True, peers="vdusefast,qsd", rounds=2, jobs=("rw=randread",), json_path=saved) == 0
    assert "4.00 ±0 %" in capsys.readouterr().out
    boots = (tmp_path / "boots").read_text().splitlines()
    assert len(boots) == 4
    assert all("counted" in boot and "--keep-awake" in boot and "--rounds=1" in boot for boot in boots)
    merged = json.loads(saved.read_text())
    assert [(one["peer"], one["round"]) for one in merged["runs"]] == [
        *[("vdusefast", 0), ("qsd", 0)],
        *[("qsd", 1), ("vdusefast", 1)],
    ]


def test_guest_without_a_report_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit(tmp_path, monkeypatch, "exit 124")
    with pytest.raises(VdusefastError, match="ended with status 124 and no report"):
        command(vm="6.12")


def test_guest_is_ended_by_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit(
        tmp_path, monkeypatch, f"trap ': > {tmp_path}/ended; exit 1' TERM; kill -INT $PPID; sleep 60 & wait $!; kill $!"
    )
    before = signal.getsignal(signal.SIGINT)
    assert command(vm="6.12") == 0
    assert (tmp_path / "ended").exists()
    assert signal.getsignal(signal.SIGINT) == before


def test_guest_needs_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_vm, "KIT", Path("/nonexistent/run"))
    with pytest.raises(ConfigError, match="from a checkout"):
        command(vm="6.12")


def test_peer_that_was_named_and_did_not_run_in_the_guest_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report").write_text(json.dumps(sample() | {"failed": []}))
    kit(tmp_path, monkeypatch, f"cp {tmp_path}/report $results/peers.json")
    assert command(vm="6.12", peers="vdusefast,ublk") == 1


def wait_until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_awake_spins_except_when_paused() -> None:
    before = set(psutil.Process().children())
    with Awake(True) as awake:
        (child,) = set(psutil.Process().children()) - before
        assert os.sched_getscheduler(child.pid) == os.SCHED_IDLE
        with awake.paused():
            wait_until(lambda: child.status() == psutil.STATUS_STOPPED)
        wait_until(lambda: child.status() == psutil.STATUS_RUNNING)
    assert not psutil.pid_exists(child.pid)
    with Awake(False) as awake, awake.paused():
        assert set(psutil.Process().children()) == before
