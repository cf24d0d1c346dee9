"""The loop that runs fio-like jobs, against a device in pure Python: what it sends, and what it notices."""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from driver_device import DISCARD, FLUSH, FORMATS, IN, OUT, FakeBus

from vdusefast.bench.raw.memory import Workload, make_job
from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver

SIZE = 256 * 1024


@pytest.fixture(params=FORMATS)
def bus(request: pytest.FixtureRequest) -> Iterator[FakeBus]:
    bus = FakeBus(SIZE, more=FORMATS[request.param])
    yield bus
    bus.close()


def load_of(plan: dict[str, Any], *, depth: int = 8) -> Workload:
    return Workload(**{"block_bytes": 4096, "depth": depth, "size_bytes": SIZE, **plan})


def run(
    bus: FakeBus, *plans: dict[str, Any], spin_us: float = 0.0, stall_s: float = 10.0, forget: int = 0
) -> list[_driver.JobResults]:
    """Run the jobs together in one thread and return their results."""
    with LoopbackDriver(bus) as driver:
        rings = [driver.ring(i) for i in range(driver.queue_count)]
        jobs = [make_job(driver, load_of(plan)) for plan in plans]
        if forget:
            jobs[0].forget(0, forget)
        _driver.DriverThread(rings, jobs, spin_us=spin_us, stall_s=stall_s).run()
        return [job.results() for job in jobs]


@pytest.mark.parametrize("kind", ["read", "write", "trim"])
@pytest.mark.parametrize("order", ["sequential", "random_once"])
def test_each_block_once(bus: FakeBus, kind: str, order: str) -> None:
    (result,) = run(bus, {"kind": kind, "order": order})
    types = {"read": IN, "write": OUT, "trim": DISCARD}
    assert {entry[1] for entry in bus.log} == {types[kind]}
    assert sorted(entry[2] for entry in bus.log) == ([0] * 64 if kind == "trim" else list(range(0, 512, 8)))
    assert result["ops"][kind]["ios"] == 64
    assert result["ops"][kind]["bytes"] == SIZE
    assert result["request_errors"] == 0
    assert 0 < result["ops"][kind]["lat_min_ns"] <= result["ops"][kind]["lat_max_ns"]


@pytest.mark.parametrize("spin_us", [0.0, 50.0])
def test_verified_write_reads_everything_back(bus: FakeBus, spin_us: float) -> None:
    plan = {"kind": "write", "order": "random_once", "verify": "crc32c", "check_after": True, "seed": 5}
    (result,) = run(bus, plan, spin_us=spin_us)
    assert result["verified"] == result["ops"]["check"]["ios"] == 64
    assert result["verify_errors"] == 0
    assert all(_driver.check_block(bus.disk[at : at + 4096], at, 0, 5) == "none" for at in range(0, SIZE, 4096))


def test_mix_verifies_reads_at_once_and_at_the_end(bus: FakeBus) -> None:
    plan = {"kind": "mixed", "order": "random_once", "verify": "crc32c", "check_after": True, "io_limit": 500}
    (result,) = run(bus, plan)
    assert result["ops"]["read"]["ios"] + result["ops"]["write"]["ios"] == 500
    assert result["verified"] > result["ops"]["check"]["ios"] > 0
    assert result["verify_errors"] == result["request_errors"] == 0


def test_no_two_requests_to_one_block_at_once(bus: FakeBus) -> None:
    plan = {"kind": "mixed", "order": "random", "verify": "crc32c", "check_after": True, "io_limit": 300}
    (result,) = run(bus, plan | {"size_bytes": 3 * 4096})
    assert result["verify_errors"] == 0


def test_lost_write_is_found(bus: FakeBus) -> None:
    bus.disk[:] = bytes(SIZE)
    bus.spoil = lambda kind, sector, data: b"" if (kind, sector) == (OUT, 16) else data
    plan = {"kind": "write", "order": "sequential", "verify": "crc32c", "check_after": True}
    (result,) = run(bus, plan)
    assert result["verify_errors"] == 1
    (fault,) = result["faults"]
    assert (fault["kind"], fault["offset_bytes"], fault["block"]) == ("no_header", 8192, 2)


def test_stale_write_is_found_by_its_generation(bus: FakeBus) -> None:
    seen: set[int] = set()

    def lose_second_write(kind: int, sector: int, data: bytes) -> bytes:
        if kind == OUT and sector == 8 and sector in seen:
            return b""
        if kind == OUT:
            seen.add(sector)
        return data

    bus.spoil = lose_second_write
    plan = {"kind": "write", "order": "sequential", "verify": "crc32c", "check_after": True, "io_limit": 128}
    (result,) = run(bus, plan)
    (fault,) = result["faults"]
    assert fault["kind"] == "generation"
    assert fault["expected"] != fault["found"]


def test_flipped_bit_and_misplaced_block_are_found(bus: FakeBus) -> None:
    def spoil(kind: int, sector: int, data: bytes) -> bytes:
        if kind == IN and sector == 0:
            return data[:100] + bytes([data[100] ^ 4]) + data[101:]
        if kind == IN and sector == 8:
            return bytes(bus.disk[8192:12288])
        return data

    bus.spoil = spoil
    (result,) = run(bus, {"kind": "write", "order": "sequential", "verify": "crc32c", "check_after": True})
    assert sorted(fault["kind"] for fault in result["faults"]) == ["checksum", "offset"]


def test_pattern(bus: FakeBus) -> None:
    pattern = b"abcd" * 1024
    plan = {"kind": "write", "order": "random_once", "verify": "pattern", "pattern": pattern, "check_after": True}
    (result,) = run(bus, plan)
    assert result["verified"] == 64
    assert bytes(bus.disk) == pattern * 64


def test_pattern_error_says_where(bus: FakeBus) -> None:
    bus.disk[:] = b"abcd" * (SIZE // 4)
    bus.disk[4096 + 7] = 0
    plan = {"kind": "read", "order": "sequential", "verify": "pattern", "pattern": b"abcd" * 1024}
    (result,) = run(bus, plan)
    (fault,) = result["faults"]
    assert (fault["where"], fault["expected"], fault["found"]) == (7, ord("d"), 0)


def test_reading_job_checks_what_an_earlier_one_wrote(bus: FakeBus) -> None:
    for at in range(0, SIZE, 4096):
        _driver.fill_block(memoryview(bus.disk)[at : at + 4096], at, 3, 9)
    bus.disk[8192] ^= 1
    plan = {"kind": "read", "order": "random_once", "verify": "crc32c"}
    (result,) = run(bus, plan)
    assert result["verified"] == 64
    assert [fault["offset_bytes"] for fault in result["faults"]] == [8192]


def test_forgotten_blocks_may_hold_anything(bus: FakeBus) -> None:
    for at in range(8192, SIZE, 4096):
        _driver.fill_block(memoryview(bus.disk)[at : at + 4096], at, 3, 9)
    (result,) = run(bus, {"kind": "read", "order": "sequential", "verify": "crc32c"}, forget=2)
    assert result["verified"] == 62
    assert result["verify_errors"] == 0


def test_failed_requests_are_counted_and_the_run_goes_on(bus: FakeBus) -> None:
    bus.spoil = lambda _kind, sector, data: None if sector == 24 else data
    (result,) = run(bus, {"kind": "write", "order": "sequential", "verify": "crc32c", "check_after": True})
    assert result["request_errors"] == 1
    assert result["verify_errors"] == 0
    assert result["verified"] == 63
    assert result["faults"][0] | {"found": 1, "kind": "status", "op": "write"} == result["faults"][0]


def test_wrong_used_length_is_an_error(bus: FakeBus) -> None:
    bus.lie_about_length = 1
    (result,) = run(bus, {"kind": "read", "order": "sequential"})
    assert result["request_errors"] == 64
    assert result["faults"][0]["kind"] == "used_len"
    assert len(result["faults"]) == 16


def test_fsync_flushes_after_every_n_writes(bus: FakeBus) -> None:
    (result,) = run(bus, {"kind": "write", "order": "sequential", "fsync_every": 4})
    assert result["ops"]["sync"]["ios"] == 16
    assert sum(1 for entry in bus.log if entry[1] == FLUSH) == 16


def test_one_job_uses_both_queues() -> None:
    bus = FakeBus(SIZE, queues=2)
    run(bus, {"kind": "read", "order": "sequential"})
    bus.close()
    assert [sum(1 for entry in bus.log if entry[0] == q) for q in (0, 1)] == [32, 32]


def test_jobs_share_a_thread(bus: FakeBus) -> None:
    slices = [{"offset_bytes": i * SIZE // 4, "size_bytes": SIZE // 4, "seed": i + 1} for i in range(4)]
    plans = [{"kind": "write", "order": "random_once", "verify": "crc32c", "check_after": True} | s for s in slices]
    results = run(bus, *plans)
    assert [r["verified"] for r in results] == [16] * 4


def test_depth_beyond_the_ring_and_large_blocks() -> None:
    bus = FakeBus(1 << 20, queue_size=16, size_max=4096)
    plan = {"block_bytes": 65536, "depth": 32, "size_bytes": 1 << 20, "verify": "crc32c", "check_after": True}
    (result,) = run(bus, {"kind": "write", "order": "sequential", **plan})
    bus.close()
    assert result["verified"] == 16
    assert {entry[3] for entry in bus.log} == {16}


@pytest.mark.slow
def test_time_based_run_ends_in_time_and_ramp_is_not_counted(bus: FakeBus) -> None:
    plan = {"kind": "read", "order": "random_once", "io_limit": 0, "runtime_s": 0.2, "ramp_s": 0.2}
    (result,) = run(bus, plan)
    assert 0.15e9 < result["run_ns"] < 2e9
    assert 0 < result["ops"]["read"]["ios"] < len(bus.log)


def test_mute_device_ends_with_an_error_that_names_the_queue(bus: FakeBus) -> None:
    bus.mute = True
    with pytest.raises(OSError, match="queue 0") as raised:
        run(bus, {"kind": "read", "order": "sequential"}, stall_s=0.1)
    assert raised.value.errno == errno.ETIMEDOUT


def test_no_load_follows_one_that_was_not_answered(bus: FakeBus) -> None:
    bus.mute = True
    with LoopbackDriver(bus) as driver:
        plan = {"kind": "read", "order": "random", "io_limit": 8}
        job = make_job(driver, load_of(plan, depth=4))
        for why in (errno.ETIMEDOUT, errno.EBUSY):
            with pytest.raises(OSError, match="queue 0") as raised:
                _driver.DriverThread([driver.ring(0)], [job], stall_s=0.1).run()
            assert raised.value.errno == why


@pytest.mark.parametrize("abandon", [False, True])
def test_stop_from_another_thread(bus: FakeBus, abandon: bool) -> None:
    with LoopbackDriver(bus) as driver:
        plan = {"kind": "write", "order": "random_once", "verify": "crc32c", "check_after": True, "io_limit": 0}
        job = make_job(driver, load_of(plan))
        thread = _driver.DriverThread([driver.ring(0)], [job])
        timer = threading.Timer(0.1, thread.stop, kwargs={"abandon": abandon})
        timer.start()
        if abandon:
            with pytest.raises(OSError, match="queue") as raised:
                thread.run()
            assert raised.value.errno == errno.ECANCELED
        else:
            thread.run()
            assert job.results()["ops"]["check"]["ios"] == 0
        timer.join()
        assert job.progress()[0] > 0


def many_times(bus: FakeBus, plan: dict[str, Any], count: int, *, between: Any = None) -> _driver.Job:
    """Run one job again and again and return it."""
    with LoopbackDriver(bus) as driver:
        job = make_job(driver, load_of(plan))
        for _ in range(count):
            _driver.DriverThread([driver.ring(0)], [job], stall_s=10.0).run()
            if between is not None:
                between(driver.ring(0), job)
        return job


REPEATED = {"kind": "write", "order": "random", "verify": "crc32c", "check_after": True, "io_limit": 20, "seed": 3}


def test_a_job_that_runs_again_still_knows_what_it_has_written(bus: FakeBus) -> None:
    job = many_times(bus, REPEATED, 5)
    results = job.results()
    assert results["ops"]["write"]["ios"] == 5 * 20
    assert results["verify_errors"] == 0
    known = [int.from_bytes(job.journal()[at : at + 4], "little") for at in range(0, 4 * 64, 4)]
    assert len({generation for generation in known if generation}) == sum(map(bool, known)) > 20
    assert max(known) == 100
    for block, generation in enumerate(known):
        at = block * 4096
        found = "no_header" if not generation else "none"
        assert _driver.check_block(bus.disk[at : at + 4096], at, generation, 3) == found


def test_what_goes_back_in_time_between_two_runs_is_found(bus: FakeBus) -> None:
    before: list[bytes] = []

    def go_back(_ring: _driver.Ring, job: _driver.Job) -> None:
        if len(before) == 1:
            bus.disk[:] = before[0]
        before.append(bytes(bus.disk))

    results = many_times(bus, REPEATED, 3, between=go_back).results()
    assert {fault["kind"] for fault in results["faults"]} <= {"generation", "no_header"}
    assert results["verify_errors"] > 0


def test_a_job_without_verification_has_no_journal(bus: FakeBus) -> None:
    assert many_times(bus, {"kind": "write", "order": "random", "io_limit": 5}, 1).journal() == b""


def test_overlapping_writes_expect_the_last_one(bus: FakeBus) -> None:
    plan = REPEATED | {"kind": "mixed", "overlap": True, "io_limit": 400}
    job = many_times(bus, plan, 3)
    results = job.results()
    assert results["verify_errors"] == results["request_errors"] == 0
    assert results["verified"] > 100
    sectors = [entry[2] for entry in bus.log if entry[1] == OUT]
    pairs = sum(one == other for one, other in itertools.pairwise(sectors))
    assert len(sectors) / 8 < pairs < len(sectors) / 2
    neighbours = sum(other == one + 8 for one, other in itertools.pairwise(sectors))
    assert len(sectors) / 16 < neighbours < len(sectors) / 2  # a device may merge these


def test_overlapping_writes_in_another_order_are_found(bus: FakeBus) -> None:
    """A device that carries the second one of a pair out first leaves the first one's data."""
    last: list[bytes] = []

    def swap(kind: int, sector: int, data: bytes) -> bytes:
        if kind != OUT:
            return data
        at = sector * 512
        last.append(bytes(bus.disk[at : at + len(data)]))
        held, generation = last[-1][16:20], int.from_bytes(data[16:20], "little")
        return last[-1] if int.from_bytes(held, "little") == generation - 1 else data

    bus.spoil = swap
    results = many_times(bus, REPEATED | {"overlap": True, "io_limit": 100}, 1).results()
    assert {fault["kind"] for fault in results["faults"]} == {"generation"}
    assert all(fault["found"] == fault["expected"] - 1 for fault in results["faults"])


def test_overlapping_writes_are_for_one_queue() -> None:
    bus = FakeBus(SIZE, queues=2)
    try:
        with LoopbackDriver(bus) as driver:
            job = make_job(driver, load_of(REPEATED | {"overlap": True}))
            with pytest.raises(ValueError, match="one queue only"):
                _driver.DriverThread([driver.ring(0), driver.ring(1)], [job])
    finally:
        bus.close()


def test_the_longest_gap_between_completions_is_kept_until_it_is_asked_for(bus: FakeBus) -> None:
    gaps: list[float] = []
    waits = iter([0.15])

    def slow_once(kind: int, sector: int, data: bytes) -> bytes:
        time.sleep(next(waits, 0))
        return data

    bus.spoil = slow_once
    many_times(bus, REPEATED, 2, between=lambda ring, _job: gaps.append(ring.take_gap_s()))
    assert 0.1 < gaps[0] < 5
    assert 0 < gaps[1] < gaps[0]
