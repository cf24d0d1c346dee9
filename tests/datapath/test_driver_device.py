"""The C-speed driver and the real device together, over the corners of the ring format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vdusefast.api import Device
from vdusefast.bench.raw.memory import Workload, make_job
from vdusefast.config import make_config
from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.transport import uapi

SIZE = 4 << 20
VERIFIED: dict[str, Any] = {"kind": "mixed", "order": "random_once", "verify": "crc32c", "check_after": True}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    options: dict[str, Any] = {"queues": 1, **getattr(request, "param", {})}
    with Device(make_config(name="driver-test", uri=f"memory:{SIZE}", **options)) as device:
        yield device


def load(driver: LoopbackDriver, **plan: Any) -> _driver.JobResults:
    defaults: dict[str, Any] = {"block_bytes": 4096, "depth": 32, "size_bytes": SIZE, "io_limit": 4000}
    job = make_job(driver, Workload(**(defaults | plan)))
    rings = [driver.ring(i) for i in range(driver.queue_count)]
    _driver.DriverThread(rings, [job], spin_us=20, stall_s=20).run()
    return job.results()


def assert_all_right(results: _driver.JobResults) -> None:
    assert results["request_errors"] == results["verify_errors"] == 0, results["faults"]
    assert results["verified"] >= results["ops"]["check"]["ios"] > 0


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("indirect", [True, False])
def test_features(device: Device, event_idx: bool, indirect: bool) -> None:
    features = device.bus.offered_features
    features &= ~(0 if event_idx else uapi.VIRTIO_RING_F_EVENT_IDX)
    features &= ~(0 if indirect else uapi.VIRTIO_RING_F_INDIRECT_DESC)
    with LoopbackDriver(device.bus, features=features) as driver:
        assert_all_right(load(driver, **VERIFIED, depth=128))


@pytest.mark.parametrize("device", [{"queue_size": 32768}], indirect=True)
@pytest.mark.parametrize("queue_size", [2, 4, 256, 32768])
def test_queue_sizes_and_wrap_around(device: Device, queue_size: int) -> None:
    with LoopbackDriver(device.bus, queue_size=queue_size, first_idx=65000) as driver:
        assert_all_right(load(driver, **VERIFIED, depth=16))
        assert driver.ring(0).last_used_idx == driver.ring(0).avail_idx < 65000


@pytest.mark.parametrize("block_bytes", [512, 65536, 1 << 20])
def test_block_sizes(device: Device, block_bytes: int) -> None:
    with device.driver() as driver:
        assert_all_right(load(driver, **VERIFIED, block_bytes=block_bytes, depth=4, io_limit=200))


@pytest.mark.parametrize("device", [{"queues": 2}], indirect=True)
def test_one_job_over_two_queues(device: Device) -> None:
    with device.driver() as driver:
        assert_all_right(load(driver, **VERIFIED, fsync_every=16))
    assert all(queue.requests > 1000 for queue in device.stats().queues)


def test_trims_and_plain_requests(device: Device) -> None:
    with device.driver() as driver:
        driver.write(8192, b"y" * 8192)
        assert driver.read(8192, 8192) == b"y" * 8192
        results = load(driver, kind="trim", order="sequential", io_limit=None)
        assert results["ops"]["trim"]["ios"] == SIZE // 4096
        assert results["request_errors"] == 0
        assert driver.read(8192, 8192) == bytes(8192)


def test_device_is_free_for_the_next_driver(device: Device) -> None:
    for _ in range(3):
        with device.driver() as driver:
            assert_all_right(load(driver, **VERIFIED, io_limit=500))
