"""Rings of other sizes than the device has offered, served by real workers, which are replaced amid requests."""

from __future__ import annotations

import os
import signal
import struct
import time
from pathlib import Path

import pytest

from vdusefast.api import Device
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.config import Config, make_config
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import ConfigError
from vdusefast.transport.uapi import VIRTIO_F_RING_PACKED

OFFERED = 16
BLOCK_BYTES = 4096
COUNT = 64  # requests, more than were offered descriptors


def config_of(path: Path, **settings: object) -> Config:
    (path / "disk.img").write_bytes(bytes(1 << 20))
    return make_config(name="d0", uri=f"file:{path}/disk.img", **{"queue_size": OFFERED, **settings})


def pattern(number: int) -> bytes:
    return number.to_bytes(4, "little") * (BLOCK_BYTES // 4)


def write_all(driver: LoopbackDriver, base: int) -> None:
    for number in range(COUNT):
        driver.write(number * BLOCK_BYTES, pattern(base + number))


def check_all(driver: LoopbackDriver, base: int) -> None:
    for number in range(COUNT):
        assert driver.read(number * BLOCK_BYTES, BLOCK_BYTES) == pattern(base + number), number


def submit_writes(driver: LoopbackDriver, base: int) -> memoryview:
    """Put all writes into the ring at once, far from its first descriptors; returns where their statuses come."""
    ring, region = driver.ring(0), driver.add_region(COUNT * (16 + BLOCK_BYTES + 1))
    data_at, status_at = 16 * COUNT, (16 + BLOCK_BYTES) * COUNT
    for number in range(COUNT):
        struct.pack_into("<IIQ", region.buf, 16 * number, 1, 0, number * BLOCK_BYTES // 512)
        at = data_at + number * BLOCK_BYTES
        region.buf[at : at + BLOCK_BYTES] = pattern(base + number)
        region.buf[status_at + number] = 255
        data, status = (region.iova + at, BLOCK_BYTES, False), (region.iova + status_at + number, 1, True)
        ring.add([(region.iova + 16 * number, 16, False), data, status])
    ring.publish()
    return memoryview(region.buf)[status_at : status_at + COUNT]


def wait_for(driver: LoopbackDriver, count: int) -> None:
    deadline_s = time.monotonic() + 60
    while count:
        assert time.monotonic() < deadline_s, f"{count} requests are not done"
        if driver.ring(0).wait(20):
            count -= len(driver.ring(0).reap())


def kill_worker(device: Device) -> None:
    pid, began_s = device.queues()[0].pid, time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while device.queues()[0].pid == pid or device.queues()[0].state != "running":
        assert time.monotonic() - began_s < 60
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packed", "size"), [(False, 4), (False, 64), (False, 1024), (False, 32768), (True, 4), (True, 32768)]
)
def test_ring_that_is_larger_or_smaller_than_offered_is_served(tmp_path: Path, packed: bool, size: int) -> None:
    with Device(config_of(tmp_path, packed=packed), run_dir=tmp_path) as device:
        for turn in range(2):  # after a reset, another size
            with LoopbackDriver(device.bus, queue_size=size >> turn) as driver:
                assert driver.has(VIRTIO_F_RING_PACKED) == packed
                write_all(driver, turn)
                kill_worker(device)
                check_all(driver, turn)
        assert device.failure is None


def test_requests_of_a_large_ring_that_a_worker_died_of_are_carried_out_by_the_next(tmp_path: Path) -> None:
    """More at once than the device has offered descriptors: the heads are all over the large ring's log."""
    config = config_of(tmp_path)
    with Device(config, run_dir=tmp_path) as device, LoopbackDriver(device.bus, queue_size=2048) as driver:
        write_all(driver, 0)
        pid = device.queues()[0].pid
        os.kill(pid, signal.SIGSTOP)
        statuses = submit_writes(driver, 1000)
        os.kill(pid, signal.SIGKILL)
        wait_for(driver, COUNT)
        assert bytes(statuses) == bytes(COUNT)
        check_all(driver, 1000)


def test_the_next_server_goes_on_with_a_ring_larger_than_offered(tmp_path: Path) -> None:
    """Also by a configuration that leaves the size open, as a version with another default would have it."""
    config = config_of(tmp_path)
    with LoopbackHost(tmp_path / "bus") as host:

        def make(**settings: object) -> Device:
            made = make_config(name="d0", uri=config.backend.uri, **settings)
            return Device(made, run_dir=tmp_path, transport=RemoteLoopbackTransport(host.path))

        device = make(queue_size=OFFERED)
        device.start()
        with LoopbackDriver(host.bus, queue_size=1024) as driver:
            write_all(driver, 0)
            device.hand_over()
            with pytest.raises(ConfigError, match=r"device.queue_size: .* made with 16, and would now get 64"):
                make(queue_size=64).start(recover=True)
            device = make()
            device.prove()
            device.start(recover=True)
            check_all(driver, 0)
            write_all(driver, 7)
            assert device.failure is None
            assert device.info()["queues"][0]["size"] == 1024
        device.stop()


def test_pages_of_a_device_take_no_more_memory_than_its_rings_need(tmp_path: Path) -> None:
    with Device(config_of(tmp_path, queues=4), run_dir=tmp_path) as device:
        pages = tmp_path / "d0/pages"
        assert pages.stat().st_blocks * 512 < 4 * (100 << 10)
        with LoopbackDriver(device.bus, queue_size=32768):
            assert 4 * (512 << 10) < pages.stat().st_blocks * 512 < 4 * (620 << 10)
