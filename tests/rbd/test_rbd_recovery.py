"""An image loses an OSD, the cluster, or a worker. Data is never wrong, and the device stays."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from background import Background
from ceph_rig import Cluster
from load import Load

from vdusefast import Device, make_config
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import BackendError
from vdusefast.state import saved_state
from vdusefast.transport.loopback import LoopbackTransport

pytestmark = pytest.mark.slow

BLOCK = bytes(range(256)) * 16  # 4 KiB
WAIT_S = 15.0
LONG_LOAD = (
    *("--verify", "crc32c", "--rw", "randrw", "--bs", "4k", "--size", "8m", "--iodepth", "32"),
    *("--time_based", "--runtime", "3"),
)

Serve = Callable[..., Device]


def wait_for(holds: Callable[[], bool], what: str, limit_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:g} s"
        time.sleep(0.05)


@contextmanager
def osd_down(ceph: Cluster) -> Iterator[None]:
    """Have the OSD killed meanwhile."""
    ceph.kill_osd()
    try:
        yield
    finally:
        ceph.start_osd()


@pytest.mark.keeps_resources  # the new OSD
def test_osd_killed_and_restarted_is_a_pause_under_verification(ceph: Cluster, image: str, tmp_path: Path) -> None:
    load = Load(ceph.uri(f"rbd/{image}"), tmp_path, *LONG_LOAD)
    load.worker()
    time.sleep(1.0)
    with osd_down(ceph):
        time.sleep(0.5)
    load.result().assert_clean()


@pytest.mark.parametrize("policy", ["", "writeback"], ids=["default cache", "cache of the image's own"])
def test_nothing_acknowledged_is_lost_with_killed_workers_that_are_replaced_at_once(
    ceph: Cluster, image: str, tmp_path: Path, policy: str
) -> None:
    if policy:
        ceph.rbd("config", "image", "set", f"rbd/{image}", "rbd_cache_policy", policy)
        ceph.rbd("config", "image", "set", f"rbd/{image}", "rbd_cache", "true")
    # The flushes have librbd trust its user, and answer writes early where it may.
    load = Load(ceph.uri(f"rbd/{image}"), tmp_path, *LONG_LOAD, "--fsync", "32")
    for _ in range(3):
        worker = load.worker()
        time.sleep(0.5)
        worker.kill()
        with suppress(psutil.Error):
            worker.wait(5)
    result = load.result()
    result.assert_clean()
    # The lock of each was broken; its watch would have been waited for 30 s.
    assert result.said.count("the previous worker was blocklisted") == 3, result.said


def test_killed_relay_of_several_queues_is_a_pause_under_verification(
    ceph: Cluster, image: str, tmp_path: Path
) -> None:
    load = Load(ceph.uri(f"rbd/{image}"), tmp_path, *LONG_LOAD, "--queues", "2")
    relay = load.worker("vdusefast.worker.relay")
    time.sleep(1.0)
    relay.kill()
    result = load.result()
    result.assert_clean()
    assert "the previous worker was blocklisted" in result.said


def test_workers_killed_over_an_image_without_a_lock_are_shut_out_too(ceph: Cluster, serve: Serve) -> None:
    device = serve(ceph.make_image("lockless", "16M", "--image-feature", "layering"))
    with device.driver() as driver:
        driver.write(0, BLOCK)
        before = ceph.ceph("osd", "blocklist", "ls")
        os.kill(device.queues()[0].pid, signal.SIGKILL)
        driver.write(4096, BLOCK)
        assert ceph.ceph("osd", "blocklist", "ls") != before
        assert driver.read(0, 4096) == BLOCK


@pytest.mark.parametrize("queues", [1, 2])
def test_another_image_of_the_name_is_not_written_to(ceph: Cluster, image: str, queues: int) -> None:
    """By the next server, nor by the next worker, or relay, of a server that lives, until somebody says so."""
    config = make_config(name="other", uri=ceph.uri(f"rbd/{image}"), queues=queues, queue_size=64, reconnect_s=1)
    first = Device(config)
    first.start()
    bus = first.bus
    assert first._directory is not None
    state_path = first._directory.state_path
    with first.driver() as driver:
        driver.write(0, BLOCK)
        first.hand_over()
        ceph.rbd("mv", f"rbd/{image}", f"rbd/{image}-old")
        ceph.make_image(image, "16M")
        second = Device(config, transport=LoopbackTransport(bus=bus))
        second.start(recover=True)
        with pytest.raises(OSError, match="Input/output error"):
            driver.write(0, BLOCK)
        with pytest.raises(BackendError, match="is not the one that was served"):
            second.resize()
        second.hand_over()
        assert ceph.rbd("diff", f"rbd/{image}") == ""
        with saved_state.any_store(state_path):
            third = Device(config, transport=LoopbackTransport(bus=bus))
            third.start(recover=True)
        driver.write(0, BLOCK)
        state = saved_state.load(state_path)
        assert state is not None
        assert state.identity["id"]
    third.stop()


def test_worker_that_ends_well_is_not_shut_out(ceph: Cluster, image: str, serve: Serve) -> None:
    before = ceph.ceph("osd", "blocklist", "ls")
    for _ in range(2):
        device = serve(ceph.uri(f"rbd/{image}"), name="again")
        with device.driver() as driver:
            driver.write(0, BLOCK)
        device.stop()
    assert ceph.ceph("osd", "blocklist", "ls") == before


def test_halted_osd_shows_as_a_queue_that_waits(ceph: Cluster, image: str, serve: Serve) -> None:
    device = serve(ceph.uri(f"rbd/{image}"))
    with device.driver() as driver:
        driver.write(0, BLOCK)
        with ceph.osd_halted():
            pending = Background(lambda: driver.read(0, 4096))
            wait_for(lambda: device.queues()[0].waiting_s > 0, "the queue waits")
            assert device.responds(2.0)
        assert pending.result() == BLOCK
        wait_for(lambda: device.queues()[0].waiting_s == 0, "it waits no more")


def test_halted_osd_is_an_error_after_timeout_s(
    ceph: Cluster, image: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    device = serve(ceph.uri(f"rbd/{image}"), timeout_s=2)
    with device.driver() as driver:
        driver.write(0, BLOCK)
        driver.flush()
        with ceph.osd_halted(), caplog.at_level(logging.WARNING):
            assert 1.5 < failed_read_s(driver) < 6
            wait_for(lambda: "no answer for 2 s" in caplog.text, "a line in the log")
        wait_for(lambda: reads(driver, 0) == BLOCK, "service again")


def failed_read_s(driver: LoopbackDriver) -> float:
    """Return how long a read takes that is to fail."""
    began = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        driver.read(0, 4096)
    return time.monotonic() - began


def reads(driver: LoopbackDriver, offset_bytes: int) -> bytes:
    """Return what is read there, nothing on an error."""
    with suppress(OSError):
        return driver.read(offset_bytes, 4096)
    return b""


def test_worker_that_cannot_open_the_image_waits_then_answers_errors_then_serves(
    ceph: Cluster, image: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    device = serve(ceph.uri(f"rbd/{image}"), reconnect_s=3)
    with device.driver() as driver, caplog.at_level(logging.WARNING):
        driver.write(0, BLOCK)
        driver.flush()
        with ceph.osd_halted():
            os.kill(device.queues()[0].pid, signal.SIGKILL)
            assert 2.5 < failed_read_s(driver) < 8
            wait_for(lambda: "could not be opened for 3 s" in caplog.text, "a line in the log")
        wait_for(lambda: reads(driver, 0) == BLOCK, "service again")


def test_device_over_a_lost_cluster_can_be_stopped(ceph: Cluster, image: str, serve: Serve) -> None:
    device = serve(ceph.uri(f"rbd/{image}"))
    with device.driver() as driver:
        driver.write(0, BLOCK)
        with ceph.osd_halted():
            driver.close()
            began = time.monotonic()
            device.stop()
            assert time.monotonic() - began < 12


def test_client_that_was_shut_out_says_so(
    ceph: Cluster, image: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    device = serve(ceph.uri(f"rbd/{image}"))
    with device.driver() as driver, caplog.at_level(logging.WARNING):
        driver.write(0, BLOCK)
        watcher = ceph.rbd("status", f"rbd/{image}").partition("watcher=")[2].split()[0]
        ceph.ceph("osd", "blocklist", "add", watcher)
        with suppress(OSError):
            driver.write(0, BLOCK)  # a cache may take it
        with pytest.raises(OSError, match="Input/output error"):
            driver.flush()
        wait_for(lambda: "was blocklisted: another one" in caplog.text, "a line in the log")


@pytest.mark.parametrize("size_mib", [12, 32])
def test_image_resized_under_load_stays_right(ceph: Cluster, image: str, tmp_path: Path, size_mib: int) -> None:
    load = Load(ceph.uri(f"rbd/{image}"), tmp_path, *LONG_LOAD[:-1], "2")
    load.worker()
    time.sleep(0.5)
    ceph.rbd("resize", "--size", f"{size_mib}M", "--allow-shrink", f"rbd/{image}")
    load.result().assert_clean()


@pytest.mark.parametrize("kind", [0, 1], ids=["read", "write"])
def test_memory_that_vanishes_fails_the_queue_and_not_the_process(
    ceph: Cluster, image: str, serve: Serve, kind: int
) -> None:
    device = serve(ceph.uri(f"rbd/{image}"))
    with device.driver() as driver:
        driver.write(0, BLOCK)
        driver.flush()
        worker = device.queues()[0].pid
        region, header = driver.add_region(4096), driver.add_region(4096)
        os.ftruncate(region.fd, 0)
        header.buf[:16] = kind.to_bytes(4, "little") + bytes(12)
        segments = [(header.iova, 16, False), (region.iova, 4096, kind == 0), (header.iova + 16, 1, True)]
        with suppress(OSError):
            driver.submit_chain(segments)
        wait_for(lambda: device.failure is not None, "the queue has failed")
        assert "vanished" in str(device.failure)
        assert device.queues()[0].pid == worker
