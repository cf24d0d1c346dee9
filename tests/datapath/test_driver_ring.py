"""The driver's side of a split vq and the plain driver, against a device in pure Python."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest
from driver_device import FORMATS, FakeBus

from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import TimedOutError
from vdusefast.transport import uapi


@pytest.fixture(params=FORMATS)
def bus(request: pytest.FixtureRequest) -> Iterator[FakeBus]:
    bus = FakeBus(1 << 20, more=FORMATS[request.param])
    yield bus
    bus.close()


@pytest.mark.parametrize(
    ("data", "crc"),
    [(b"", 0), (b"a", 0xC1D04330), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_crc32c_known_vectors(data: bytes, crc: int) -> None:
    assert _driver.crc32c(data) == crc
    assert _driver.crc32c_soft(data) == crc


def test_crc32c_table_and_instruction_agree_in_pieces() -> None:
    data = random.Random(1).randbytes(1021)
    whole = _driver.crc32c(data)
    assert whole == _driver.crc32c_soft(data)
    assert _driver.crc32c(data[317:], _driver.crc32c(data[:317])) == whole


@pytest.mark.parametrize("features", [uapi.VIRTIO_RING_F_EVENT_IDX, 0])
def test_write_then_read(bus: FakeBus, features: int) -> None:
    mask = ~uapi.VIRTIO_RING_F_EVENT_IDX
    with LoopbackDriver(bus, features=bus.offered_features & mask | features) as driver:
        data = random.Random(2).randbytes(300 * 1024)
        driver.write(4096, data)
        driver.flush()
        assert driver.read(4096, len(data)) == data
        assert bytes(bus.disk[4096 : 4096 + len(data)]) == data
        assert driver.capacity_bytes == len(bus.disk)
        assert driver.get_id() == "py-device"
        driver.discard(4096, 8192)
        driver.write_zeroes(12288, 4096)
        assert driver.read(4096, 12288) == bytes(12288)


def test_indices_wrap_around(bus: FakeBus) -> None:
    packed = uapi.is_packed(bus.offered_features)
    with LoopbackDriver(bus, first_idx=0x003E003E if packed else 65530) as driver:
        for i in range(20):
            driver.write(512 * i, bytes([i]) * 512)
        assert driver.read(512 * 19, 512) == bytes([19]) * 512
        # 21 requests of 3 descriptors from slot 62 of 64, with the wrap counter at 0
        assert driver.ring(0).position == (0x803D803D if packed else 65530 + 21 - 65536)
        assert driver.ring(0).last_used_idx == (21 if packed else 65530 + 21 - 65536)


def test_data_is_cut_at_size_max() -> None:
    bus = FakeBus(1 << 20, size_max=4096)
    with LoopbackDriver(bus) as driver:
        driver.write(0, bytes(16384))
    bus.close()
    assert bus.log == [(0, 1, 0, 4)]


def test_smallest_queue_uses_an_indirect_table() -> None:
    bus = FakeBus(1 << 20, queue_size=2)
    with LoopbackDriver(bus) as driver:
        driver.write(512, b"x" * 512)
        assert driver.read(512, 512) == b"x" * 512
    bus.close()


def test_free_list_takes_and_returns_every_descriptor(bus: FakeBus) -> None:
    bus.mute = True
    with LoopbackDriver(bus) as driver:
        ring = driver.ring(0)
        heads = [ring.add([(0x1000, 1, False), (0x2000, 1, True)]) for _ in range(32)]
        assert len(set(heads)) == 32
        assert ring.free_count == 0
        with pytest.raises(BlockingIOError):
            ring.add([(0x1000, 1, False)])


def test_ring_after_close_raises(bus: FakeBus) -> None:
    with LoopbackDriver(bus) as driver:
        ring = driver.ring(0)
    with pytest.raises(ValueError, match="closed"):
        ring.reap()


def test_errors_have_an_errno(bus: FakeBus) -> None:
    bus.spoil = lambda _kind, _sector, _data: None
    with LoopbackDriver(bus) as driver:
        with pytest.raises(OSError, match="sector 1") as raised:
            driver.read(512, 512)
        assert raised.value.errno == errno.EIO
        with pytest.raises(ValueError, match="multiples"):
            driver.read(1, 512)


def test_silent_device_times_out(bus: FakeBus) -> None:
    bus.mute = True
    with LoopbackDriver(bus) as driver:
        region = driver.add_region(4096)
        with pytest.raises(TimedOutError):
            driver.submit_chain([(region.iova, 16, False), (region.iova + 16, 1, True)], timeout_s=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("seed", [1, 99])
def test_random_order_visits_every_block_once_a_pass(count: int, seed: int) -> None:
    visited = _driver.sequence("random_once", count, seed, 3 * count)
    passes = [visited[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(p) == list(range(count)) for p in passes)
    if count > 100:
        assert passes[0] != passes[1]
        assert passes[0] != sorted(passes[0])


def test_other_orders() -> None:
    assert _driver.sequence("sequential", 3, 1, 7) == [0, 1, 2, 0, 1, 2, 0]
    drawn = _driver.sequence("random", 100, 1, 2000)
    assert set(drawn) == set(range(100))


def test_block_check_tells_what_is_wrong() -> None:
    block = bytearray(4096)
    _driver.fill_block(block, 8192, 7, 42)
    assert _driver.check_block(block, 8192) == "none"
    assert _driver.check_block(block, 8192, 7, 42) == "none"
    assert _driver.check_block(block, 4096, 7, 42) == "offset"
    assert _driver.check_block(block, 8192, 8, 42) == "generation"
    assert _driver.check_block(block, 8192, 7, 43) == "seed"
    assert _driver.check_block(block[:2048], 8192) == "length"
    block[4000] ^= 1
    assert _driver.check_block(block, 8192) == "checksum"
    assert _driver.check_block(bytes(4096), 8192) == "no_header"
