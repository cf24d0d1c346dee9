"""The disks of examples/disks, and Python classes in workers: over loopback, killed, hanging, several at once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_under_load import Load

import vdusefast
from vdusefast.driver.loopback_driver import LoopbackDriver

DISKS = Path(__file__).parents[2] / "examples" / "disks"
MIB = 1 << 20
SIZE = 16 * MIB

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def where(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The URI of each disk that can be written, each with a place of its own."""
    shared = Path("/dev/shm") / f"vdusefast-test-{os.getpid()}"
    (tmp_path / "slow.img").write_bytes(bytes(SIZE))
    yield {
        "ram": f"python:{DISKS}/ram_disk.py:RamDisk?path={shared}&size=16M",
        "ram-batch": f"python:{DISKS}/ram_disk.py:BatchRamDisk?path={shared}&size=16M",
        "thin": f"python:{DISKS}/thin_disk.py:ThinDisk?path={tmp_path}/thin.vft&size=16M",
        "sqlite": f"python:{DISKS}/sqlite_disk.py:SqliteDisk?path={tmp_path}/disk.db&size=16M",
        "slow": f"python:{DISKS}/slow_disk.py:SlowDisk?path={tmp_path}/slow.img&delay_ms=0.2",
    }
    shared.unlink(missing_ok=True)


def device_of(uri: str, **settings: object) -> vdusefast.Device:
    return vdusefast.Device(vdusefast.make_config(name="py", uri=uri, **settings))


def scribble(driver: LoopbackDriver, seed: int, block_bytes: int) -> bytearray:
    """Write, zero and discard at random, overlapping; check meanwhile, and return what must be there."""
    dice = random.Random(seed)
    model = bytearray(driver.read(0, MIB))
    for step in range(60):
        first = dice.randrange(MIB // block_bytes)
        count = min(dice.choice([1, 1, 2, 7, 33]), MIB // block_bytes - first)
        start, end = first * block_bytes, (first + count) * block_bytes
        kind = dice.random()
        if kind < 0.7:
            model[start:end] = dice.randbytes(end - start) if kind < 0.4 else bytes([step]) * (end - start)
            driver.write(start, model[start:end])
        elif kind < 0.85:
            model[start:end] = bytes(end - start)
            driver.write_zeroes(start, end - start, unmap=dice.random() < 0.5)
        start = dice.randrange(MIB // block_bytes) * block_bytes
        size = min(64 * 1024, MIB - start)
        assert driver.read(start, size) == model[start : start + size]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ram", "ram-batch", "thin", "sqlite", "slow"])
def test_disk_keeps_what_is_written_also_over_a_restart(where: dict[str, str], name: str) -> None:
    with device_of(where[name]) as device, device.driver() as driver:
        model = scribble(driver, 7, driver.block_size_bytes)
        driver.flush()
        if name not in ("slow", "ram-batch"):  # which have no discard
            driver.write(8 * MIB, b"d" * 128 * 1024)
            driver.discard(8 * MIB, 128 * 1024)
            assert driver.read(8 * MIB, 128 * 1024) in (bytes(128 * 1024), b"d" * 128 * 1024)
    with device_of(where[name]) as device, device.driver() as driver:
        assert driver.read(0, MIB) == model
        assert device.failure is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "queues"),
    [("ram", 2), ("ram-batch", 2), ("thin", 1), ("thin", 2), ("sqlite", 2), ("slow", 1), ("slow", 2)],
)
def test_disk_passes_a_verified_load(where: dict[str, str], name: str, queues: int) -> None:
    with device_of(where[name], queues=queues) as device, device.driver() as driver:
        load = Load(driver, seconds=0.7)
        load.check()
        assert device.failure is None
        assert [queue.restarts for queue in device.queues()] == [0] * queues


@pytest.mark.slow
def test_thin_disk_stores_less_than_it_holds_and_survives_a_torn_record(where: dict[str, str], tmp_path: Path) -> None:
    with device_of(where["thin"]) as device, device.driver() as driver:
        driver.write(0, b"thin" * (MIB // 16))
        driver.write(2 * MIB, bytes(MIB // 4))
    path = tmp_path / "thin.vft"
    stored = path.stat().st_size
    assert stored < MIB // 16
    os.truncate(path, stored - 5)
    with path.open("ab") as file:
        file.write(b"\xff" * 100)
    with device_of(where["thin"]) as device, device.driver() as driver:
        assert driver.read(0, MIB // 4) == b"thin" * (MIB // 16)
        driver.write(MIB, b"more" * 1024)
    with device_of(where["thin"]) as device, device.driver() as driver:
        assert driver.read(MIB, 4096) == b"more" * 1024


def test_class_that_cannot_be_shared_has_one_instance_for_all_queues(tmp_path: Path) -> None:
    body = """
        shareable = False

        def open(self):
            self.data = bytearray(self.size_bytes)

        def pread(self, buffer, offset_bytes):
            buffer[:] = self.data[offset_bytes : offset_bytes + len(buffer)]

        def pwrite(self, buffer, offset_bytes):
            self.data[offset_bytes : offset_bytes + len(buffer)] = buffer
    """
    with device_of(class_file(tmp_path, body), queues=2) as device, device.driver() as driver:
        driver.write(4096, b"one" * 512, queue=0)
        assert driver.read(4096, 1536, queue=1) == b"one" * 512


def test_generated_disk_is_what_it_should_be_and_read_only() -> None:
    def word(place: int) -> int:  # splitmix64 in plain integers
        mask = (1 << 64) - 1
        z = (place + 7 + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    uri = f"python:{DISKS}/generated_disk.py:GeneratedDisk?size=16T&seed=7"
    with device_of(uri, queues=2) as device, device.driver() as driver:
        for queue, at in enumerate([0, (1 << 44) - 65536]):
            data = np.frombuffer(driver.read(at, 65536, queue=queue), "<u8")
            for i in (0, 1, 511, 512, 8191):
                assert int(data[i]) == word(at // 8 + i)
        with pytest.raises(OSError, match="sector 0"):
            driver.write(0, b"x" * 512)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ram", "ram-batch"])
def test_killed_workers_cost_no_request(where: dict[str, str], name: str) -> None:
    """The RAM disk lies in shared memory: the next worker finds what the killed one has answered for."""
    with device_of(where[name], queues=2) as device, device.driver() as driver:
        load = Load(driver, seconds=4.0)
        kills, served = 0, [0, 0]
        while load.running:
            time.sleep(0.05)
            queue = device.stats().queues[kills % 2]
            if (
                queue.requests > served[kills % 2] + 100 and queue.pid > 0
            ):  # the one before has been replaced, and works
                served[kills % 2] = queue.requests
                with contextlib.suppress(ProcessLookupError):
                    os.kill(queue.pid, signal.SIGKILL)
                    kills += 1
        load.check()
        assert kills > 1
        assert sum(queue.restarts for queue in device.queues()) > 1
        assert device.failure is None


def class_file(tmp_path: Path, body: str) -> str:
    head = """
        import os, sys, threading, time
        import vdusefast

        class Disk(vdusefast.Backend):
            size_bytes = 1 << 20

            def __init__(self, **words):
                self.words = words

            def pread(self, buffer, offset_bytes):
                buffer[:] = bytes([offset_bytes // 512 % 256]) * len(buffer)
    """
    (tmp_path / "disk.py").write_text(textwrap.dedent(head) + textwrap.indent(textwrap.dedent(body), "    "))
    return f"python:{tmp_path}/disk.py:Disk"


def test_class_that_blocks_is_shown_to_wait_and_its_worker_replaced(tmp_path: Path) -> None:
    body = """
        def pwrite(self, buffer, offset_bytes):
            if not os.path.exists(self.words["go"]):
                time.sleep(600)
    """
    go = tmp_path / "go"
    with device_of(f"{class_file(tmp_path, body)}?go={go}") as device, device.driver() as driver:
        writing = threading.Thread(target=driver.write, args=(0, b"x" * 512))
        writing.start()
        deadline_s = time.monotonic() + 30
        while device.queues()[0].waiting_s < 2 and time.monotonic() < deadline_s:
            time.sleep(0.1)
        waited_s = device.queues()[0].waiting_s
        go.touch()
        os.kill(device.queues()[0].pid, signal.SIGKILL)
        writing.join()
        assert waited_s >= 2
        assert driver.read(512, 512) == b"\x01" * 512
        assert device.queues()[0].restarts == 1


@pytest.mark.slow
def test_number_of_the_queue_and_what_the_class_prints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = """
        def open(self):
            print("to the log")
            print(f"queue {self.queue} of {self.queue_count}", file=sys.stderr)
    """
    caplog.set_level("INFO")
    with device_of(class_file(tmp_path, body), queues=2) as device, device.driver() as driver:
        assert driver.read(512, 512, queue=1) == b"\x01" * 512
    assert "queue 0 of 2" in caplog.text
    assert "queue 1 of 2" in caplog.text
    printed = "".join(line for line in caplog.text.splitlines() if line.endswith("to the log"))
    who = ("probe (pid", "queue 0: worker (pid", "queue 1: worker (pid")
    assert [printed.count(one) for one in who] == [1, 1, 1]


def test_errors_reach_the_log_and_the_counters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = """
        def pwrite(self, buffer, offset_bytes):
            if offset_bytes:
                raise OSError(28, "no room")
            raise SystemExit(1)
    """
    caplog.set_level("INFO")
    with device_of(class_file(tmp_path, body)) as device, device.driver() as driver:
        for offset in (0, 512):
            with pytest.raises(OSError, match="request type 1"):
                driver.write(offset, b"x" * 512)
        assert driver.read(1024, 512) == b"\x02" * 512
        queue = device.stats().queues[0]
        assert (queue.host_enospc, queue.host_eio) == (1, 1)
        assert device.queues()[0].restarts == 0
    assert "pwrite raised OSError: [Errno 28] no room (disk.py:" in caplog.text
    assert "Traceback" in caplog.text


def test_memory_that_vanishes_under_a_class_fails_the_queue_and_not_the_process(tmp_path: Path) -> None:
    body = """
        def pwrite(self, buffer, offset_bytes):
            len(bytes(buffer))
    """
    with device_of(class_file(tmp_path, body)) as device, device.driver() as driver:
        driver.write(0, b"a" * 512)
        region = driver.add_region(4096)
        os.ftruncate(region.fd, 0)
        header = driver.add_region(4096)
        header.buf[:16] = (1).to_bytes(4, "little") + bytes(12)
        driver.submit_chain([(header.iova, 16, False), (region.iova, 512, False), (header.iova + 16, 1, True)])
        deadline_s = time.monotonic() + 5
        while device.failure is None and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert "vanished" in str(device.failure)
        os.kill(device.queues()[0].pid, 0)


def test_invalidations_under_load_with_a_class_that_keeps_buffers(tmp_path: Path) -> None:
    body = """
        def open(self):
            self.data, self.kept = bytearray(self.size_bytes), []

        def pread(self, buffer, offset_bytes):
            self.kept = [*self.kept[-100:], buffer[1:], memoryview(buffer)]
            buffer[:] = self.data[offset_bytes : offset_bytes + len(buffer)]
            sum(view[0] for view in self.kept)

        def pwrite(self, buffer, offset_bytes):
            self.kept = [*self.kept[-100:], buffer[1:]]
            self.data[offset_bytes : offset_bytes + len(buffer)] = buffer
            sum(view[0] for view in self.kept)
    """
    uri = class_file(tmp_path, body.replace("self.size_bytes", "8 << 20") + "    size_bytes = 8 << 20\n")
    with device_of(uri) as device, device.driver() as driver:
        load = Load(driver, seconds=1.5)
        while load.running:
            device.bus.update_iotlb(0, 2**64 - 1)
        load.check()
        assert device.queues()[0].restarts == 0
        assert device.failure is None


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
def test_requests_completed_by_threads_in_any_order_pass_a_verified_load(tmp_path: Path, cache: str) -> None:
    body = """
        size_bytes = 8 << 20
        can_write_zeroes = True

        def open(self):
            import queue, random
            self.data, self.waiting, self.dice = bytearray(self.size_bytes), queue.Queue(), random.Random(3)
            for _ in range(3):
                threading.Thread(target=self.serve, daemon=True).start()

        def submit(self, batch):
            rows = batch.requests.tolist()
            self.dice.shuffle(rows)
            for row in rows:
                self.waiting.put((batch, row))

        def serve(self):
            while True:
                batch, (offset, length, tag, operation, _) = self.waiting.get()
                if operation == self.READ:
                    batch.buffers[tag][:] = self.data[offset : offset + length]
                elif operation == self.WRITE:
                    self.data[offset : offset + length] = batch.buffers[tag]
                elif operation == self.WRITE_ZEROES:
                    self.data[offset : offset + length] = bytes(length)
                batch.complete(tag)
    """
    with device_of(class_file(tmp_path, body), cache=cache) as device, device.driver() as driver:
        Load(driver, seconds=1.0).check()
        driver.write_zeroes(4096, 65536)
        assert driver.read(0, 1 << 17)[4096:69632] == bytes(65536)
        assert device.failure is None
        assert device.queues()[0].restarts == 0


def test_class_of_a_virtual_environment_finds_its_packages(tmp_path: Path) -> None:
    body = """
        def open(self):
            import numpy, msgspec
            self.words = [numpy.__version__, msgspec.__version__]
    """
    with device_of(class_file(tmp_path, body)) as device, device.driver() as driver:
        assert driver.read(512, 512) == b"\x01" * 512
