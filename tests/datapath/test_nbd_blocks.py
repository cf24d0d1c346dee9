"""An export that takes only larger blocks than the device has: parts of them are changed, none of it undone."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from nbd_rig import MIB, Behaviour, FakeServer, Server, kept_nbdkit, served

from vdusefast.driver.loopback_driver import LoopbackDriver

pytestmark = pytest.mark.slow

BLOCK = 65536
SIZE = 2 * MIB
ROUNDS = 60
KILLS = 6  # on a busy machine what is killed takes longer to start than the pause between two: they have to end


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serve a file by an nbdkit that refuses what is no whole block of 64 KiB."""
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(1).randbytes(SIZE))
    policy = [f"blocksize-{key}" for key in ("minimum=64K", "preferred=64K", "maximum=8M", "error-policy=error")]
    with kept_nbdkit(tmp_path / "sock", "file", str(image), *policy, options=("--filter=blocksize-policy",)) as running:
        running.image = image  # type: ignore[attr-defined]
        yield running


def image_of(server: Server) -> bytes:
    return bytes(server.image.read_bytes())  # type: ignore[attr-defined]


def relay_pid() -> int:
    """Return the process that has the export, 0 while there is none."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any("vdusefast.worker.relay" in word for word in process.cmdline()):
                return process.pid
    return 0


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
def test_requests_of_any_size_do_what_they_say(server: Server, queues: int, block: int, cache: str) -> None:
    wanted = bytearray(image_of(server))
    chosen = random.Random(f"{queues} {block}")
    with served(server.uri, queues=queues, block_size_bytes=block, cache=cache) as (device, driver):
        assert "blocks of" in device.info()["emulated"][0]
        assert driver.block_size_bytes == block
        for number in range(120):
            start = block * chosen.randrange(SIZE // block)
            length = min(block * chosen.choice((1, 1, 3, 15, 16, 17, 40, 130)), SIZE - start)
            queue = number % queues
            match chosen.choice(("write", "write", "read", "zero", "discard")):
                case "write":
                    data = chosen.randbytes(length)
                    driver.write(start, data, queue=queue)
                    wanted[start : start + length] = data
                case "read":
                    assert driver.read(start, length, queue=queue) == wanted[start : start + length]
                case "zero":
                    driver.write_zeroes(start, length, unmap=bool(number & 1), queue=queue)
                    wanted[start : start + length] = bytes(length)
                case _:
                    driver.discard(start, length, queue=queue)
                    now = driver.read(start, length, queue=queue)
                    assert all(a in (0, b) for a, b in zip(now, wanted[start : start + length], strict=True))
                    wanted[start : start + length] = now
        driver.flush()
        assert driver.read(0, SIZE) == wanted
        assert device.stats().errors == 0
    assert image_of(server) == wanted


def test_export_that_takes_larger_blocks_by_now_is_served_on(tmp_path: Path) -> None:
    with (
        FakeServer(tmp_path / "sock", Behaviour()) as server,
        served(server.uri, reconnect_s=30) as (device, driver),
    ):
        driver.write(0, b"a" * 4096)
        server.behave(Behaviour(blocks=(4096, 4096, MIB)))
        server.hang_up()
        driver.write(512, b"b" * 512)
        assert driver.read(0, 4096) == b"a" * 512 + b"b" * 512 + b"a" * 3072
        assert device.stats().errors == 0


class Writers:
    """One thread a queue, each with sectors of its own in the blocks that all share; none of it may be lost."""

    BLOCKS = 3

    def __init__(self, driver: LoopbackDriver, seconds: float) -> None:
        self.driver = driver
        self.end_s = time.monotonic() + seconds
        self.wanted = bytearray(self.BLOCKS * BLOCK)
        self.errors: list[BaseException] = []

    def run(self) -> None:
        self.driver.write(0, bytes(self.wanted))
        count = self.driver.queue_count
        threads = [threading.Thread(target=self._write, args=(queue, count)) for queue in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
            assert not thread.is_alive()
        assert not self.errors, self.errors
        assert self.driver.read(0, len(self.wanted)) == self.wanted

    def _write(self, queue: int, count: int) -> None:
        chosen = random.Random(queue)
        number = 0
        try:
            while number < ROUNDS or time.monotonic() < self.end_s:
                sector = chosen.randrange(queue, self.BLOCKS * BLOCK // 512, count)
                data = bytes([1 + number % 250]) * 512
                self.wanted[512 * sector : 512 * sector + 512] = data
                self.driver.write(512 * sector, data, queue=queue)
                assert self.driver.read(512 * sector, 512, queue=queue) == data
                number += 1
        except BaseException as error:
            self.errors.append(error)


@pytest.mark.parametrize("victim", ["", "worker", "relay", "server"])
def test_writes_of_several_queues_to_one_block_are_all_kept(server: Server, victim: str) -> None:
    """Also while processes are killed."""
    stop = threading.Event()
    kills = 0
    with served(server.uri, queues=3, block_size_bytes=512) as (device, driver):

        def kill() -> None:
            nonlocal kills
            while kills < KILLS and not stop.wait(0.4):
                if victim == "worker":
                    pid = device.queues()[kills % 3].pid
                elif victim == "relay":
                    pid = relay_pid()
                else:
                    pid = server._process.pid if server._process else 0
                if pid > 0:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        kills += 1

        killer = threading.Thread(target=kill)
        if victim:
            killer.start()
        try:
            Writers(driver, 2.5 if victim else 0).run()
        finally:
            stop.set()
            if victim:
                killer.join(10)
        wanted = driver.read(0, Writers.BLOCKS * BLOCK)
        driver.flush()
        assert device.stats().errors == 0
    assert not victim or kills
    assert image_of(server)[: len(wanted)] == wanted


def test_discard_of_more_than_one_command_is_cut_where_units_of_a_server_end(tmp_path: Path) -> None:
    """A command has at most 1 GiB. The bytes that a server frees at a time are a power of two."""
    log = tmp_path / "log"
    start, length = 3 * 512, (2 << 30) - 512
    running = kept_nbdkit(tmp_path / "sock", "memory", "4G", f"logfile={log}", options=("--filter=log",))
    with running, served(running.uri) as (_, driver):
        driver.discard(start, length)
        driver.write_zeroes(start, length, unmap=True)
    cuts = re.findall(r" (Trim|Zero) id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", log.read_text())
    for kind in ("Trim", "Zero"):
        ranges = [(int(offset, 16), int(count, 16)) for name, offset, count in cuts if name == kind]
        assert [offset for offset, _ in ranges] == [start, 1 << 30, 2 << 30]
        assert [offset + count for offset, count in ranges] == [1 << 30, 2 << 30, start + length]
