"""A driver whose memory is in thousands of regions, as that of a virtual machine with fragmented memory."""

from __future__ import annotations

import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import vdusefast
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.transport.loopback_region import Region

REGIONS_HELD = 8192 - 1100  # VF_IOTLB_CAPACITY less VF_IOTLB_RESERVE
STORE_BYTES = 1 << 20

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def read_into(driver: LoopbackDriver, head: Region, region: Region, sector: int) -> bytes:
    """Read a sector into the start of a region; returns what is there then."""
    struct.pack_into("<IIQ", head.buf, 0, 0, 0, sector)
    head.buf[32] = 0xFF
    region.buf[:512] = bytes(512)
    driver.submit_chain([(head.iova, 16, False), (region.iova, 512, True), (head.iova + 32, 1, True)])
    assert head.buf[32] == 0
    return region.buf[:512]


def sector_bytes(sector: int) -> bytes:
    return struct.pack("<I", sector) * 128


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Allow as many descriptors as regions need: an ordinary user's shell starts with 1024, and may have more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * (REGIONS_HELD + 500)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip("too few descriptors are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_more_regions_than_the_table_holds(tmp_path: Path) -> None:
    """All are used in turn, again and again; those that had to go come back, and the rings stay."""
    count = REGIONS_HELD + 300
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(map(sector_bytes, range(STORE_BYTES // 512))))
    config = vdusefast.make_config(name="regions", uri=f"file:{path}")
    with vdusefast.Device(config) as device, device.driver() as driver:
        head = driver.add_region(4096)
        regions = [driver.add_region(4096) for _ in range(count)]
        pid = device.queues()[0].pid
        for number, region in enumerate(regions):
            assert read_into(driver, head, region, number % 2048) == sector_bytes(number % 2048)
        assert regions_mapped(pid) <= REGIONS_HELD + 64
        for number in (0, count - 1, 1, count // 2, *range(0, count, 97)):
            assert read_into(driver, head, regions[number], 7) == sector_bytes(7)
        assert device.stats().counters["bad_requests"] == 0
        assert (device.queues()[0].restarts, device.failure) == (0, None)


def regions_mapped(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:vdusefast-regions")


@pytest.mark.usefixtures("many_descriptors")
def test_thousand_and_more_regions() -> None:
    config = vdusefast.make_config(name="regions", uri="memory:1M")
    with vdusefast.Device(config) as device, device.driver() as driver:
        head = driver.add_region(4096)
        regions = [driver.add_region(4096) for _ in range(1200)]
        for region in [*regions, regions[0], regions[600]]:
            read_into(driver, head, region, 3)
        assert regions_mapped(device.queues()[0].pid) > 1200
        assert device.stats().counters["bad_requests"] == 0
