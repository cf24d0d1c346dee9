"""An image of Ceph RBD as a device: what is written, cleared, frozen and resized."""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ceph_rig import Cluster
from load import verified

from vdusefast import Device
from vdusefast.backends import probe
from vdusefast.backends.plugin import StoreSpec

pytestmark = pytest.mark.slow

MIB = 1 << 20
BLOCK = bytes(range(256)) * 16  # 4 KiB
VERIFIED = ("--rw", "randrw", "--bs", "4k", "--size", "4m", "--iodepth", "32", "--fsync", "64")

Serve = Callable[..., Device]


@pytest.mark.parametrize("cache", ["writeback", "writethrough", "unsafe"])
def test_data_survives_verification(ceph: Cluster, image: str, tmp_path: Path, cache: str) -> None:
    verified(ceph.uri(f"rbd/{image}"), tmp_path, [*VERIFIED, "--cache", cache]).assert_clean()


def test_large_requests_over_object_bounds_are_verified(ceph: Cluster, image: str, tmp_path: Path) -> None:
    words = ["--rw", "write", "--bs", "1m", "--size", "15m", "--offset", "512k", "--iodepth", "4"]
    verified(ceph.uri(f"rbd/{image}"), tmp_path, words).assert_clean()


def test_image_without_features_is_served_by_two_queues(ceph: Cluster, tmp_path: Path) -> None:
    uri = ceph.make_image("plain", "16M", "--image-feature", "layering")
    assert probe.describe(StoreSpec(uri)).shareable
    verified(uri, tmp_path, [*VERIFIED, "--queues", "2"]).assert_clean()


def test_image_with_a_lock_or_a_cache_is_for_one_process(ceph: Cluster, image: str) -> None:
    assert not probe.describe(StoreSpec(ceph.uri(f"rbd/{image}"))).shareable
    assert probe.describe(StoreSpec(ceph.uri(f"rbd/{image}"), read_only=True)).shareable


def test_object_size_is_the_best_request_size(ceph: Cluster) -> None:
    uri = ceph.make_image("objects", "16M", "--object-size", "1M")
    described = probe.describe(StoreSpec(uri))
    assert (described.opt_io_size_bytes, described.min_io_size_bytes) == (MIB, 65536)
    assert (described.discard_granularity_bytes, described.rotational) == (65536, 0)
    assert described.size_bytes == 16 * MIB
    assert described.can_discard
    assert described.can_write_zeroes


def test_data_is_what_other_clients_see(ceph: Cluster, image: str, serve: Serve, tmp_path: Path) -> None:
    device = serve(ceph.uri(f"rbd/{image}"))
    with device.driver() as driver:
        driver.write(5 * MIB, BLOCK)
        driver.flush()
    exported = tmp_path / "exported"
    ceph.rbd("export", f"rbd/{image}", str(exported))
    data = exported.read_bytes()
    assert data[5 * MIB : 5 * MIB + len(BLOCK)] == BLOCK
    assert not any(data[: 5 * MIB])


def test_discarded_objects_are_gone_and_read_as_zeros(ceph: Cluster, image: str, serve: Serve) -> None:
    device = serve(ceph.uri(f"rbd/{image}"))
    with device.driver() as driver:
        driver.write(4 * MIB, BLOCK * 1024)
        driver.flush()
        assert used_bytes(ceph, image) == 4 * MIB
        driver.discard(4 * MIB, 4 * MIB)
        driver.flush()
        assert driver.read(4 * MIB, 4096) == bytes(4096)
        assert used_bytes(ceph, image) == 0


@pytest.mark.parametrize("unmap", [False, True])
def test_written_zeroes_are_zeros_and_allocated_unless_unmapped(
    ceph: Cluster, image: str, serve: Serve, unmap: bool
) -> None:
    device = serve(ceph.uri(f"rbd/{image}"))
    with device.driver() as driver:
        driver.write(4 * MIB, BLOCK * 1024)
        driver.write_zeroes(4 * MIB, 4 * MIB, unmap=unmap)
        driver.write(8 * MIB, BLOCK)
        driver.write_zeroes(8 * MIB + 512, 1024, unmap=unmap)
        driver.flush()
        assert driver.read(4 * MIB, 4 * MIB) == bytes(4 * MIB)
        assert driver.read(8 * MIB, 4096) == BLOCK[:512] + bytes(1024) + BLOCK[1536:]
        assert used_bytes(ceph, image) == (4 * MIB if unmap else 8 * MIB)


def used_bytes(ceph: Cluster, image: str) -> int:
    """Return how much of an image has objects."""
    return int(json.loads(ceph.rbd("du", "--format", "json", f"rbd/{image}"))["images"][0]["used_size"])


def test_snapshot_is_read_only_and_stays_as_it_was(ceph: Cluster, image: str, serve: Serve) -> None:
    device = serve(ceph.uri(f"rbd/{image}"))
    with device.driver() as driver:
        driver.write(0, BLOCK)
        driver.flush()
        ceph.rbd("snap", "create", f"rbd/{image}@before")
        driver.write(0, bytes(4096))
    frozen = serve(ceph.uri(f"rbd/{image}@before"))
    assert frozen.info()["read_only"]
    with frozen.driver() as driver:
        assert driver.read(0, 4096) == BLOCK
        with pytest.raises(OSError, match="Input/output error"):
            driver.write(0, BLOCK)


def test_image_in_a_namespace_is_found_there(ceph: Cluster, serve: Serve) -> None:
    ceph.rbd("namespace", "create", "rbd/tenant")
    uri = ceph.make_image("rbd/tenant/disk", "8M")
    device = serve(uri)
    with device.driver() as driver:
        driver.write(0, BLOCK)
        assert driver.read(0, 4096) == BLOCK
    assert "disk" not in ceph.rbd("ls", "rbd").split()


def test_names_with_special_characters_are_percent_encoded(ceph: Cluster, serve: Serve) -> None:
    ceph.make_image("a b?c&d")
    assert serve(ceph.uri("rbd/a%20b%3Fc%26d")).info()["size_bytes"] == 64 * MIB


def test_device_that_is_read_only_does_not_write(ceph: Cluster, image: str, serve: Serve) -> None:
    device = serve(ceph.uri(f"rbd/{image}"), read_only=True)
    with device.driver() as driver:
        assert driver.read(0, 4096) == bytes(4096)
        with pytest.raises(OSError, match="Input/output error"):
            driver.write(0, BLOCK)


def wait_for_size(device: Device, size_bytes: int) -> None:
    """Wait for the device's configuration interrupt, and for that size."""
    assert select.select([device.bus.config_irqfd], [], [], 10.0)[0], "no configuration interrupt"
    os.eventfd_read(device.bus.config_irqfd)
    deadline = time.monotonic() + 5
    while device.info()["size_bytes"] != size_bytes and time.monotonic() < deadline:
        time.sleep(0.02)
    assert device.info()["size_bytes"] == size_bytes


def test_resized_image_reaches_the_driver_while_idle(ceph: Cluster, image: str, serve: Serve) -> None:
    device = serve(ceph.uri(f"rbd/{image}"))
    with device.driver() as driver:
        driver.write(0, BLOCK)
        ceph.rbd("resize", "--size", "24M", f"rbd/{image}")
        wait_for_size(device, 24 * MIB)
        assert driver.capacity_bytes == 24 * MIB
        driver.write(20 * MIB, BLOCK)
        assert driver.read(20 * MIB, 4096) == BLOCK
        ceph.rbd("resize", "--size", "8M", "--allow-shrink", f"rbd/{image}")
        wait_for_size(device, 8 * MIB)
        assert driver.capacity_bytes == 8 * MIB
        assert driver.read(0, 4096) == BLOCK
        with pytest.raises(OSError, match="Input/output error") as caught:
            driver.read(8 * MIB, 512)
        assert caught.value.errno == errno.EIO


def test_image_resized_while_nobody_served_it_has_its_new_size(ceph: Cluster, image: str, serve: Serve) -> None:
    uri = ceph.uri(f"rbd/{image}")
    serve(uri).stop()
    ceph.rbd("resize", "--size", "24M", f"rbd/{image}")
    assert serve(uri).info()["size_bytes"] == 24 * MIB


def test_core_loads_no_library_of_ceph() -> None:
    code = (
        "import vdusefast.cli.app, vdusefast.api, vdusefast.control.supervisor;"
        "import vdusefast.worker.main, vdusefast.worker._datapath;"
        "maps = open('/proc/self/maps').read(); assert 'librbd' not in maps and 'librados' not in maps"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
