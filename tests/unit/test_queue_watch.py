"""A queue whose storage does not answer is named, with the time since when; all others serve on."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vdusefast import Device, make_config
from vdusefast.cli import render
from vdusefast.control.stall_watch import QueueWatch
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.state.shared_pages import (
    INFLIGHT_ENTRY_BYTES,
    INFLIGHT_HEADER_BYTES,
    INFLIGHT_OFFSET,
    SharedPages,
    queue_offset,
)

WAIT_S = 15.0


class FakePages:
    """The part of the shared pages that the watch reads."""

    def __init__(self) -> None:
        self.requests = 0
        self.inflight = False

    def requests_done(self, queue: int) -> int:
        return self.requests

    def has_inflight(self, queue: int) -> bool:
        return self.inflight


@pytest.fixture
def pages() -> FakePages:
    return FakePages()


@pytest.fixture
def watch(pages: FakePages) -> QueueWatch:
    return QueueWatch("d0", pages, 1)  # type: ignore[arg-type]


def test_queue_that_moves_or_is_idle_does_not_wait(watch: QueueWatch, pages: FakePages) -> None:
    for now_s in range(20):
        pages.requests, pages.inflight = now_s, now_s % 2 == 0
        watch.look(0, now_s)
        assert watch.waiting_s(0, now_s + 0.5) == 0.0
    pages.inflight = False
    for now_s in range(20, 60):
        watch.look(0, now_s)
        assert watch.waiting_s(0, now_s + 0.5) == 0.0


def test_queue_waits_since_the_first_look_at_what_is_in_flight(watch: QueueWatch, pages: FakePages) -> None:
    watch.look(0, 100)
    pages.inflight = True
    watch.look(0, 101)
    assert watch.waiting_s(0, 101.5) == 0.0  # it may be quick
    watch.look(0, 102)
    assert watch.waiting_s(0, 105.5) == 4.5
    pages.requests = 1
    watch.look(0, 106)
    assert watch.waiting_s(0, 106.5) == 0.0
    watch.look(0, 107)
    assert watch.waiting_s(0, 107) == 1.0  # the next request is slow as well


def test_long_wait_is_logged_at_growing_intervals_and_its_end_too(
    watch: QueueWatch, pages: FakePages, caplog: pytest.LogCaptureFixture
) -> None:
    pages.inflight = True
    for now_s in range(100, 140):
        watch.look(0, now_s)
    pages.requests = 7
    for now_s in range(140, 145):
        pages.requests += 1
        watch.look(0, now_s)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "device d0: queue 0 waits for its storage since 10 s"),
        (logging.WARNING, "device d0: queue 0 waits for its storage since 20 s"),
        (logging.WARNING, "device d0: queue 0 continues after 40 s"),
    ]


def test_short_wait_is_not_logged(watch: QueueWatch, pages: FakePages, caplog: pytest.LogCaptureFixture) -> None:
    pages.inflight = True
    for now_s in range(9):
        watch.look(0, now_s)
    pages.requests = 1
    watch.look(0, 9)
    assert caplog.records == []


def test_queue_that_is_stopped_or_has_failed_does_not_wait(watch: QueueWatch, pages: FakePages) -> None:
    pages.inflight = True
    for now_s in range(20):
        watch.look(0, now_s, serves=False)
    assert watch.waiting_s(0, 20) == 0.0


@pytest.mark.parametrize("queue_size", [2, 256, 32768])
def test_pages_tell_whether_anything_is_in_flight(queue_size: int) -> None:
    with SharedPages.create(None, "d0", 2, queue_size) as pages:
        assert not pages.has_inflight(1)  # no log yet
        pages.begin_log(1, 0)
        assert not pages.has_inflight(1)
        last = queue_offset(1) + INFLIGHT_OFFSET + INFLIGHT_HEADER_BYTES
        last += (queue_size - 1) * INFLIGHT_ENTRY_BYTES
        pages.map[last + 8] = 2  # what the entry holds beside its order says nothing
        assert not pages.has_inflight(1)
        pages.map[last + 7] = 1
        assert pages.has_inflight(1)
        assert not pages.has_inflight(0)


# -- a device whose worker is stopped, which looks like one that hangs in its storage


@contextmanager
def load_on(driver: LoopbackDriver, queue: int) -> Iterator[list[int]]:
    """Write to a queue all the time; the list counts the writes."""
    counts = [0]
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            driver.write(counts[0] % 64 * 65536, bytes(65536), queue=queue)
            counts[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield counts
    finally:
        stop.set()
        thread.join()


def stop_amid_a_request(device: Device, queue: int) -> int:
    """Stop the queue's worker while it has something in flight; returns its pid."""
    pid = device.queues()[queue].pid
    pages = device._pages
    assert pages is not None
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
        if pages.has_inflight(queue):
            return pid
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError("the worker has never been stopped amid a request")


@pytest.mark.slow
def test_device_says_which_queue_waits_and_answers_meanwhile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"")
    os.truncate(image, 8 << 20)
    config = make_config(name="d0", uri=f"file:{image}", queues=2, queue_size=64)
    with Device(config) as device, device.driver() as driver, load_on(driver, 1) as counts:
        pid = stop_amid_a_request(device, 1)
        deadline = time.monotonic() + WAIT_S
        while not device.queues()[1].waiting_s:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        stuck = counts[0]
        driver.write(0, bytes(4096), queue=0)  # the other queue does not notice
        assert device.responds(1.0)
        info = json.loads(json.dumps(device.info()))
        waiting = [queue["waiting_s"] for queue in info["queues"]]
        assert waiting[0] == 0.0
        assert 1.0 <= waiting[1] < WAIT_S
        assert device.stats().to_dict()["queues"][1]["waiting_s"] >= waiting[1]
        assert f"queue 1 waits for its storage since {int(waiting[1])} s" in render.show_text(info)
        assert f"running, queue 1 waits {int(waiting[1])} s" in render.list_text([info])
        os.kill(pid, signal.SIGCONT)
        while device.queues()[1].waiting_s or counts[0] < stuck + 10:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert device.failure is None
    assert [queue.restarts for queue in device.queues()] == [0, 0]
