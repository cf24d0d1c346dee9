"""Workers that never sleep, and workers that always do: what a request costs beside the loop; who is obeyed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import vdusefast
from vdusefast.bench.raw.memory import Workload, make_job
from vdusefast.driver import _driver

MIB = 1 << 20
IDX_SPACE = 65536  # a driver that asks for no interrupt, with EVENT_IDX, gets one all the same in so many requests

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A sparse file of 16 MiB."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return f"file:{path}"


def sleeps(pid: int) -> int:
    """Return how often a process has waited in a system call."""
    return int(psutil.Process(pid).num_ctx_switches().voluntary)


def cpu_s(pid: int) -> float:
    return sum(psutil.Process(pid).cpu_times()[:2])


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Return whether `condition()` came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("engine", ["sync", "uring"])
def test_worker_that_polls_always_is_awake_between_requests(uri: str, engine: str) -> None:
    config = vdusefast.make_config(name="polls", uri=uri, engine=engine, poll="always")
    with vdusefast.Device(config) as device, device.driver() as driver:
        pid = device.queues()[0].pid
        driver.write(0, b"x" * 4096)
        before, slept, used_s = device.stats().queues[0], sleeps(pid), cpu_s(pid)
        for _ in range(20):
            time.sleep(0.01)
            driver.write(512, b"y" * 512)
        after = device.stats().queues[0]
        assert after.requests - before.requests == 20
        assert (after.kicks, after.sleeps) == (before.kicks, before.sleeps)
        assert sleeps(pid) == slept
        assert cpu_s(pid) > used_s


def test_worker_that_polls_always_obeys_and_sleeps_once_its_queue_is_stopped(uri: str) -> None:
    config = vdusefast.make_config(name="obeys", uri=uri, poll="always")
    with vdusefast.Device(config) as device:
        pid = device.queues()[0].pid
        with device.driver() as driver:
            driver.write(0, b"x" * 512)
            device.resize(32 * MIB)
            driver.write(24 * MIB, b"y" * 512)
        slept, used_s = sleeps(pid), cpu_s(pid)
        time.sleep(0.3)
        assert cpu_s(pid) - used_s < 0.1
        with device.driver() as driver:
            assert device.queues()[0].pid == pid
            assert sleeps(pid) > slept
            assert driver.read(24 * MIB, 512) == b"y" * 512
            os.kill(pid, signal.SIGTERM)
            assert wait_until(lambda: device.queues()[0].pid != pid)
            assert driver.read(0, 512) == b"x" * 512


SERVE = """
import sys, time, vdusefast
config = vdusefast.make_config(name="orphan", uri=sys.argv[1], poll="always")
with vdusefast.Device(config) as device, device.driver() as driver:
    driver.write(0, b"z" * 512)
    print(device.queues()[0].pid, flush=True)
    time.sleep(30)
"""


def test_worker_that_polls_always_ends_with_its_supervisor(uri: str, tmp_path: Path) -> None:
    environment = {**os.environ, "VDUSEFAST_RUN_DIR": str(tmp_path)}
    words = [sys.executable, "-c", SERVE, uri]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert psutil.pid_exists(pid)
        process.kill()
    assert wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.slow
@pytest.mark.parametrize("irq_delay_us", [0, 200])
def test_driver_that_polls_gets_no_interrupts_but_one_in_the_index_space(irq_delay_us: int) -> None:
    """As a kernel's poll queue: it never asks for an interrupt, and with EVENT_IDX has no way to say so for good."""
    count = 3 * IDX_SPACE
    config = vdusefast.make_config(name="quiet", uri="memory:4M", poll="always", irq_delay_us=irq_delay_us)
    with vdusefast.Device(config) as device, device.driver() as driver:
        load = Workload(kind="read", order="random", block_bytes=4096, depth=32, size_bytes=4 * MIB, io_limit=count)
        job = make_job(driver, load)
        before = device.stats().queues[0]
        _driver.DriverThread([driver.ring(0)], [job], spin_us=20_000_000, stall_s=20).run()
        assert job.results()["request_errors"] == 0
        after = device.stats().queues[0]
        assert after.requests - before.requests == count
        assert (after.kicks, after.sleeps) == (before.kicks, before.sleeps)
        assert 3 <= after.irqs - before.irqs <= 4


def test_worker_that_never_polls_sleeps_between_requests(uri: str) -> None:
    config = vdusefast.make_config(name="sleeps", uri=uri, poll="never", poll_us=1_000_000)
    with vdusefast.Device(config) as device, device.driver() as driver:
        for _ in range(5):
            time.sleep(0.01)
            driver.write(0, b"x" * 512)
        counters = device.stats().queues[0]
        assert counters.kicks >= 5
        assert counters.sleeps >= 5
        assert counters.spins == 0
