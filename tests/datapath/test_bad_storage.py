"""Storage that does not answer: what is in flight stays in flight, costs no CPU, and ends when the storage does."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from device_model import Params
from model import T_FLUSH, T_IN, Reason
from rig import OUT_IOVA, Rig, file_engines

from vdusefast.worker import _datapath

needs_uring = pytest.mark.skipif("uring" not in file_engines(), reason="io_uring is not allowed here")


class SlowStore:
    """A socket that reads wait for: io_uring takes it for a file, at offset 0."""

    def __init__(self) -> None:
        self.far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.fd = near.detach()

    def end(self) -> None:
        """Every read that waits gets nothing, which is an error."""
        self.far.close()

    def close(self) -> None:
        self.far.close()
        os.close(self.fd)


@pytest.fixture
def slow() -> Iterator[SlowStore]:
    store = SlowStore()
    yield store
    store.close()


def run_for(rig: Rig, seconds: float) -> tuple[int, float]:
    """Run the worker's loop until a control message comes: what it returned, and its CPU seconds."""
    kick, ctl, wake = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))

    def ring() -> None:
        time.sleep(seconds)
        rig.pages[:4] = struct.pack("=I", struct.unpack("=I", rig.pages[:4])[0] + 1)
        os.eventfd_write(ctl, 1)

    thread = threading.Thread(target=ring)
    thread.start()
    before = time.thread_time()
    try:
        reason = rig.queue.run(kick, ctl, wake, 50)
        return reason, time.thread_time() - before
    finally:
        thread.join()
        for fd in (kick, ctl, wake):
            os.close(fd)


@needs_uring
@pytest.mark.parametrize("requests", [1, 1024, 1500])
def test_waiting_for_storage_costs_no_cpu(slow: SlowStore, requests: int) -> None:
    """Also when every slot is taken and more requests wait in the ring."""
    with Rig(Params(queue_size_max=8192), size=8192, engine="uring", store_fd=slow.fd) as rig:
        parts = rig.request(T_IN, 0, b"", 512)
        for _ in range(requests):
            rig.ring.make_available(rig.ring.put_chain(parts))
        reason, cpu_s = run_for(rig, 0.6)
        assert reason == _datapath.CONTROL
        assert rig.queue.inflight_count == min(requests, 1024)
        slow.end()
        for _ in range(200):
            rig.poll()
            if rig.ring.used_idx == requests:
                break
        assert rig.ring.used_idx == requests
        assert rig.counter("host_eio") == requests
        assert cpu_s < 0.2, f"{cpu_s:.2f} s of CPU in 0.6 s of waiting"


def test_idle_queue_costs_no_cpu() -> None:
    with Rig(engine="memory") as rig:
        reason, cpu_s = run_for(rig, 0.6)
        assert reason == _datapath.CONTROL
        assert cpu_s < 0.05


@needs_uring
def test_head_that_waits_for_storage_is_made_available_again(slow: SlowStore) -> None:
    with Rig(engine="uring", store_fd=slow.fd) as rig:
        head = rig.ring.put_chain(rig.request(T_IN, 0, b"", 512))
        rig.ring.make_available(head)
        assert rig.queue.poll() == 1
        assert rig.queue.poll() == 0
        assert rig.queue.inflight_count == 1
        rig.ring.make_available(head)
        ending = threading.Timer(0.2, slow.end)  # the failing queue waits for the first
        ending.start()
        assert rig.queue.poll() == -1
        ending.join()
        assert rig.reason == Reason.HEAD_BUSY
        assert rig.queue.quiesce()[:2] == (1, 1)  # the second one counts as not taken
        assert rig.queue.inflight_count == 0
        assert rig.ring.used_idx == 1


@needs_uring
def test_requests_overtake_one_that_waits(slow: SlowStore) -> None:
    """GET_ID and bad requests need no storage, so that they do not wait for it."""
    with Rig(engine="uring", store_fd=slow.fd) as rig:
        waiting = rig.ring.put_chain(rig.request(T_IN, 0, b"", 512))
        rig.ring.make_available(waiting)
        assert rig.queue.poll() == 1
        rig.memory.write(OUT_IOVA + 0x100, b"\xff")
        quick = rig.ring.put_chain(rig.request(99))
        rig.ring.make_available(quick)
        assert rig.queue.poll() == 1
        assert rig.ring.used_elem(0)[0] == quick
        slow.end()
        rig.poll()
        assert rig.ring.used_elem(1)[0] == waiting


@needs_uring
def test_smaller_size_waits_for_what_is_in_flight_and_a_larger_one_does_not(slow: SlowStore) -> None:
    with Rig(engine="uring", store_fd=slow.fd) as rig:
        rig.ring.make_available(rig.ring.put_chain(rig.request(T_IN, 0, b"", 512)))
        assert rig.queue.poll() == 1
        rig.queue.set_capacity(rig.params.capacity_sectors + 8)
        assert rig.queue.inflight_count == 1
        ending = threading.Timer(0.1, slow.end)
        ending.start()
        rig.queue.set_capacity(rig.params.capacity_sectors - 8)
        assert rig.queue.inflight_count == 0
        assert rig.ring.used_idx == 1  # and the driver has been told of it
        ending.join()


def test_failed_queue_stays_failed_when_run_again() -> None:
    with Rig() as rig:
        rig.ring.make_available(99)
        assert rig.queue.poll() == -1
        rig.ring.put_u16(rig.ring.avail + 4, rig.ring.put_chain(rig.request(T_FLUSH)))
        reason, _ = run_for(rig, 0.1)
        assert reason == _datapath.FAILED
        assert rig.ring.used_idx == 0
