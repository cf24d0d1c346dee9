"""A class that hangs is named within 5 s, then at growing intervals; `timeout_s` ends its requests, or its process."""

from __future__ import annotations

import logging
import re
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from model import IOERR, OK
from python_rig import Memory, serve

import vdusefast
from vdusefast.api import Device
from vdusefast.errors import TimedOutError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]
DISKS = """
import asyncio, ctypes, os, sys, time
import vdusefast

class Disk(vdusefast.Backend):
    size_bytes = 1 << 20

class Sleeps(Disk):
    def pread(self, buffer, offset_bytes):
        time.sleep(100)

class Alone(Sleeps):
    shareable = False

class HoldsLock(Disk):
    def pread(self, buffer, offset_bytes):
        libc = ctypes.PyDLL(None)
        for _ in range(10):
            libc.sleep(100)  # with the interpreter's lock; a signal ends one of them

class Never(Disk):
    async def pread(self, buffer, offset_bytes):
        await asyncio.sleep(100)

class BlocksLoop(Disk):
    async def pread(self, buffer, offset_bytes):
        await asyncio.sleep(0)
        time.sleep(100)

class BatchSleeps(Disk):
    def submit(self, batch):
        time.sleep(100)

class BatchForgets(Disk):
    def submit(self, batch):
        self.batch = batch

class Swallows(Disk):
    def pread(self, buffer, offset_bytes):
        while True:
            try:
                time.sleep(100)
            except Exception:
                pass

class OpensSlowly(Disk):
    def open(self):
        if "probe" in " ".join(sys.orig_argv):
            time.sleep(5)

    def pread(self, buffer, offset_bytes):
        buffer[:] = bytes(len(buffer))
"""
READ = r": a read of 512 bytes at byte 4096; requests fail after 6 s \(backend.timeout_s\)"
NAMED = {
    "Sleeps": rf"device sleeps: queue 1: worker \(pid \d+\): python:.*:Sleeps: pread has not returned for 4 s{READ}",
    "Alone": rf"device alone: relay \(pid \d+\): queue 1: python:.*:Alone: pread has not returned for 4 s{READ}",
    "HoldsLock": rf"queue 1: worker \(pid \d+\): python:.*:HoldsLock: pread has not returned for 4 s{READ}",
    "Never": rf"queue 1: .*:Never: pread has not completed a request for 4 s{READ}",
    "BlocksLoop": rf"queue 1: .*:BlocksLoop: pread has not completed a request for 4 s{READ}",
    "BatchSleeps": rf"queue 1: .*:BatchSleeps: submit has not returned for 4 s{READ}",
    "BatchForgets": rf"queue 1: .*:BatchForgets: submit has not completed a request for 4 s{READ}",
}
PLACED = ("Sleeps", "Alone", "BlocksLoop", "BatchSleeps")  # with the line of the class, as its lock is free


def device_of(tmp_path: Path, disk: str, timeout_s: float) -> Device:
    uri = f"python:{tmp_path}/disks.py:{disk}"
    return Device(vdusefast.make_config(name=disk.lower(), uri=uri, queues=2, timeout_s=timeout_s))


@pytest.fixture(autouse=True)
def disks(tmp_path: Path) -> None:
    (tmp_path / "disks.py").write_text(DISKS)


def test_hang_is_named_within_5_s_and_ends_by_the_time_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of these classes at once, each with a device of its own."""
    caplog.set_level(logging.WARNING)
    took: dict[str, tuple[object, float]] = {}
    with ExitStack() as opened:
        drivers = {}
        for disk in NAMED:
            device = opened.enter_context(device_of(tmp_path, disk, 6))
            drivers[disk] = opened.enter_context(device.driver())

        def read(disk: str) -> None:
            began = time.monotonic()
            try:
                drivers[disk].read(4096, 512, queue=1)
            except (OSError, TimedOutError) as error:
                took[disk] = (error, time.monotonic() - began)

        threads = [threading.Thread(target=read, args=(disk,)) for disk in NAMED]
        began = time.time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    said = [(record.created - began, record.getMessage()) for record in caplog.records]
    for disk, pattern in NAMED.items():
        found = [after_s for after_s, text in said if re.search(pattern, text)]
        assert found, (disk, caplog.text)
        assert found[0] < 5 + 2  # the machine may be busy
        error, took_s = took[disk]
        assert "Input/output error" in str(error), (disk, error)
        assert 5.5 < took_s < 15, disk
    for disk in PLACED:
        assert any(
            re.search(r'disks.py", line \d+, in (pread|submit)', text) and disk.lower() in text for _, text in said
        )
    assert len(re.findall("Sleeps: pread raised TimeoutError", caplog.text)) == 1
    assert "CancelledError" not in caplog.text


def test_class_that_cannot_be_interrupted_is_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with device_of(tmp_path, "Swallows", 0.5) as device, device.driver() as driver:
        pid = device.queues()[0].pid

        def read() -> None:
            with suppress(OSError, TimedOutError):
                driver.read(0, 512)

        thread = threading.Thread(target=read)
        thread.start()
        deadline = time.monotonic() + 30
        while device.queues()[0].pid in (pid, -1):
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.1)
        assert f"worker (pid {pid}) ended with status 70" in caplog.text
        assert "cannot be interrupted; this process ends" in caplog.text
        thread.join(60)


def test_slow_open_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with device_of(tmp_path, "OpensSlowly", 0) as device, device.driver() as driver:
        assert driver.read(0, 512) == bytes(512)
    assert "has not answered for 4 s; it is killed after 30 s" in caplog.text
    assert re.search(r'disks.py", line \d+ in open', caplog.text)


def test_requests_that_are_late_before_their_turn_fail() -> None:
    """Each call takes longer than the time-out: those that wait for it are not called at all."""
    calls = []

    class Slow(Memory):
        def pread(self, buffer, offset_bytes):
            calls.append(offset_bytes)
            time.sleep(0.3)
            super().pread(buffer, offset_bytes)

    with serve(Slow(), timeout_s=0.2) as served:
        served.start_reads(4)
        served.rig.poll()
        answers = [served.answer(number)[0] for number in range(4)]
    assert answers == [OK, IOERR, IOERR, IOERR]
    assert calls == [0]


# -- when a hang is named, by a made-up clock


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hang_watch") / "program"
    sources = [ROOT / "csrc/python/hang_watch.c", Path(__file__).parent / "hang_watch.c"]
    words = ["cc", "-std=gnu11", "-g", "-fsanitize=address,undefined", f"-I{ROOT / 'csrc'}", "-o", path, *sources]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return path


def events(program: Path, what: str) -> list[tuple[str, dict[str, float]]]:
    """Return (event, fields) for each one."""
    done = subprocess.run([program, what], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(name, {key: float(value) for key, value in (one.split("=") for one in rest)}) for name, *rest in lines]


def test_request_is_named_at_intervals_that_double_up_to_an_hour(program: Path) -> None:
    found = events(program, "forever")
    assert {name for name, _ in found} == {"named"}
    at = [fields["at"] for _, fields in found]
    assert at[0] <= 4.8
    gaps = [b - a for a, b in pairwise(at)]
    assert [round(gap / 5) for gap in gaps[:9]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert all(3599 < gap < 3602 for gap in gaps[10:])
    assert all(fields["number"] == 1 and fields["offset"] == 3 * 4096 and fields["others"] == 1 for _, fields in found)


def test_call_is_named_and_its_end_and_the_next_one_after_a_calm_time(program: Path) -> None:
    found = events(program, "call")
    assert [name for name, _ in found] == ["named", "over", "named"]
    assert [fields["call"] for _, fields in found] == [1, 0, 0]
    assert found[0][1]["at"] <= 4.8
    assert 5.6 < found[1][1]["age"] < 6.8
    assert found[2][1]["at"] - 36 <= 4.8


def test_call_that_has_completed_its_requests_is_named(program: Path) -> None:
    [(name, fields)] = events(program, "answered")
    assert (name, fields["call"], fields["others"]) == ("named", 1, 0)


def test_slow_requests_are_not_named_each_time(program: Path) -> None:
    names = [name for name, _ in events(program, "slow")]
    assert 5 <= names.count("named") <= 9
    assert events(program, "busy") == []


def test_late_requests_are_interrupted_and_then_the_process_ends(program: Path) -> None:
    found = [(name, fields) for name, fields in events(program, "late") if name != "named"]
    names = [name for name, _ in found]
    assert names == ["late"] * 13 + ["deaf"] * (len(names) - 13)
    assert 2.3 <= found[0][1]["at"] <= 2.9
    assert 7.4 <= found[13][1]["at"] <= 8.1
