"""No step of the control plane costs a request that is in flight."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from verified_load import Load

import vdusefast
from vdusefast.bench.raw.memory import Workload, make_job
from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.transport import uapi

MIB = 1 << 20
EVERYTHING = (0, 2**64 - 1)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file of random bytes."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(8 * MIB))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "cache"), [("sync", "writeback"), ("cached", "writeback"), ("uring", "writeback"), ("uring", "none")]
)
def test_invalidating_all_memory_under_load_loses_nothing(image: Path, engine: str, cache: str) -> None:
    config = vdusefast.make_config(name="inv", uri=f"file:{image}", queues=2, engine=engine, cache=cache)
    with vdusefast.Device(config) as device, device.driver() as driver:
        load = Load(driver)
        rounds = 0
        while load.running:
            device.bus.update_iotlb(*EVERYTHING)
            rounds += 1
        load.check()
        assert rounds > 10
        assert all(queue.invalidations >= rounds for queue in device.stats().queues)
        assert device.failure is None


@pytest.mark.slow
@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("queue_size", [4, 64])
@pytest.mark.parametrize("first_idx", [0, 65530])
def test_small_rings_wrap_under_load(image: Path, event_idx: bool, queue_size: int, first_idx: int) -> None:
    config = vdusefast.make_config(name="wrap", uri=f"file:{image}", queue_size=queue_size, event_idx=event_idx)
    with vdusefast.Device(config) as device, LoopbackDriver(device.bus, first_idx=first_idx) as driver:
        assert driver.has(uapi.VIRTIO_RING_F_EVENT_IDX) == event_idx
        load = Load(driver, seconds=0.5)
        load.check()
        assert device.failure is None


def test_memory_that_vanishes_fails_the_queue_and_not_the_process(image: Path) -> None:
    config = vdusefast.make_config(name="gone", uri=f"file:{image}", queues=2)
    with vdusefast.Device(config) as device, device.driver() as driver:
        driver.write(0, b"a" * 4096, queue=0)
        region = driver.add_region(4096)
        os.ftruncate(region.fd, 0)
        header = driver.add_region(4096)
        header.buf[:16] = bytes(16)
        # The header is readable, the status byte lies in a page that is gone.
        driver.submit_chain([(header.iova, 16, False), (header.iova + 512, 512, True), (region.iova, 1, True)])
        deadline = time.monotonic() + 5
        while device.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "vanished" in str(device.failure)
        assert driver.read(0, 4096, queue=1) == b"a" * 4096
        os.kill(device.queues()[0].pid, 0)


@pytest.mark.parametrize("verify", ["crc32c", "pattern"])
@pytest.mark.parametrize("depth", [1, 16])
def test_device_that_moves_no_data_does_not_pass_verification(verify: str, depth: int) -> None:
    """Bytes that an earlier write left in the driver's buffer must not pass for bytes that were read."""
    config = vdusefast.make_config(name="empty", uri="null:1M")
    pattern = b"\x5a" * 4096 if verify == "pattern" else b""
    with vdusefast.Device(config) as device, device.driver() as driver:
        load = Workload(
            kind="write",
            order="sequential",
            block_bytes=4096,
            depth=depth,
            size_bytes=64 * 4096,
            verify=verify,
            pattern=pattern,
            check_after=True,
            moves_no_data=True,
        )
        job = make_job(driver, load)
        _driver.DriverThread([driver.ring(0)], [job]).run()
    assert job.results()["request_errors"] == 0
    assert job.results()["verify_errors"] == 64
