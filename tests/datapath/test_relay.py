"""The relay: several queues over a store that takes one client, whichever process dies or knocks at its socket."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from nbd_rig import ALL_FLAGS, FLAG_MULTI_CONN, Behaviour, FakeServer, kept_nbdkit, served
from verified_load import Load

import vdusefast
from vdusefast.control import relay_control, relay_process
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import VdusefastError

MIB = 1 << 20
BLOCK = 4096
CHUNK = 128 << 10  # VF_RELAY_CHUNK_BYTES
SLOTS = 256
MAGIC = 0x564C5246
ALONE = ("--filter=multi-conn", "multi-conn-mode=disable")
READ, WRITE = 0, 1

pytestmark = pytest.mark.timeout(120)


@contextmanager
def relayed(
    path: Path, *words: str, filters: tuple[str, ...] = (), **options: object
) -> Iterator[tuple[vdusefast.Device, LoopbackDriver]]:
    """Serve a file by nbdkit for one client, and a device with two queues over that."""
    image = path / "disk.img"
    image.write_bytes(bytes(16 * MIB))
    kit = kept_nbdkit(path / "socket", f"file={image}", ALONE[1], *words, options=(ALONE[0], *filters, "file"))
    with kit as server, served(server.uri, queues=2, **options) as (device, driver):
        assert [queue.engine for queue in device.queues()] == ["relay", "relay"]
        yield device, driver


def relay_pid(device: vdusefast.Device, not_pid: int = -1) -> int:
    """Return the process of the relay, once there is another one than `not_pid`."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid = int(device.info()["relay_pid"])
        if pid > 0 and pid != not_pid:
            return pid
        time.sleep(0.01)
    raise AssertionError("there is no relay")


def test_queues_share_one_connection(tmp_path: Path) -> None:
    behaviour = Behaviour(flags=ALL_FLAGS & ~FLAG_MULTI_CONN)
    with FakeServer(tmp_path / "socket", behaviour) as server:
        with served(server.uri, queues=2) as (device, driver):
            for queue in (0, 1):
                driver.write(queue * BLOCK, bytes([queue + 1]) * BLOCK, queue=queue)
            for queue in (0, 1):
                assert driver.read(queue * BLOCK, BLOCK, queue=1 - queue) == bytes([queue + 1]) * BLOCK
            driver.flush(queue=1)
            assert device.info()["relay_pid"] > 0
            assert server.connection_count == 2  # the probe's, which has ended, and the relay's
        assert server.data[: 2 * BLOCK] == b"\1" * BLOCK + b"\2" * BLOCK


def test_device_with_one_queue_needs_no_relay(tmp_path: Path) -> None:
    with (
        FakeServer(tmp_path / "socket", Behaviour(flags=ALL_FLAGS & ~FLAG_MULTI_CONN)) as server,
        served(server.uri) as (device, driver),
    ):
        driver.write(0, b"x" * BLOCK)
        assert (device.queues()[0].engine, device.info()["relay_pid"]) == ("nbd", 0)


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, CHUNK - 512, CHUNK, CHUNK + 512, 3 * CHUNK + 512])
def test_requests_of_any_length_arrive_whole(tmp_path: Path, length: int) -> None:
    with relayed(tmp_path) as (_, driver):
        data = os.urandom(length)
        driver.write(BLOCK, data, queue=0)
        assert driver.read(BLOCK, length, queue=1) == data
        driver.write_zeroes(BLOCK, 512, queue=1)
        assert driver.read(BLOCK, length, queue=0) == bytes(512) + data[512:]


def test_error_of_the_store_is_that_of_its_request_alone(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    options = ("--filter=error",)
    words = ("error=ENOSPC", "error-rate=100%", f"error-file={broken}")
    with relayed(tmp_path, *words, filters=options) as (device, driver):
        driver.write(0, b"a" * BLOCK, queue=0)
        broken.touch()
        with pytest.raises(OSError, match="Input/output error"):
            driver.write(0, b"b" * BLOCK, queue=1)
        broken.unlink()
        assert driver.read(0, BLOCK, queue=1) == b"a" * BLOCK
        assert device.stats().counters["host_enospc"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["relay", "worker", "both", "stopped"])
def test_load_goes_on_when_somebody_dies(tmp_path: Path, victim: str) -> None:
    """Delays let writes of a dead worker be under way when the next one begins."""
    words = ("delay-write=3ms",)
    with relayed(tmp_path, *words, filters=("--filter=delay",)) as (device, driver):
        load, pid = Load(driver, depth=48, seconds=3.0), -1
        for _ in range(4):
            time.sleep(0.4)
            if victim in ("relay", "both"):
                pid = relay_pid(device, pid)
                os.kill(pid, signal.SIGKILL)
            if victim in ("worker", "both"):
                os.kill(device.queues()[0].pid, signal.SIGKILL)
            if victim == "stopped":
                os.kill(relay_pid(device), signal.SIGSTOP)
                time.sleep(0.3)
                os.kill(relay_pid(device), signal.SIGCONT)
        load.check()


def test_many_requests_wait_for_a_relay_that_is_stopped(tmp_path: Path) -> None:
    """More than its socket holds, each in a packet of its own."""
    with relayed(tmp_path, queue_size=1024) as (device, driver):
        os.kill(relay_pid(device), signal.SIGSTOP)
        load = Load(driver, depth=500, seconds=1.0)
        time.sleep(1.0)
        os.kill(relay_pid(device), signal.SIGCONT)
        load.check()


# -- a worker in somebody else's hands


@contextmanager
def in_place_of_a_worker(device: vdusefast.Device, queue: int) -> Iterator[socket.socket]:
    """Yield the connection to the relay that a worker of `queue` would have; the worker has died."""
    assert device._relay is not None
    worker = device.queues()[queue].pid
    os.kill(worker, signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(f"/proc/self/fd/{device._relay.socket_fds[queue]}")
        os.kill(worker, signal.SIGKILL)
        os.kill(worker, signal.SIGCONT)
        yield sock


def hello(magic: int = MAGIC, queue: int = 1, slots: int = SLOTS) -> bytes:
    return struct.pack("=III", magic, queue, slots)


def is_hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(4096) == b""
    except ConnectionResetError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("greeting", "asked"),
    [
        (hello(magic=MAGIC + 1), b""),
        (hello(queue=0), b""),
        (hello(slots=SLOTS + 1), b""),
        (hello() + b"x", b""),
        (b"x", b""),
        (hello(), b"x"),
        (hello(), bytes(24 * 65)),
        (hello(), struct.pack("=QQHBBI", 0, BLOCK, SLOTS, READ, 0, 0)),
        (hello(), struct.pack("=QQHBBI", 0, BLOCK, 0, READ, 0, 0) * 2),
        (hello(), struct.pack("=QQHBBI", 0, BLOCK, 0, 5, 0, 0)),
        (hello(), struct.pack("=QQHBBI", 0, CHUNK + 512, 0, READ, 0, 0)),
        (hello(), struct.pack("=QQHBBI", 1 << 63, BLOCK, 0, READ, 0, 0)),
    ],
    ids=["magic", "queue", "slots", "long", "short", "piece", "many", "slot", "twice", "op", "large", "far"],
)
def test_worker_that_breaks_the_rules_is_sent_away_and_the_others_are_served(
    tmp_path: Path, greeting: bytes, asked: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with relayed(tmp_path) as (device, driver):
        driver.write(0, b"a" * BLOCK)
        pid = relay_pid(device)
        with in_place_of_a_worker(device, 1) as sock:
            sock.send(greeting)
            if asked:
                assert sock.recv(4096) == struct.pack("=I", MAGIC)
                sock.send(asked)
            assert is_hung_up(sock)
        assert driver.read(0, BLOCK, queue=0) == b"a" * BLOCK
        assert driver.read(0, BLOCK, queue=1) == b"a" * BLOCK
        assert relay_pid(device) == pid
        assert "queue 1: its worker is disconnected from the store: it sent" in caplog.text


@pytest.mark.slow
def test_class_that_hangs_again_and_again_fails_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long each relay has lived: a request has a time limit, which may be long."""
    monkeypatch.setattr(relay_control, "STEADY_S", 0.0)
    (tmp_path / "disk.py").write_text(
        "import os, vdusefast\n\nclass Disk(vdusefast.Backend):\n    size_bytes = 1 << 20\n    shareable = False\n\n"
        f"    def pread(self, buffer, offset_bytes):\n        os._exit({relay_process.EXIT_HANGS})\n"
    )
    config = vdusefast.make_config(name="d0", uri=f"python:{tmp_path}/disk.py:Disk", queues=2)
    with vdusefast.Device(config) as device:
        driver = device.driver()

        def read() -> None:
            with suppress(OSError, VdusefastError):
                driver.read(0, BLOCK)

        reader = threading.Thread(target=read)
        reader.start()
        deadline = time.monotonic() + 60
        while device.failure is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "ended with status 70" in str(device.failure)
        device.stop(force=True)
        reader.join()
        driver.close()


def test_worker_cannot_write_to_a_read_only_device(tmp_path: Path) -> None:
    with relayed(tmp_path, read_only=True) as (device, driver), in_place_of_a_worker(device, 1) as sock:
        sock.send(hello())
        assert sock.recv(4096) == struct.pack("=I", MAGIC)
        sock.send(struct.pack("=QQHBBI", 0, BLOCK, 0, WRITE, 0, 0))
        assert is_hung_up(sock)
        assert driver.read(0, BLOCK) == bytes(BLOCK)


def test_memory_that_is_shared_with_the_relay_cannot_shrink(tmp_path: Path) -> None:
    with relayed(tmp_path) as (device, _):
        assert device._relay is not None
        for fd in device._relay.memory_fds:
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
            with pytest.raises(PermissionError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
