"""The relay: several queues over a store that takes one client, whoever dies, and whoever knocks at its socket."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nbd_rig import ALL_FLAGS, FLAG_MULTI_CONN, Behaviour, FakeServer, kept_nbdkit, served
from verified_load import Load

import vdusefast
from vdusefast.driver import LoopbackDriver

MIB = 1 << 20
BLOCK = 4096
CHUNK = 128 << 10  # VF_RELAY_CHUNK_BYTES
SLOTS = 256
MAGIC = 0x564C5246
ALONE = ("--filter=multi-conn", "multi-conn-mode=disable")
READ = 0

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


# -- whoever knocks


def knock(device: vdusefast.Device) -> socket.socket:
    """Return a connection to the relay, as a worker has it."""
    assert device._relay is not None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(10)
    sock.connect(f"/proc/self/fd/{device._relay.socket_fd}")
    return sock


def memory(size: int = SLOTS * CHUNK, *, sealed: bool = True) -> int:
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if sealed:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def is_hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(4096) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    ("hello", "size", "sealed"),
    [
        (struct.pack("=III", MAGIC + 1, 0, SLOTS), SLOTS * CHUNK, True),
        (struct.pack("=III", MAGIC, 2, SLOTS), SLOTS * CHUNK, True),
        (struct.pack("=III", MAGIC, 0, SLOTS + 1), SLOTS * CHUNK, True),
        (struct.pack("=III", MAGIC, 0, SLOTS), SLOTS * CHUNK - 1, True),
        (struct.pack("=III", MAGIC, 0, SLOTS), SLOTS * CHUNK, False),
        (struct.pack("=II", MAGIC, 0), SLOTS * CHUNK, True),
        (struct.pack("=III", MAGIC, 0, SLOTS), -1, True),
        (b"x", -1, True),
    ],
)
def test_stranger_is_sent_away_and_workers_are_served(tmp_path: Path, hello: bytes, size: int, sealed: bool) -> None:
    with relayed(tmp_path) as (device, driver):
        driver.write(0, b"a" * BLOCK)
        pid = relay_pid(device)
        fd = memory(size, sealed=sealed) if size >= 0 else -1
        with knock(device) as sock:
            if fd >= 0:
                socket.send_fds(sock, [hello], [fd])
                os.close(fd)
            else:
                sock.send(hello)
            assert is_hung_up(sock)
        assert driver.read(0, BLOCK, queue=1) == b"a" * BLOCK
        assert relay_pid(device) == pid


@pytest.mark.parametrize(
    ("offset", "length", "slot", "operation"),
    [(0, BLOCK, SLOTS, READ), (0, BLOCK, 65535, READ), (0, BLOCK, 0, 5), (0, CHUNK + 1, 0, READ), (0, 1 << 40, 0, 1)],
)
def test_guest_that_asks_for_what_cannot_be_is_sent_away(
    tmp_path: Path, offset: int, length: int, slot: int, operation: int
) -> None:
    """It has come before the next worker of a queue; nobody may ask for more than that one could."""
    with relayed(tmp_path) as (device, driver):
        driver.write(0, b"a" * BLOCK)
        worker, fd = device.queues()[1].pid, memory()
        os.kill(worker, signal.SIGSTOP)
        with knock(device) as sock:
            socket.send_fds(sock, [struct.pack("=III", MAGIC, 1, SLOTS)], [fd])
            os.close(fd)
            os.kill(worker, signal.SIGKILL)
            os.kill(worker, signal.SIGCONT)
            assert sock.recv(4096) == struct.pack("=I", MAGIC)
            sock.send(struct.pack("=QQHBBI", offset, length, slot, operation, 0, 0))
            assert is_hung_up(sock)
        assert driver.read(0, BLOCK, queue=1) == b"a" * BLOCK
