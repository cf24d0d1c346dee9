"""`bench peers`: order, medians and ratios, what is refused, and that nothing of a peer stays, whatever happens."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_fio
import pytest
from fake_peers import A, B, C, FilePeer, Json, command, run

from vdusefast.bench.common import rounds
from vdusefast.bench.common.real_fio import FioStuckError
from vdusefast.bench.peers import data_check, dirty_pages
from vdusefast.bench.peers import files as peers_files
from vdusefast.bench.peers import in_guest as peers_vm
from vdusefast.bench.peers import session as peers
from vdusefast.bench.peers.awake import Awake
from vdusefast.bench.peers.fio_arguments import measure_arguments
from vdusefast.bench.peers.goals import goals_table
from vdusefast.bench.peers.report import method_text, notes
from vdusefast.bench.peers.session import PeersOptions, Session, parse_job, standard_jobs
from vdusefast.errors import ConfigError, KernelSupportError, VdusefastError
from vdusefast.server.signals import StopSignals

MIB = 1 << 20


# -- order and arithmetic


def test_every_peer_runs_once_a_round_and_begins_as_often_as_the_others() -> None:
    peer_names = ["a", "b", "c"]
    rows = list(rounds.schedule(["x", "y"], peer_names, 3))
    assert [(number, job) for number, job, _order in rows] == [(n, job) for job in ("x", "y") for n in range(3)]
    assert all(sorted(order) == peer_names for _number, _job, order in rows)
    for job in ("x", "y"):
        firsts = Counter(order[0] for _number, one, order in rows if one == job)
        assert set(firsts.values()) == {1}
    assert rounds.rotated([], 3) == []


def test_median_and_spread() -> None:
    summary = rounds.summarize([90.0, 130.0, 100.0])
    assert summary is not None
    assert (summary.median, summary.low, summary.high, summary.count) == (100.0, 90.0, 130.0, 3)
    assert summary.spread == pytest.approx(0.2)
    assert rounds.summarize([]) is None


def test_ratios_compare_within_a_round() -> None:
    # The machine was half as fast in round 1: the ratio is the same all the same.
    assert rounds.ratios({0: 200.0, 1: 100.0, 2: 300.0}, {0: 100.0, 1: 50.0}) == [2.0, 2.0]
    assert rounds.ratios({0: 1.0}, {0: 0.0}) == []


def test_table_has_medians_and_ratios_to_the_base() -> None:
    runs = [run("vdusefast", 0, 300), run("vdusefast", 1, 100), run("qsd", 0, 100), run("qsd", 1, 100)]
    ours, theirs = rounds.table(runs, ["j", "never ran"], ["vdusefast", "qsd"], "vdusefast")
    assert (ours["peer"], ours["iops"], ours["ratio"], ours["rounds"]) == ("vdusefast", 200, None, 2)
    assert (theirs["peer"], theirs["ratio"], theirs["ratio_spread"], theirs["ratio_min"]) == ("qsd", 2.0, 0.5, 1.0)
    assert theirs["clat_p99_ns"] == 10000


def test_standard_jobs_are_the_eight() -> None:
    jobs = standard_jobs()
    assert len({job.name for job in jobs}) == 8
    assert {(job.rw, job.iodepth, job.numjobs, job.bs) for job in jobs} == {
        (rw, iodepth, numjobs, 4096) for rw in ("randread", "randwrite") for iodepth in (1, 32) for numjobs in (1, 2)
    }


# -- options


def test_job_of_ones_own() -> None:
    job = parse_job("rw=randrw rwmixread=70 bs=8k iodepth=16 numjobs=2")
    assert (job.rw, job.bs, job.iodepth, job.numjobs) == ("randrw", 8192, 16, 2)
    assert job.name == "randrw 70% 8k qd16 x2"
    assert parse_job(peers_vm.job_text(job)) == job


def test_a_buffered_job_writes_all_once_until_it_is_on_the_device() -> None:
    job = parse_job("rw=write bs=1M iodepth=1 numjobs=1 direct=0")
    assert job.buffered
    assert job.name == "write 1024k buffered x1"
    assert parse_job(peers_vm.job_text(job)) == job
    options: dict[str, Any] = {"engine": "libaio", "cpus": [], "size_bytes": 64 * MIB, "runtime_s": 2.0, "ramp_s": 0.3}
    arguments = measure_arguments("fio", "/dev/x", job, direct=False, **options)
    assert {"--direct=0", "--ioengine=psync", "--end_fsync=1", f"--size={64 * MIB}"} <= set(arguments)
    assert not any(word.startswith(("--time_based", "--runtime", "--ramp_time")) for word in arguments)


def test_the_limit_of_dirty_pages_is_put_back(tmp_path: Path) -> None:
    before = {"dirty_background_bytes": "0", "dirty_bytes": "0", "dirty_background_ratio": "10", "dirty_ratio": "20"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with dirty_pages.limited(False, tmp_path):
        assert (tmp_path / "dirty_bytes").read_text() == "0"
    with dirty_pages.limited(True, tmp_path):
        assert (tmp_path / "dirty_bytes").read_text() == str(dirty_pages.LIMIT_BYTES)
    assert [(tmp_path / name).read_text() for name in ("dirty_background_ratio", "dirty_ratio")] == ["10", "20"]


def test_buffered_writes_have_a_goal() -> None:
    runs = [
        run(peer, 0, iops) | {"job": "write 1024k buffered x1"} for peer, iops in (("vdusefast", 95), ("loop", 100))
    ]
    rows = rounds.table(runs, ["write 1024k buffered x1"], ["vdusefast", "loop"], "vdusefast")
    table = goals_table(rows, [], "vdusefast", counted=False)
    assert table is not None
    assert table[1] == [("buffered writes / loop (write 1024k buffered x1)", "0.95", "0.9", "1", "reached")]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"jobs": ("rw=randread verify=crc32c",)}, "only reads and writes are timed"),
        ({"jobs": ("rw=randtrim",)}, "only reads and writes are timed"),
        ({"jobs": ("rw=read runtime=3",)}, "--runtime and --ramp"),
        ({"jobs": ("rw=read queues=3",)}, "one job's own options"),
        ({"jobs": ("rw=sideways",)}, "'sideways' is not one of"),
        (
            {"peers": "vdusefast,nosuch"},
            "no such peer; there are vdusefast, qsd, loop, qemu-nbd, nbdkit, vdusefast-nbd, ublk, null_blk",
        ),
        ({"peers": ","}, "no such peer"),
        ({"icount": True}, "--vm 6.12 or --vm 7.3"),
        ({"size": "1M"}, "at least 4"),
        ({"size": "5000000"}, "whole number of MiB"),
        ({"runtime": "soon"}, "--runtime: 'soon' is not a time"),
        ({"runtime": "0"}, "--runtime: it must be more than 0"),
    ],
)
def test_options_that_are_refused(changed: Json, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as raised:
        command(**changed)
    assert message in str(raised.value)


def test_only_root_can_run_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(KernelSupportError, match="root"):
        command()


def test_output_that_cannot_be_written_is_refused_first() -> None:
    with pytest.raises(ConfigError, match="--json /nonexistent/x: cannot write into /nonexistent"):
        peers.check_outputs(PeersOptions(jobs=(), json=Path("/nonexistent/x")))
    with pytest.raises(ConfigError, match="--driver-cpus: CPU 4095 does not exist"):
        peers.check_outputs(PeersOptions(jobs=(), driver_cpus="4095"))


def test_files_need_room_and_a_directory(tmp_path: Path) -> None:
    with peers_files.backing_directory(tmp_path, 4 * MIB, 2) as directory:
        assert directory.parent == tmp_path
        (directory / "left").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ConfigError, match="no such directory"),
        peers_files.backing_directory(tmp_path / "no", 4 * MIB, 1),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="free for the peers' files"),
        peers_files.backing_directory(tmp_path, 1 << 60, 1),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="no tmpfs has"),
        peers_files.backing_directory(None, 1 << 60, 1),
    ):
        pass


def test_file_system_of_a_path() -> None:
    assert peers_files.file_system(Path("/proc/self")) == "proc"


# -- a session with peers that are plain files


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(os, "O_DIRECT", 0)
    monkeypatch.setattr("vdusefast.bench.common.block_node.wait_for", lambda node, size_bytes, timeout_s: None)
    monkeypatch.setattr(FilePeer, "log", [])
    files = tmp_path / "files"
    files.mkdir()
    fio = fake_fio.install(tmp_path)
    options = PeersOptions(
        jobs=standard_jobs()[:2], runtime_s=0.1, ramp_s=0.0, rounds=2, size_bytes=4 * MIB, driver_cpus="0", queues=1
    )
    with StopSignals() as signals, Awake(False) as awake:
        yield Session(options, str(fio), "libaio", files, signals, awake)


def calls(tmp_path: Path) -> list[str]:
    """Return the node of each call of fio, or "check", in order."""
    lines = (tmp_path / "fio-calls").read_text().splitlines()
    return [
        "check" if "--verify=crc32c" in line else Path(line.split("--filename=")[1].split()[0]).stem for line in lines
    ]


def test_session_interleaves_and_removes_everything(session: Session, tmp_path: Path) -> None:
    report = session.run([A, B, C], {"ublk": "not installed"})
    assert calls(tmp_path) == [*["check"] * 3, *"abc", *"bca", *"bca", *"cab"]
    assert FilePeer.log == ["start a", "start b", "start c", "stop c", "stop b", "stop a"]
    assert len(report["runs"]) == 12
    assert report["failed"] == []
    assert report["not_run"] == [{"name": "ublk", "reason": "not installed"}]
    assert all(peer["checked"] for peer in report["peers"])
    text = method_text(report)
    assert "2 rounds of 0.1 s" in text
    assert "fio on CPU 0" in text
    line = (tmp_path / "fio-calls").read_text().splitlines()[3]
    assert "--rw=randread --bs=4096 --iodepth=1 --numjobs=1" in line
    assert "--direct=1" in line


def test_peer_with_wrong_data_is_not_timed(session: Session, tmp_path: Path) -> None:
    def spoil(peer: FilePeer) -> None:
        if peer.name == "b":
            other = peer.setup.path.with_name("other")
            data_check.make_file(other, peer.setup.size_bytes, 99)
            peer.setup.path.rename(peer.setup.path.with_name("real"))
            other.rename(peer.setup.path)
            object.__setattr__(peer.setup, "path", peer.setup.path.with_name("real"))

    class Spoiled(B):
        def _start(self) -> str:
            node = super()._start()
            spoil(self)
            return node

    report = session.run([A, Spoiled], {})
    assert [failed["peer"] for failed in report["failed"]] == ["b"]
    assert "differs from its file" in report["failed"][0]["reason"]
    assert {one["peer"] for one in report["runs"]} == {"a"}
    assert [peer["checked"] for peer in report["peers"]] == [True, False]
    assert FilePeer.log == ["start a", "start b", "stop b", "stop a"]


def test_peer_that_does_not_start_leaves_nothing_and_the_others_go_on(session: Session) -> None:
    class Broken(B):
        def _start(self) -> str:
            super()._start()
            raise OSError(5, "Input/output error")

    report = session.run([A, Broken, C], {})
    assert report["failed"] == [{"peer": "b", "job": "", "reason": "b: cannot be started: Input/output error"}]
    assert FilePeer.log == ["start a", "start b", "stop b", "start c", "stop c", "stop a"]
    assert {one["peer"] for one in report["runs"]} == {"a", "c"}


def test_failing_fio_costs_one_peer(session: Session, tmp_path: Path) -> None:
    fake_fio.install(tmp_path, before='case "$*" in *b.img*time_based*) echo "fio: EIO"; exit 1;; esac')
    report = session.run([A, B], {})
    assert [(one["peer"], one["job"]) for one in report["failed"]] == [("b", "randread 4k qd1 x1")]
    assert "fio: EIO" in report["failed"][0]["reason"]
    assert FilePeer.log == ["start a", "start b", "stop b", "stop a"]
    assert len([one for one in report["runs"] if one["peer"] == "a"]) == 4


def test_fio_without_a_request_is_no_measurement(session: Session, tmp_path: Path) -> None:
    fake_fio.install(tmp_path, [fake_fio.job()])
    report = session.run([A], {})
    assert "finished no request" in report["failed"][0]["reason"]
    assert report["runs"] == []


def test_stuck_fio_goes_after_its_device(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Fio:
        def reap(self, _timeout_s: float) -> None:
            order.append("reap")

    def stuck(*_arguments: object, **_options: object) -> None:
        raise FioStuckError("fio is stuck", Fio())  # type: ignore[arg-type]

    monkeypatch.setattr(peers, "run_fio", stuck)
    monkeypatch.setattr(A, "stop", lambda self, *, force=False: order.append(f"stop {force}"), raising=False)
    report = session.run([A], {})
    assert order[:2] == ["stop True", "reap"]
    assert report["failed"][0]["reason"] == "fio is stuck"


def test_signal_ends_it_with_what_there_is(session: Session, tmp_path: Path) -> None:
    fake_fio.install(
        tmp_path, before=f'[ "$(wc -l < {tmp_path}/fio-calls)" -lt 5 ] || {{ kill -INT $PPID; sleep 60; }}'
    )
    report = session.run([A, B], {})
    assert report["stopped_by"] == "SIGINT"
    assert len(report["runs"]) == 2
    assert report["failed"] == []
    assert FilePeer.log == ["start a", "start b", "stop b", "stop a"]
    assert any("stopped early by SIGINT" in line for line in notes(report))


def test_removal_that_fails_is_reported_and_the_others_are_removed(session: Session) -> None:
    def fail() -> None:
        raise VdusefastError("will not go")

    class Sticky(B):
        def _start(self) -> str:
            node = super()._start()
            self._stack.callback(fail)
            return node

    report = session.run([A, Sticky], {})
    assert report["failed"] == [{"peer": "b", "job": "its removal", "reason": "will not go"}]
    assert FilePeer.log[-2:] == ["stop b", "stop a"]


def test_data_that_was_right_only_before_the_timing_is_noticed(session: Session, tmp_path: Path) -> None:
    class Rotting(A):
        def _start(self) -> str:
            super()._start()
            node = self.setup.path.with_name("node")
            node.hardlink_to(self.setup.path)
            return str(node)

        def check(self) -> None:
            if not (tmp_path / "rotten").exists():
                return
            node = Path(self.node)
            if node.samefile(self.setup.path):
                content = node.read_bytes()
                node.unlink()
                node.write_bytes(content[:-1] + b"\0")

    fake_fio.install(tmp_path, before=f'case "$*" in *time_based*) : > {tmp_path}/rotten; sleep 0.3;; esac')
    report = session.run([Rotting], {})
    assert report["failed"][0]["job"] == "the check after the last job"
    assert f"byte {4 * MIB - 4096}" in report["failed"][0]["reason"]


def test_peers_rest_unless_they_are_timed_or_checked(session: Session) -> None:
    awake: set[str] = set()
    seen: list[set[str]] = []

    class Restless(A):
        def rest(self) -> None:
            awake.discard(self.name)

        def wake(self) -> None:
            awake.add(self.name)

        def counters(self) -> dict[str, int]:
            seen.append(set(awake))
            return {"requests": len(seen)}

    class Other(Restless):
        name = "b"

    report = session.run([Restless, Other], {})
    assert report["failed"] == []
    assert {frozenset(one) for one in seen} == {frozenset({"a"}), frozenset({"b"})}
    assert [one["counted"] for one in report["runs"]] == [{"requests": 1}] * len(report["runs"])
