"""A device with smaller blocks than its store: workers change parts of blocks, and none undoes another's write."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from device_model import Params
from model import OK, T_DISCARD, T_IN, T_OUT, T_WRITE_ZEROES, ranges
from rig import OUT_IOVA, Rig, file_engines, store_on_disk

from vdusefast.api import Device
from vdusefast.config import make_config
from vdusefast.transport.loopback import LoopbackTransport

MIB = 1 << 20
PAGE = 4096
STORE_BYTES = 16 * PAGE
PARAMS = Params(
    capacity_sectors=STORE_BYTES // 512,
    discard_max_sectors=64,
    discard_max_seg=2,
    write_zeroes_max_sectors=64,
    write_zeroes_max_seg=2,
)


@pytest.fixture
def direct_fd() -> Iterator[int]:
    with store_on_disk(STORE_BYTES) as path:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        yield fd
        os.close(fd)


def contents(fd: int) -> bytes:
    """Return all of a file, whatever its descriptor is open with."""
    return Path(f"/proc/self/fd/{fd}").read_bytes()


# -- one worker


@pytest.mark.parametrize("granule", [4096, 16384])
@pytest.mark.parametrize("engine", file_engines())
def test_requests_of_any_sectors_do_what_they_say(direct_fd: int, engine: str, granule: int) -> None:
    """Against a plain array of bytes; reads, writes, zeroes, and discards, which may leave what they like."""
    lock_fd = os.memfd_create("locks", os.MFD_CLOEXEC)
    chosen = random.Random(engine + str(granule))
    wanted = bytearray(contents(direct_fd))
    options = {"direct_align": granule, "lock_fd": lock_fd, "cache": "none"}
    with Rig(PARAMS, engine=engine, store_fd=direct_fd, **options) as rig:
        for number in range(150):
            first = chosen.randrange(PARAMS.capacity_sectors)
            count = min(chosen.choice((1, 2, 7, 8, 9, 40)), PARAMS.capacity_sectors - first)
            start, end = 512 * first, 512 * (first + count)
            kind = chosen.choice((T_OUT, T_OUT, T_IN, T_WRITE_ZEROES, T_DISCARD))
            if kind == T_OUT:
                wanted[start:end] = bytes([number]) * (end - start)
                assert rig.ask(rig.request(T_OUT, first, bytes(wanted[start:end]))) == (1, OK)
            elif kind == T_IN:
                assert rig.ask(rig.request(T_IN, first, b"", end - start)) == (end - start + 1, OK)
                assert rig.memory.read(OUT_IOVA, end - start) == wanted[start:end]
            elif kind == T_WRITE_ZEROES:
                wanted[start:end] = bytes(end - start)
                assert rig.ask(rig.request(T_WRITE_ZEROES, 0, ranges((first, count, number & 1)))) == (1, OK)
            else:
                assert rig.ask(rig.request(T_DISCARD, 0, ranges((first, count, 0)))) == (1, OK)
                now = contents(direct_fd)
                assert all(now[at] in (0, wanted[at]) for at in range(start, end))
                wanted[start:end] = now[start:end]
        assert contents(direct_fd) == wanted
    os.close(lock_fd)


def test_file_may_end_within_a_block() -> None:
    with store_on_disk(STORE_BYTES - 512) as path:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        before = contents(fd)
        params = Params(capacity_sectors=STORE_BYTES // 512 - 1)
        with Rig(params, engine="sync", store_fd=fd, cache="none", direct_align=PAGE) as rig:
            last = params.capacity_sectors - 2
            assert rig.ask(rig.request(T_IN, last, b"", 1024)) == (1025, OK)
            assert rig.memory.read(OUT_IOVA, 1024) == before[512 * last :]
            assert rig.ask(rig.request(T_OUT, last, b"e" * 1024)) == (1, OK)
            assert contents(fd)[: STORE_BYTES - 512] == before[: 512 * last] + b"e" * 1024
        os.close(fd)


# -- several, over real disks with large sectors


@pytest.fixture(params=["ext4", "xfs", "disk"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, attach_loop: Callable[..., str]) -> Iterator[str]:
    """Return the URI of a file or disk that takes no direct I/O below 4096 bytes."""
    (tmp_path / "disk").write_bytes(b"")
    os.truncate(tmp_path / "disk", 64 * MIB)
    node = attach_loop(tmp_path / "disk", "--sector-size", "4096")
    if request.param == "disk":
        yield f"file:{node}"
        return
    force = {"ext4": ["-F"], "xfs": ["-f", "--unsupported"]}[request.param]
    subprocess.run([f"mkfs.{request.param}", "-q", *force, node], check=True, timeout=50)
    where = tmp_path / "mounted"
    where.mkdir()
    subprocess.run(["mount", node, where], check=True, timeout=50)
    (where / "d.img").write_bytes(b"")
    os.truncate(where / "d.img", 8 * MIB)
    yield f"file:{where}/d.img"
    subprocess.run(["umount", where], check=True, timeout=50)


class Writers:
    """One thread a queue, each with sectors of its own in the blocks that all share; none of it may be lost."""

    BLOCKS = 6

    def __init__(self, device: Device, rounds: int) -> None:
        self.driver = device.driver()
        self.rounds = rounds
        self.wanted = bytearray(self.BLOCKS * PAGE)
        self.errors: list[BaseException] = []

    def run(self) -> None:
        with self.driver as driver:
            driver.write(0, bytes(self.wanted))
            count = driver.queue_count
            threads = [threading.Thread(target=self._write, args=(queue, count)) for queue in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert not self.errors
            assert driver.read(0, len(self.wanted)) == self.wanted

    def _write(self, queue: int, count: int) -> None:
        chosen = random.Random(queue)
        try:
            for number in range(self.rounds):
                sector = 8 * chosen.randrange(self.BLOCKS) + chosen.randrange(queue, 8, count)
                data = bytes([1 + number % 250]) * 512
                self.wanted[512 * sector : 512 * sector + 512] = data
                self.driver.write(512 * sector, data, queue=queue)
                assert self.driver.read(512 * sector, 512, queue=queue) == data
        except BaseException as error:
            self.errors.append(error)


@pytest.mark.slow
@pytest.mark.loop_device
@pytest.mark.parametrize("engine", ["auto", "sync"])
def test_writes_of_several_queues_to_one_block_are_all_kept(uri: str, engine: str) -> None:
    config = make_config(name="small", uri=uri, cache="none", block_size_bytes=512, queues=3, engine=engine)
    with Device(config) as device:
        info = device.info()
        assert info["block_size_bytes"] == 512
        assert "blocks of 512 bytes: the store's have 4096" in info["emulated"][0]
        Writers(device, rounds=150).run()


@pytest.mark.slow
@pytest.mark.loop_device
def test_worker_that_dies_with_a_block_locked_holds_nobody_up(uri: str) -> None:
    config = make_config(name="small", uri=uri, cache="none", block_size_bytes=512, queues=3)
    stop = threading.Event()

    def kill() -> None:
        """Kill one after the other. The next one has to get on first: a third death is blamed on the request."""
        while device.stats().queues[2].requests < 5 and not stop.wait(0.01):
            pass
        for number in range(12):
            queue = number % 3
            pid, done = device.queues()[queue].pid, device.stats().queues[queue].requests
            if pid > 0:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while device.stats().queues[queue].requests < done + 5:
                if stop.wait(0.01):
                    return

    with Device(config) as device:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            Writers(device, rounds=150).run()
        finally:
            stop.set()
            killer.join(10)


@pytest.mark.slow
@pytest.mark.loop_device
def test_device_goes_on_over_a_store_that_wants_larger_blocks_by_now(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those do that were made when a trial read in a hole said 512."""
    config = make_config(name="old", uri=uri, cache="none", queues=2)
    monkeypatch.setattr("vdusefast.backends.file.find_align", lambda *_: 512)
    monkeypatch.setattr("vdusefast.backends.file._ioctl_int", lambda *_: 0)
    first = Device(config)
    first.start()
    assert first.info()["block_size_bytes"] == 512
    bus = first.bus
    first.hand_over()
    monkeypatch.undo()
    second = Device(config, transport=LoopbackTransport(bus=bus))
    second.start(recover=True)
    assert second.info()["block_size_bytes"] == 512
    Writers(second, rounds=40).run()
    with second.driver() as driver:  # a whole file of parts of blocks
        for at in (512, 5 * PAGE + 1024):
            driver.write(at, b"p" * 6 * PAGE)
            assert driver.read(at, 6 * PAGE) == b"p" * 6 * PAGE
            driver.write_zeroes(at, 3 * PAGE)
            assert driver.read(at, 6 * PAGE) == bytes(3 * PAGE) + b"p" * 3 * PAGE
            driver.discard(at, PAGE)
    second.stop()


@pytest.mark.loop_device
@pytest.mark.parametrize("uri", ["disk"], indirect=True)
@pytest.mark.parametrize("engine", ["sync", "cached"])
def test_page_cache_takes_parts_of_blocks_but_for_ranges(uri: str, engine: str) -> None:
    """A disk discards and zeroes whole blocks of its own, also through the page cache."""
    config = make_config(name="cached", uri=uri, block_size_bytes=512, queues=2, engine=engine)
    with Device(config) as device, device.driver() as driver:
        driver.write(0, b"c" * 8 * PAGE)
        wanted = bytearray(b"c" * 8 * PAGE)
        for unmap, start, end in ((False, 512, 3 * PAGE + 512), (True, 4 * PAGE + 1024, 4 * PAGE + 1536)):
            driver.write_zeroes(start, end - start, unmap=unmap, queue=1)
            wanted[start:end] = bytes(end - start)
        assert driver.read(0, 8 * PAGE) == wanted
        driver.discard(6 * PAGE + 512, PAGE)  # no whole block
        assert driver.read(0, 8 * PAGE) == wanted
        assert device.stats().queues[1].errors == 0


LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81


@pytest.fixture
def own_loop(tmp_path: Path) -> Iterator[str]:
    """Return the node of a loop device that is removed with what is set in sysfs, which would outlive its file."""
    (tmp_path / "disk").write_bytes(b"")
    os.truncate(tmp_path / "disk", 8 * MIB)
    number = 1000 + os.getpid() % 10000
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, LOOP_CTL_ADD, number)
        try:
            subprocess.run(["losetup", f"/dev/loop{number}", tmp_path / "disk"], check=True, timeout=20)
            yield f"/dev/loop{number}"
            subprocess.run(["losetup", "--detach", f"/dev/loop{number}"], check=True, timeout=20)
        finally:
            fcntl.ioctl(control, LOOP_CTL_REMOVE, number)
    finally:
        os.close(control)


@pytest.mark.slow
@pytest.mark.loop_device
def test_discard_limit_that_went_is_made_up_for(own_loop: str) -> None:
    node = own_loop
    limit = Path("/sys/block") / Path(node).name / "queue/discard_max_bytes"
    config = make_config(name="d0", uri=f"file:{node}", queues=2)
    first = Device(config)
    first.start()
    shown = first.info()["offered_features"]
    bus = first.bus
    with first.driver() as driver:
        driver.write(0, b"k" * PAGE)
        first.hand_over()
        limit.write_text("0")
        second = Device(config, transport=LoopbackTransport(bus=bus))
        second.start(recover=True)
        assert "DISCARD" in " ".join(shown)
        assert second.info()["offered_features"] == shown
        assert "discard: the store cannot do it" in " ".join(second.info()["emulated"])
        driver.discard(0, PAGE)
        assert driver.read(0, PAGE) == b"k" * PAGE
        driver.write_zeroes(0, PAGE)
        assert driver.read(0, PAGE) == bytes(PAGE)
    second.stop()
