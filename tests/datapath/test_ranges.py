"""Discards and writes of zeroes: piece by piece, refused by the file system, or turned off."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from device_model import Params
from model import F_IN_ORDER, OK, T_DISCARD, T_IN, T_WRITE_ZEROES, WRITE, Desc, header, ranges
from rig import DISK_DIR, IN_IOVA, OUT_IOVA, Rig, file_engines, store_on_disk

from vdusefast.api import Device
from vdusefast.config import make_config
from vdusefast.transport.loopback import LoopbackTransport

MIB = 1 << 20
PIECES_BYTES = 16 * MIB  # the first piece has 4 MiB
PIECES = Params(
    capacity_sectors=PIECES_BYTES // 512,
    discard_max_sectors=1 << 22,
    discard_max_seg=2,
    write_zeroes_max_sectors=1 << 22,
    write_zeroes_max_seg=2,
)


@pytest.mark.parametrize("engine", ["memory", "sync"])
@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
@pytest.mark.parametrize("in_order", [False, True])
def test_read_that_comes_behind_a_large_range_is_answered_before_it(engine: str, kind: int, in_order: bool) -> None:
    """Unless the driver wants them in their order."""
    params = replace(PIECES, features=PIECES.features | F_IN_ORDER) if in_order else PIECES
    with Rig(params, engine=engine) as rig:
        before = rig.store_bytes()
        rig.memory.write(IN_IOVA, header(kind, 0) + ranges((0, PIECES_BYTES // 1024, 0), (PIECES_BYTES // 1024, 8, 0)))
        range_head = rig.ring.put_chain([Desc(IN_IOVA, 16), Desc(IN_IOVA + 16, 32), Desc(OUT_IOVA, 1, WRITE)])
        rig.memory.write(IN_IOVA + 4096, header(T_IN, PIECES.capacity_sectors - 1))
        read_head = rig.ring.put_chain([Desc(IN_IOVA + 4096, 16), Desc(OUT_IOVA + 4096, 513, WRITE)])
        rig.ring.make_available(range_head)
        rig.ring.make_available(read_head)
        rig.poll()
        wanted = [range_head, read_head] if in_order else [read_head, range_head]
        assert [head for head, _ in rig.ring.reap(in_order=in_order)] == wanted
        assert rig.memory.read(OUT_IOVA, 1) == bytes([OK])
        assert rig.memory.read(OUT_IOVA + 4096, 512) == before[-512:]
        end = PIECES_BYTES // 2 + 4096
        assert rig.store_bytes() == bytes(end) + before[end:]


@pytest.mark.parametrize("engine", file_engines())
def test_pieces_leave_what_is_beside_a_range(engine: str) -> None:
    with store_on_disk(PIECES_BYTES) as path:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        with Rig(PIECES, engine=engine, store_fd=fd, discard_unit=MIB, discard_offset=4096) as rig:
            wanted = bytearray(path.read_bytes())
            for number, (first, count) in enumerate([(3, 9 * 2048), (25001, 2047 * 2)]):
                assert rig.ask(rig.request(T_WRITE_ZEROES, 0, ranges((first, count, number)))) == (1, OK)
                wanted[512 * first : 512 * (first + count)] = bytes(512 * count)
            assert path.read_bytes() == wanted
        os.close(fd)


@pytest.mark.parametrize("engine", ["sync", "auto"])
def test_worker_that_dies_within_a_large_range_is_replaced(tmp_path: Path, engine: str) -> None:
    path = DISK_DIR / f"large-{os.getpid()}.img"
    try:
        with path.open("wb") as file:
            file.truncate(2048 * MIB)
            for at in range(0, 2048, 16):  # something to free everywhere
                file.seek(at * MIB)
                file.write(b"x" * 4096)
        config = make_config(name="large", uri=f"file:{path}", queues=2, engine=engine)
        with Device(config) as device, device.driver() as driver:
            pids = [queue.pid for queue in device.queues()]
            driver.write(2047 * MIB, b"k" * 4096, queue=1)
            erase = threading.Thread(target=driver.write_zeroes, args=(0, 2047 * MIB), kwargs={"unmap": True})
            erase.start()
            time.sleep(0.002)
            os.kill(pids[0], signal.SIGKILL)
            erase.join(60)
            assert not erase.is_alive()
            for at in range(0, 2047, 16):
                assert driver.read(at * MIB, 4096) == bytes(4096)
            assert driver.read(2047 * MIB, 4096) == b"k" * 4096
            assert device.stats().errors == 0
            assert path.stat().st_blocks * 512 < 16 * MIB
    finally:
        path.unlink()


# -- a file system that refuses


@pytest.fixture
def append_only() -> Iterator[tuple[Path, int]]:
    """Give a file that somebody has made append-only since it was opened: it is written to, and fallocate() refused."""
    with store_on_disk(64 * 4096) as path:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        subprocess.run(["chattr", "+a", path], check=True, timeout=20)
        try:
            yield path, fd
        finally:
            subprocess.run(["chattr", "-a", path], check=True, timeout=20)
            os.close(fd)


@pytest.mark.parametrize("engine", [*file_engines(), "cached"])
def test_refused_range_is_no_error(append_only: tuple[Path, int], engine: str) -> None:
    path, fd = append_only
    before = path.read_bytes()
    params = replace(PIECES, capacity_sectors=64 * 8)
    with Rig(params, engine=engine, store_fd=fd) as rig:
        assert rig.ask(rig.request(T_DISCARD, 0, ranges((0, 64, 0), (128, 64, 0)))) == (1, OK)
        assert path.read_bytes() == before
        for unmap in (0, 1):
            assert rig.ask(rig.request(T_WRITE_ZEROES, 0, ranges((64 * unmap, 64, unmap)))) == (1, OK)
        assert path.read_bytes() == bytes(64 * 1024) + before[64 * 1024 :]
        assert rig.counter("host_errors") == 0


def test_sealed_memory_is_not_discarded() -> None:
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 64 * 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with Rig(replace(PIECES, capacity_sectors=64 * 8), engine="sync", store_fd=fd) as rig:
        assert rig.ask(rig.request(T_DISCARD, 0, ranges((0, 64, 0)))) == (1, OK)
        assert rig.counter("host_errors") == 0
    os.close(fd)


# -- turned off


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture
def full_image() -> Iterator[Path]:
    """Give a file whose room is all allocated, as by fallocate(1)."""
    path = DISK_DIR / f"full-{os.getpid()}.img"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * MIB)
    yield path
    path.unlink()


@pytest.mark.parametrize("engine", ["sync", "auto"])
@pytest.mark.parametrize(("key", "offered"), [({"discard": "ignore"}, False), ({"write_zeroes": "thick"}, True)])
def test_preallocated_image_stays_so(full_image: Path, key: dict[str, str], offered: bool, engine: str) -> None:
    config = make_config(name="full", uri=f"file:{full_image}", engine=engine, **key)
    with Device(config) as device, device.driver() as driver:
        assert ("DISCARD" in device.info()["offered_features"]) is offered
        assert driver.bus.config[56] == 0  # write_zeroes_may_unmap
        driver.write(0, b"d" * 8192)
        for unmap in (False, True):
            driver.write_zeroes(4096, 4 * MIB, unmap=unmap)
        driver.flush()
        assert driver.read(0, 8192) == b"d" * 4096 + bytes(4096)
    assert allocated(full_image) >= 8 * MIB


def test_key_that_changes_while_the_device_is_in_use_is_kept(full_image: Path) -> None:
    """The driver was shown a device that discards; what it discards stays allocated from now on."""
    config = make_config(name="full", uri=f"file:{full_image}")
    first = Device(config)
    first.start()
    bus = first.bus
    with first.driver() as driver:
        driver.discard(4 * MIB, 4 * MIB)
        assert allocated(full_image) < 8 * MIB
        os.posix_fallocate(fd := os.open(full_image, os.O_RDWR), 0, 8 * MIB)
        os.close(fd)
        first.hand_over()
        changed = make_config(name="full", uri=f"file:{full_image}", discard="ignore")
        second = Device(changed, transport=LoopbackTransport(bus=bus))
        second.start(recover=True)
        driver.discard(0, 8 * MIB)
        driver.write_zeroes(0, 8 * MIB, unmap=True)
        assert "discard: backend.discard says ignore" in " ".join(second.info()["emulated"])
    second.stop()
    assert allocated(full_image) >= 8 * MIB
