"""The parts of the torture suite: options, kills and their times, findings, and the report."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from vdusefast.api import Device
from vdusefast.bench.__main__ import main
from vdusefast.bench.torture.command import run_torture
from vdusefast.bench.torture.disk import DiskLoad
from vdusefast.bench.torture.leaks import Leaks
from vdusefast.bench.torture.load import DriverLoad, Lost, compare_block
from vdusefast.bench.torture.loopback_host import LoopbackHost
from vdusefast.bench.torture.plan import (
    KILLS,
    KINDS,
    STALL_MAX_S,
    STALL_MIN_S,
    Blow,
    TortureOptions,
    blows,
    parse_kills,
)
from vdusefast.bench.torture.report import Findings, as_json, as_text, percentile
from vdusefast.bench.torture.server import LoopbackServer, ServerError, TorturedServer
from vdusefast.config import make_config
from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import ConfigError

MIB = 1 << 20


# -- what is asked for


def test_kills_are_counted_by_kind() -> None:
    assert parse_kills("worker=3, stall=1") == {"worker": 3, "stall": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("workers=3", "'workers=3' is not KIND=COUNT"),
        ("worker", "'worker' is not"),
        ("worker=-1", "is not KIND=COUNT"),
        ("worker=1,worker=2", "given twice"),
        ("worker=0", "nothing is to be killed"),
    ],
)
def test_kills_that_make_no_sense_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_kills(text)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--backend", "null:1G"], "the store must keep its data"),
        (["--json", "/no/such/directory/x"], "there is no directory"),
        (["--size", "4K"], "at least"),
        (["--duration", "0"], "more than 0"),
        (["--give-up", "soon"], "--give-up: 'soon' is not a time"),
        (["--load", "0s"], "more than 0"),
        (["--kills", "relay=1"], "--kills relay: a device with this store and these queues has none: leave it out"),
        (["--backend", "memory:8M"], "leave out group and restart and supervisor"),
    ],
)
def test_options_that_make_no_sense_are_refused(words: list[str], says: str) -> None:
    done = CliRunner().invoke(main, ["torture", *words])
    assert done.exit_code == 2
    assert says in done.output


def test_area_is_what_was_asked_for_or_what_there_is() -> None:
    assert TortureOptions().area_bytes(1 << 40) == 8 * MIB
    assert TortureOptions().area_bytes(2 * MIB) == 2 * MIB
    assert TortureOptions(size_bytes=3 * MIB).area_bytes(4 * MIB) == 3 * MIB


# -- what is struck when


def test_blows_are_those_asked_for_in_an_order_that_the_seed_decides() -> None:
    kills = dict.fromkeys((*KILLS, "keeper"), 50) | {"stall": 30, "restart": 5, "resize": 5, "fail": 5}

    def made(seed: int) -> list[Blow]:
        return list(blows(kills, random.Random(seed), 3, 0.1, for_ever=False))

    first = made(1)
    assert {kind: sum(blow.kind == kind for blow in first) for kind in KINDS} == kills
    assert first == made(1)
    assert first != made(2)
    assert {blow.queue for blow in first} == {0, 1, 2}
    assert all(0 <= blow.delay_s <= 0.1 for blow in first)
    stalls = [blow for blow in first if blow.kind == "stall"]
    assert all(STALL_MIN_S <= blow.stall_s <= STALL_MAX_S and blow.again_s < 0 for blow in stalls)
    assert {blow.title for blow in stalls} == {"stall of a worker", "stall of the supervisor"}
    again = [blow for blow in first if blow.again_s >= 0]
    assert 0 < len(again) < len(first) / 3
    assert {blow.title for blow in again} == {f"{kind}, again while it recovers" for kind in KILLS}


def test_blows_go_on_for_ever_when_there_is_time() -> None:
    order = blows({"worker": 2}, random.Random(1), 1, 0.1, for_ever=True)
    assert sum(next(order).kind == "worker" for _ in range(7)) == 7


# -- what is found


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store.img"
    path.touch()
    os.truncate(path, MIB)
    return path


@pytest.fixture
def load(store: Path) -> Iterator[DriverLoad]:
    config = make_config(name="t0", uri=f"file:{store}", queues=2, queue_size=64)
    with Device(config) as device:
        made = DriverLoad(
            device.driver(),
            area_bytes=MIB,
            block_bytes=4096,
            depth=8,
            run_s=0.05,
            seed=1,
            overlap=True,
            give_up_s=10,
        )
        yield made
        made.close()


def test_a_load_in_peace_finds_nothing(load: DriverLoad, store: Path) -> None:
    load.forget_gaps()
    assert load.begin().finish() == []
    assert load.new_faults() == []
    assert load.check_store(store)[1] == []
    counts = load.counts()
    assert all(counts[name] > 0 for name in ("writes", "reads", "flushes", "verified"))
    pause_s, others_s = load.gaps_s(0)
    assert 0 < pause_s < 10
    assert others_s is not None
    assert load.gaps_s(None) == (0.0, None)  # begun again


def test_what_a_cycle_has_written_is_known_to_the_next(load: DriverLoad, store: Path) -> None:
    load.begin().finish()
    count, _lost = load.check_store(store)
    for _ in range(3):
        load.begin().finish()
    assert load.check_store(store)[0] >= count > 0
    assert load.new_faults() == []


def lose(store: Path, load: DriverLoad) -> None:
    """Bring every block of the device back to what it was before a cycle."""
    before = store.read_bytes()
    load.begin().finish()
    store.write_bytes(before)


def test_blocks_that_go_back_in_time_are_found_on_both_sides(load: DriverLoad, store: Path) -> None:
    load.begin().finish()
    assert load.new_faults() == []
    lose(store, load)
    in_store = load.check_store(store)[1]
    assert in_store
    assert all(one.where == "store" and one.found < one.expected for one in in_store if one.what == "generation")
    load.begin().finish()
    seen = load.new_faults()
    assert {one.what for one in seen} & {"generation", "no_header"}
    assert all(one.where == "driver" for one in seen)
    assert load.new_faults() == []


@pytest.mark.slow
def test_errors_are_found_unless_the_store_was_made_to_fail(store: Path, tmp_path: Path) -> None:
    with LoopbackHost(tmp_path / "bus") as host:
        config = make_config(name="t3", uri=f"file:{store}", queues=1, queue_size=64)
        with LoopbackServer(config, host.path, tmp_path, msg_timeout_s=90) as server:
            server.start(recover=False)
            server.wait_ready()
            load = DriverLoad(
                LoopbackDriver(host.bus),
                area_bytes=MIB,
                block_bytes=4096,
                depth=8,
                run_s=0.1,
                seed=1,
                overlap=True,
                give_up_s=10,
            )
            for expected in (False, True):
                cycle = load.begin()
                server.fail_store(0.05)
                assert cycle.finish() == []
                found = load.new_faults(errors_expected=expected)
                assert {one.what for one in found} == (set() if expected else {"status", "more"})
                assert load.check_store(store)[1] == []
            load.begin().finish()
            assert load.new_faults() == []  # writes succeed again
            load.close()
            server.stop()


def test_a_device_that_does_not_answer_is_found(store: Path, tmp_path: Path) -> None:
    with LoopbackHost(tmp_path / "bus") as host:
        config = make_config(name="t1", uri=f"file:{store}", queues=1, queue_size=64)
        with LoopbackServer(config, host.path, tmp_path, msg_timeout_s=90) as server:
            server.start(recover=False)
            server.wait_ready()
            load = DriverLoad(
                LoopbackDriver(host.bus),
                area_bytes=MIB,
                block_bytes=4096,
                depth=8,
                run_s=0.3,
                seed=1,
                overlap=False,
                give_up_s=0.5,
            )
            cycle = load.begin()
            server.kill(with_workers=True)
            assert [one.what for one in cycle.finish()] == ["unanswered"]
            assert server.worker_pids() == [0]
            host.close()
            load.close()


def test_a_server_that_does_not_serve_says_why(store: Path, tmp_path: Path) -> None:
    with LoopbackHost(tmp_path / "bus") as host:
        config = make_config(name="t2", uri=f"file:{store}.gone", queues=1)
        with LoopbackServer(config, host.path, tmp_path, msg_timeout_s=90) as server:
            server.start(recover=False)
            with pytest.raises(ServerError, match=r"ended instead of serving: .*store.img.gone"):
                server.wait_ready()


def test_a_block_is_compared_with_the_journal() -> None:
    block = bytearray(4096)
    _driver.fill_block(block, 8192, 7, 1)
    assert compare_block(bytes(block), 8192, 7, 1, "store") == []
    (lost,) = compare_block(bytes(block), 8192, 9, 1, "store")
    assert str(lost) == "generation: block at byte 8192: expected 9, found in the store 7"


def test_disk_writers_prove_themselves_and_notice_old_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file in place of a disk: they do not depend on what the kernel does below it."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, MIB)
    monkeypatch.setattr("vdusefast.bench.common.block_node.size_bytes", lambda node: MIB)
    load = DiskLoad(str(path), TortureOptions(queues=1), 0.05)
    try:
        assert load.begin().finish() == []
        assert load.new_faults() == []
        assert load.gaps_s(0)[0] > 0
        count, lost = load.check_store(path)
        assert (count > 0, lost) == (True, [])
        before = path.read_bytes()
        load.begin().finish()
        path.write_bytes(before)
        assert load.check_store(path)[1]
        load.begin().finish()
        assert {one.what for one in load.new_faults()} & {"generation", "no_header"}
        assert all(load.counts()[name] > 0 for name in ("writes", "reads", "flushes", "verified"))
    finally:
        load.close()


def test_leaks_are_what_is_more_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdusefast.bench.torture.leaks.SETTLE_S", 0.05)
    leaks = Leaks()
    assert leaks.left() == []
    fd, end = os.eventfd(0), threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    found = leaks.left()
    os.close(fd)
    end.set()
    thread.join()
    assert [line.partition(":")[0] for line in found] == [
        "1 more descriptors of this process",
        "1 more threads of this process",
    ]
    assert leaks.left() == []


# -- the report


def findings() -> Findings:
    made = Findings("loopback", "sync", "file:x", "writeback", 2, 5)
    row = made.row("worker")
    row.pauses_s += [0.02, 0.03, 0.5]
    row.others_s += [0.001, 0.004, 0.002]
    made.cycles, made.starts, made.seconds = 3, 1, 2.0
    made.counts = {"writes": 2000, "reads": 10, "flushes": 7, "verified": 30}
    return made


def test_percentiles_are_values_that_were_measured() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.5, 0.99, 0)] == [2.0, 3.0, 1.0]
    assert percentile([], 0.5) == 0.0


def test_report_of_a_run_that_lost_nothing() -> None:
    text = as_text(findings())
    assert "worker" in text
    assert "30 ms" in text
    assert "500 ms" in text
    assert "nothing was lost" in text
    report = as_json(findings())
    assert report["passed"]
    assert report["rows"][0]["pause_s"] == {"p50": 0.03, "p99": 0.5, "max": 0.5}
    assert report["rows"][0]["others_s"]["max"] == 0.004
    json.dumps(report)


def test_report_names_what_was_lost_left_and_failed() -> None:
    made = findings()
    made.add_lost([Lost("generation", "driver", 4096, 9, 7), Lost("status", "driver", 0, 0, 1)], made.row("worker"))
    made.leaks.append("1 more descriptors of the server: 30, was 29")
    made.failures.append("the server has ended")
    text = as_text(made)
    assert "LOST generation: block at byte 4096: expected 9, read back 7" in text
    assert "LEFT 1 more descriptors" in text
    assert "FAILED the server has ended" in text
    assert "nothing was lost" not in text
    assert (made.row("worker").lost, made.row("worker").errors) == (1, 1)
    assert not as_json(made)["passed"]


def test_long_lists_of_losses_are_cut() -> None:
    made = findings()
    made.add_lost([Lost("generation", "driver", at, 2, 1) for at in range(50)])
    assert "LOST and 30 more" in as_text(made)


def test_exit_status_is_1_when_a_server_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stay_away(self: TorturedServer, again_s: float, *, with_workers: bool) -> None:
        raise ServerError("it stays away")

    monkeypatch.setattr(TorturedServer, "start_again", stay_away)
    report = tmp_path / "report.json"
    options = TortureOptions(transport="loopback", kills={"supervisor": 3}, size_bytes=MIB, json=report, give_up_s=5)
    assert run_torture(options) == 1
    assert "FAILED it stays away" in capsys.readouterr().out
    assert json.loads(report.read_text())["failures"] == ["it stays away"]


@pytest.mark.parametrize("kind", ["worker", "fail"])
def test_what_was_found_is_reported_even_when_the_suite_itself_fails(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stumble(*_: object) -> None:
        raise PermissionError("not expected")

    monkeypatch.setattr(TorturedServer, "kill_worker", stumble)
    monkeypatch.setattr(TorturedServer, "fail_store", stumble)
    report = tmp_path / "report.json"
    store = tmp_path / "store.img"
    store.write_bytes(bytes(MIB))
    options = TortureOptions(transport="loopback", kills={kind: 3}, backend=f"file:{store}", json=report, give_up_s=5)
    assert run_torture(options) == 1
    assert "FAILED the suite itself has failed: PermissionError: not expected" in capsys.readouterr().out
    assert json.loads(report.read_text())["starts"] == 1


def gone_pid() -> int:
    """Return the number of a process that has ended and was reaped."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return pid


def test_a_process_that_ends_before_it_is_killed_is_no_failure(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(name="t3", uri=f"file:{store}", queues=1)
    server = LoopbackServer(config, tmp_path / "bus", tmp_path, msg_timeout_s=90)
    gone, alive = gone_pid(), os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    pids = [gone, gone, alive]
    monkeypatch.setattr(server, "wait_worker", lambda *_: pids.pop(0))
    assert server.kill_worker(0) == alive
    assert os.waitpid(alive, 0)[1] == 9
    server.stall(gone, 0.0)
    monkeypatch.setattr(server, "worker_pids", lambda: [gone])
    server.fail_store(0.0)
    monkeypatch.setattr(server, "wait_worker", lambda *_: gone)
    with pytest.raises(ServerError, match="ended before they could be killed"):
        server.kill_worker(0)
