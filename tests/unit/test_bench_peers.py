"""`bench peers`: order, medians and ratios, what is refused, and that nothing of a peer stays, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_fio
import psutil
import pytest

from vdusefast.bench import data_check, nbd, peer_kinds, peers, peers_options, peers_plot, peers_vm, rounds
from vdusefast.bench.awake import Awake
from vdusefast.bench.peer import Peer, PeerSetup, ServerProcess, first_line, run_tool
from vdusefast.bench.peers import PeersOptions, Session, parse_job, standard_jobs
from vdusefast.bench.peers_report import method_text, notes, print_peers, ratio_table
from vdusefast.bench.real_fio import FioStuckError
from vdusefast.errors import ConfigError, KernelSupportError, TimedOutError, VdusefastError
from vdusefast.signals import StopSignals
from vdusefast.transport import genl

MIB = 1 << 20
Json = dict[str, Any]


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


def run(peer: str, number: int, iops: float, job: str = "j") -> Json:
    return {"job": job, "peer": peer, "round": number, "iops": iops, "clat_mean_ns": 10.0, "clat_p99_ns": 100 * iops}


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


def command(**changed: Any) -> int:
    values: dict[str, Any] = dict.fromkeys(("peers", "runtime", "ramp", "rounds", "size", "backing", "queues"))
    values |= dict.fromkeys(("ioengine", "json_path", "plot", "vm"))
    values |= {"server_cpus": "", "driver_cpus": "", "note": "", "jobs": ()}
    values |= dict.fromkeys(("load_modules", "markdown", "icount", "keep_awake"), False)
    return peers_options.run_command(**(values | changed))


def test_job_of_ones_own() -> None:
    job = parse_job("rw=randrw rwmixread=70 bs=8k iodepth=16 numjobs=2")
    assert (job.rw, job.bs, job.iodepth, job.numjobs) == ("randrw", 8192, 16, 2)
    assert job.name == "randrw 70% 8k qd16 x2"
    assert parse_job(peers_vm.job_text(job)) == job


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
            "no such peer; there are vdusefast, qsd, loop, qemu-nbd, nbdkit, ublk, null_blk",
        ),
        ({"peers": ","}, "no such peer"),
        ({"icount": True}, "--vm 6.12 or --vm 7.3"),
        ({"size": "1M"}, "at least 4"),
        ({"size": "5000000"}, "whole number of MiB"),
        ({"runtime": "soon"}, "--runtime: 'soon' is not a time"),
        ({"runtime": "0"}, "--runtime: has to be more than 0"),
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
    options = PeersOptions(jobs=(), backing=tmp_path, size_bytes=4 * MIB)
    with peers.backing_directory(options, 2) as directory:
        assert directory.parent == tmp_path
        (directory / "left").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ConfigError, match="no such directory"),
        peers.backing_directory(replace(options, backing=tmp_path / "no"), 1),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="free for the peers' files"),
        peers.backing_directory(replace(options, size_bytes=1 << 60), 1),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="no tmpfs has"),
        peers.backing_directory(replace(options, backing=None, size_bytes=1 << 60), 1),
    ):
        pass


def test_file_system_of_a_path() -> None:
    assert peers.file_system(Path("/proc/self")) == "proc"


# -- is the data right


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files stand in for devices where their file system has no O_DIRECT."""
    monkeypatch.setattr(os, "O_DIRECT", 0)


@pytest.mark.usefixtures("buffered")
def test_data_check_passes_what_is_right_and_leaves_it_so(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data_check.make_file(path, 2 * MIB, 1)
    before = path.read_bytes()
    assert len({before[at : at + 4096] for at in range(0, len(before), 4096)}) == 512
    data_check.compare(str(path), path, 2 * MIB)
    data_check.check_writes(str(path), path, 2 * MIB, 1)
    assert path.read_bytes() == before


@pytest.mark.usefixtures("buffered")
def test_data_check_finds_one_wrong_byte(tmp_path: Path) -> None:
    path, node = tmp_path / "f", tmp_path / "node"
    data_check.make_file(path, 2 * MIB, 1)
    content = bytearray(path.read_bytes())
    content[MIB + 3 * 4096 + 100] ^= 1
    node.write_bytes(content)
    with pytest.raises(data_check.DataError, match=f"read at byte {MIB + 3 * 4096} is not what its file holds"):
        data_check.compare(str(node), path, 2 * MIB)


@pytest.mark.usefixtures("buffered")
def test_data_check_finds_writes_that_do_not_arrive(tmp_path: Path) -> None:
    path, node = tmp_path / "f", tmp_path / "node"
    for each in (path, node):
        data_check.make_file(each, MIB, 1)
    with pytest.raises(data_check.DataError, match="flushed is not in its file"):
        data_check.check_writes(str(node), path, MIB, 1)


@pytest.mark.usefixtures("buffered")
def test_data_check_finds_a_device_that_is_too_short(tmp_path: Path) -> None:
    path, node = tmp_path / "f", tmp_path / "node"
    data_check.make_file(path, 2 * MIB, 1)
    data_check.make_file(node, MIB, 1)
    with pytest.raises(data_check.DataError, match="came up short"):
        data_check.compare(str(node), path, 2 * MIB)


# -- a session with peers that are plain files


class FilePeer(Peer):
    """A peer whose node is its file."""

    title = "a file"
    cache = "none"
    log: list[str] = []  # noqa: RUF012
    started: Callable[[FilePeer], None] | None = None

    @classmethod
    def missing_in_kernel(cls) -> str:
        return ""

    def _start(self) -> str:
        FilePeer.log.append(f"start {self.name}")
        self._stack.callback(FilePeer.log.append, f"stop {self.name}")
        if type(self).started is not None:
            type(self).started(self)  # type: ignore[misc]
        return str(self.setup.path)


class A(FilePeer):
    name = "a"


class B(FilePeer):
    name = "b"


class C(FilePeer):
    name = "c"


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(os, "O_DIRECT", 0)
    monkeypatch.setattr("vdusefast.bench.block_node.wait_for", lambda node, size_bytes, timeout_s: None)
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
    assert "is not what its file holds" in report["failed"][0]["reason"]
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

    def stuck(*_words: object, **_options: object) -> None:
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


# -- servers and tools


def setup_of(tmp_path: Path) -> PeerSetup:
    return PeerSetup(tmp_path / "f", 4 * MIB, 2, (), tmp_path, "tag")


def test_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    server = ServerProcess("kind", ["sh", "-c", "echo first; echo last words; exit 3"], tmp_path / "log")
    with pytest.raises(VdusefastError, match="kind ended with status 3: last words"):
        server.wait_for("socket", lambda: None)
    server.end()


def test_server_that_is_never_ready_and_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdusefast.bench.peer.END_S", 0.2)
    words = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"]
    server = ServerProcess("kind", words, tmp_path / "log")
    server.wait_for("word", lambda: "ready" in (tmp_path / "log").read_text())
    with pytest.raises(TimedOutError, match=r"kind: no socket after 0\.1 s: ready"):
        server.wait_for("socket", lambda: None, 0.1)
    server.end()
    assert server.process.returncode == -signal.SIGKILL
    server.end()


def test_death_of_a_server_ends_the_wait_for_fio(tmp_path: Path) -> None:
    peer = A(setup_of(tmp_path))
    server = peer.serve(["sh", "-c", "exit 4"])
    server.process.wait()
    with pytest.raises(VdusefastError, match="sh ended with status 4"):
        peer.check()
    peer.stop()


def test_servers_are_pinned_where_that_is_asked_for(tmp_path: Path) -> None:
    peer = A(replace(setup_of(tmp_path), cpus=(0,)))
    server = peer.serve(["sh", "-c", "grep Cpus_allowed_list /proc/self/status"])
    server.process.wait()
    peer.stop()
    assert server.said.split() == ["Cpus_allowed_list:", "0"]
    assert peer.commands == [["sh", "-c", "grep Cpus_allowed_list /proc/self/status"]]


def test_tool_that_fails_is_told_with_its_words() -> None:
    with pytest.raises(VdusefastError, match="status 2: cannot"):
        run_tool(["sh", "-c", "echo cannot >&2; exit 2"])
    with pytest.raises(VdusefastError, match="cannot be started"):
        run_tool(["/nonexistent/tool"])
    assert first_line(["/nonexistent/tool"]) == ""
    assert first_line(["sh", "-c", "echo one; echo two"]) == "one"


def test_peers_that_are_not_installed_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "apt-get install qemu-system-common" in peer_kinds.QemuStorageDaemon.missing()
    assert "apt-get install nbdkit" in peer_kinds.Nbdkit.missing()
    assert "no ublk server" in peer_kinds.Ublk.missing()


def test_ublk_server_is_added_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "ublk"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", fake_fio.first_on_path(tmp_path))
    monkeypatch.setattr("vdusefast.bench.block_node.wait_for", lambda node, size_bytes, timeout_s: None)
    monkeypatch.setattr(peer_kinds, "_free_number", lambda prefix: 7)
    peer = peer_kinds.Ublk(setup_of(tmp_path))
    peer.start()
    assert peer.node == "/dev/ublkb7"
    peer.stop()
    added, deleted = (tmp_path / "calls").read_text().splitlines()
    assert added == f"add -t loop -n 7 -q 2 -d 128 -f {tmp_path / 'f'}"
    assert deleted == "del -n 7"


# -- nbd


def serve_nbd(sock: socket.socket, answers: bytes, asked: list[bytes]) -> threading.Thread:
    def serve() -> None:
        sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        asked.append(sock.recv(4))
        asked.append(sock.recv(1024))
        sock.sendall(answers)
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def nbd_reply(kind: int, data: bytes) -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, 7, kind, len(data)) + data


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (nbd_reply(3, struct.pack(">HQH", 0, 64 * MIB, 0x103)) + nbd_reply(1, b""), ""),
        (nbd_reply((1 << 31) + 6, b"go away"), "refuses its export: go away"),
        (nbd_reply(1, b""), "did not say how large"),
        (b"\0" * 20, "makes no sense"),
        (b"", "hung up"),
    ],
    ids=["export", "refused", "no size", "nonsense", "closed"],
)
def test_nbd_handshake(answers: bytes, message: str) -> None:
    ours, theirs = socket.socketpair()
    asked: list[bytes] = []
    thread = serve_nbd(theirs, answers, asked)
    with ours:
        if message:
            with pytest.raises(VdusefastError, match=message):
                nbd.handshake(ours)
        else:
            assert nbd.handshake(ours) == nbd.Export(64 * MIB, 0x103)
            assert asked == [struct.pack(">I", 3), b"IHAVEOPT" + struct.pack(">IIIH", 7, 6, 0, 0)]
    thread.join()


def test_nbd_refuses_what_is_no_server() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"SSH-2.0-OpenSSH_9.2")
        with pytest.raises(VdusefastError, match="newstyle"):
            nbd.handshake(ours)


def test_nbd_attributes_are_aligned_and_nested() -> None:
    item = genl.attribute(nbd._SOCK_ITEM | genl.NESTED, nbd._u32(nbd._SOCK_FD, 5))
    packed = nbd._u64(nbd._ATTR_SIZE_BYTES, MIB) + genl.attribute(9, b"abc") + item
    assert len(packed) % 4 == 0
    found = genl._unpack(packed)
    assert found == {nbd._ATTR_SIZE_BYTES: MIB.to_bytes(8, "little"), 9: b"abc", nbd._SOCK_ITEM: nbd._u32(1, 5)}


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


def test_report_without_us_has_no_ratios() -> None:
    report = sample()
    report["table"] = rounds.table([run("qsd", 0, 5)], ["j"], ["qsd"], "vdusefast")
    assert ratio_table(report) is None


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
    assert "--icount" not in boot
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
    assert command(vm="7.3", icount=True, rounds=2, jobs=("rw=randread",), json_path=saved) == 0
    assert "4.00 ±0 %" in capsys.readouterr().out
    boots = (tmp_path / "boots").read_text().splitlines()
    assert len(boots) == 4
    assert all("--icount" in boot and "--keep-awake" in boot and "--rounds=1" in boot for boot in boots)
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
    with Awake(True) as awake:
        (child,) = psutil.Process().children()
        assert os.sched_getscheduler(child.pid) == os.SCHED_IDLE
        with awake.paused():
            wait_until(lambda: child.status() == psutil.STATUS_STOPPED)
        wait_until(lambda: child.status() == psutil.STATUS_RUNNING)
    assert not psutil.pid_exists(child.pid)
    with Awake(False) as awake, awake.paused():
        assert psutil.Process().children() == []
