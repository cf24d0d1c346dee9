"""The NBD engine over servers that do what they should: data, flags, block sizes, loss and return."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nbd_rig import (
    ALL_FLAGS,
    FLAG_FUA,
    FLAG_MULTI_CONN,
    FLAG_TRIM,
    FLAG_ZERO,
    FLUSH,
    MIB,
    READ,
    TRIM,
    WRITE,
    ZERO,
    Behaviour,
    FakeServer,
    Request,
    kept_nbdkit,
    nbdkit,
    nbdkit_tcp,
    qemu_nbd,
    served,
    simple_reply,
    verified_fio,
)
from verified_load import Load

from vdusefast import Device
from vdusefast.errors import VdusefastError

SIZE = 8 * MIB
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "s"


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout_s} s: {what}"
        time.sleep(0.01)


def kill_worker(device: Device) -> None:
    """Kill the worker of the first queue and wait for the next one."""
    pid = device.queues()[0].pid
    assert pid > 0
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: device.queues()[0].pid not in (pid, -1), "another worker")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "filters"),
    [
        ("memory", ()),
        ("memory", ("--filter=multi-conn", "multi-conn-mode=disable")),
        ("memory", ("--filter=fua", "fuamode=emulate")),
        ("memory", ("--filter=nozero",)),
        (
            "memory",
            (
                "--filter=blocksize-policy",
                "blocksize-minimum=4096",
                "blocksize-preferred=4096",
                "blocksize-maximum=8192",
                "blocksize-error-policy=error",
            ),
        ),
        ("file", ()),
    ],
    ids=["memory", "one-connection", "fua-emulated", "no-zero", "block-sizes", "file"],
)
@pytest.mark.parametrize("block", ["4k", "64k"])
def test_everything_that_is_written_is_read_back(
    sock: Path, image: Path, plugin: str, filters: tuple[str, ...], block: str
) -> None:
    options = tuple(word for word in filters if word.startswith("--"))
    parameters = tuple(word for word in filters if not word.startswith("--"))
    store = (f"file={image}",) if plugin == "file" else ("8M",)
    with nbdkit(sock, plugin, *store, *parameters, options=options) as server:
        verified_fio(server.uri, f"--bs={block}", "--cache=writethrough" if block == "64k" else "--fsync=16")


@pytest.mark.slow
def test_segments_of_odd_lengths_go_together(sock: Path, image: Path) -> None:
    options = ("--filter=blocksize-policy",)
    words = ("blocksize-minimum=512", "blocksize-maximum=64K", "blocksize-error-policy=error")
    with nbdkit(sock, "file", f"file={image}", *words, options=options) as server, served(server.uri) as (_, driver):
        lengths = (100, 412, 1000, 24, 3584, 66000, 72, 2000, 100_000, 512, 1224 + 176)
        assert sum(lengths) % 512 == 0
        payload = os.urandom(sum(lengths))
        region = driver.add_region(MIB)
        for kind, writable in ((1, False), (0, True)):
            region.buf[:16] = kind.to_bytes(4, "little") + bytes(4) + (9).to_bytes(8, "little")
            at, chain = BLOCK, [(region.iova, 16, False)]
            for place, length in enumerate(lengths):
                if not writable:
                    start = sum(lengths[:place])
                    region.buf[at : at + length] = payload[start : start + length]
                chain.append((region.iova + at, length, writable))
                at += length + 300  # apart, so that nothing can be taken for one segment
            driver.submit_chain([*chain, (region.iova + 512, 1, True)])
            assert region.buf[512] == 0
        assert image.read_bytes()[9 * 512 :][: len(payload)] == payload
        found = b"".join(bytes(region.buf[iova - region.iova :][:length]) for iova, length, _ in chain[1:])
        assert found == payload


def test_discard_and_zeroes_reach_the_store(sock: Path) -> None:
    with FakeServer(sock, Behaviour()) as server, served(server.uri) as (_, driver):
        driver.write(0, b"\xff" * MIB)
        driver.write_zeroes(BLOCK, BLOCK)
        driver.write_zeroes(4 * BLOCK, BLOCK, unmap=True)
        driver.discard(8 * BLOCK, BLOCK)
        asked = [
            (request.kind, request.flags, request.offset) for request in server.requests if request.kind in (TRIM, ZERO)
        ]
        assert asked == [(ZERO, 2, BLOCK), (ZERO, 0, 4 * BLOCK), (TRIM, 0, 8 * BLOCK)]
        assert driver.read(0, 2 * BLOCK) == b"\xff" * BLOCK + bytes(BLOCK)


@pytest.mark.slow
def test_what_the_server_cannot_do_is_not_offered(sock: Path) -> None:
    with (
        FakeServer(sock, Behaviour(flags=ALL_FLAGS & ~(FLAG_TRIM | FLAG_ZERO))) as server,
        served(server.uri) as (_, driver),
    ):
        for ask in (driver.discard, driver.write_zeroes):
            with pytest.raises(OSError, match="not supported"):
                ask(0, BLOCK)
        assert not [request for request in server.requests if request.kind in (TRIM, ZERO)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "flags", "expected"),
    [
        ("writeback", ALL_FLAGS, [(WRITE, 0), (FLUSH, 0)]),
        ("writethrough", ALL_FLAGS, [(WRITE, 1), (FLUSH, 0)]),
        ("writethrough", ALL_FLAGS & ~FLAG_FUA, [(WRITE, 0), (FLUSH, 0), (FLUSH, 0)]),
        ("unsafe", ALL_FLAGS, [(WRITE, 0)]),
    ],
)
def test_durability_is_asked_for_as_the_server_can(
    sock: Path, cache: str, flags: int, expected: list[tuple[int, int]]
) -> None:
    with FakeServer(sock, Behaviour(flags=flags)) as server, served(server.uri, cache=cache) as (_, driver):
        driver.write(0, b"a" * BLOCK)
        driver.flush()
        done = [(request.kind, request.flags) for request in server.requests if request.kind in (WRITE, FLUSH)]
    # A writethrough device offers its driver no cache, so that a flush may have nothing to do.
    assert done[: len(expected) - 1] == expected[: len(expected) - 1]
    assert done[len(expected) - 1 :] in ([], expected[-1:])


@pytest.mark.slow
def test_read_only_export_is_served_read_only(sock: Path, image: Path) -> None:
    image.write_bytes(b"r" * SIZE)
    with nbdkit(sock, "file", f"file={image}", options=("--readonly",)) as server:
        with pytest.raises(VdusefastError, match=r"read-only; set read_only"), served(server.uri):
            pass
        with served(server.uri, read_only=True) as (_, driver):
            assert driver.read(0, BLOCK) == b"r" * BLOCK
            with pytest.raises((OSError, VdusefastError)):
                driver.write(0, b"w" * BLOCK)


def test_error_of_the_server_is_an_error_of_that_request_alone(sock: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "broken"
    options = ("--filter=error",)
    words = ("memory", "8M", "error=EIO", "error-rate=100%", f"error-file={trigger}")
    with nbdkit(sock, *words, options=options) as server, served(server.uri) as (device, driver):
        driver.write(0, b"a" * BLOCK)
        trigger.touch()
        with pytest.raises(OSError, match="request type 0"):
            driver.read(0, BLOCK)
        trigger.unlink()
        assert driver.read(0, BLOCK) == b"a" * BLOCK
        assert device.stats().counters["host_eio"] == 1


@pytest.mark.slow
def test_delays_of_a_server_keep_every_block_right(sock: Path) -> None:
    words = ("memory", "8M", "rdelay=2ms", "wdelay=5ms")
    with nbdkit(sock, *words, options=("--filter=delay",)) as server:
        verified_fio(server.uri)


@pytest.mark.slow
@pytest.mark.parametrize("queues", [1, 2])
def test_server_killed_and_restarted_under_load_is_a_pause(
    sock: Path, image: Path, queues: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vdusefast")
    with nbdkit(sock, "file", f"file={image}") as server, served(server.uri, queues=queues) as (device, driver):
        load = Load(driver, seconds=2.5)
        for _ in range(4):
            time.sleep(0.3)
            server.stop(signal.SIGKILL)
            time.sleep(0.1)
            server.start()
        load.check()
        assert device.failure is None
        assert all(queue.restarts == 0 for queue in device.queues())
        wait_until(lambda: "reconnected after" in caplog.text, "a line in the log")
    assert "the connection is lost" in caplog.text
    assert server.uri in caplog.text


@pytest.mark.slow
def test_loss_beyond_the_limit_is_an_error_and_the_return_of_the_server_ends_it(
    sock: Path, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with nbdkit(sock, "file", f"file={image}") as server, served(server.uri, reconnect_s=0.5) as (device, driver):
        driver.write(0, b"a" * BLOCK)
        server.stop()
        began = time.monotonic()
        with pytest.raises(OSError, match="request type 0"):
            driver.read(0, BLOCK)
        assert time.monotonic() - began > 0.4
        began = time.monotonic()
        for _ in range(20):  # each of them would wait, too
            with pytest.raises(OSError, match="request type 0"):
                driver.read(0, BLOCK)
        assert time.monotonic() - began < 20 * 0.5 / 2
        server.start()
        wait_until(lambda: "reconnected" in caplog.text, "the device finds its server")
        assert driver.read(0, BLOCK) == b"a" * BLOCK
        assert device.failure is None
    assert "requests end with errors until there is one" in caplog.text


@pytest.mark.slow
def test_loss_is_noticed_while_nothing_is_asked(sock: Path, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    with nbdkit(sock, "file", f"file={image}") as server, served(server.uri) as (_, driver):
        driver.read(0, BLOCK)
        server.stop()
        wait_until(lambda: "the connection is lost" in caplog.text, "the loss is noticed")
        server.start()
        wait_until(lambda: "reconnected" in caplog.text, "the connection is back")


@pytest.mark.slow
def test_worker_does_not_wait_for_a_server_that_is_away(sock: Path, image: Path) -> None:
    with nbdkit(sock, "file", f"file={image}") as server, served(server.uri) as (device, driver):
        driver.write(0, b"a" * BLOCK)
        server.stop()
        kill_worker(device)
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(driver.read(0, BLOCK)))
        thread.start()
        time.sleep(0.3)
        assert not found
        server.start()
        thread.join(10)
        assert found == [b"a" * BLOCK]


@pytest.mark.slow
def test_worker_killed_under_load_loses_nothing(sock: Path, image: Path) -> None:
    with kept_nbdkit(sock, "file", f"file={image}") as server, served(server.uri) as (device, driver):
        load = Load(driver, seconds=1.5)
        for _ in range(3):
            time.sleep(0.3)
            kill_worker(device)
        load.check()
        assert device.failure is None


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "relay"])
def test_write_of_a_killed_process_ends_before_it_is_repeated(sock: Path, victim: str) -> None:
    """Else a server that is slow would carry it out again, over what was written to the same place afterwards."""
    order: list[str] = []

    def slow(connection: socket.socket, request: Request) -> bool:
        if request.kind != WRITE:
            return False
        order.append("slow begins")
        time.sleep(0.8)
        server.data[request.offset : request.offset + request.length] = request.data
        order.append("slow ends")
        connection.sendall(simple_reply(request, 0))
        return True

    def quick(connection: socket.socket, request: Request) -> bool:
        if request.kind == WRITE:
            order.append("quick")
        return False

    flags = ALL_FLAGS if victim == "worker" else ALL_FLAGS & ~FLAG_MULTI_CONN
    behaviours = [Behaviour(flags=flags, on_request=on_request) for on_request in (lambda *_: False, slow, quick)]
    queues = 1 if victim == "worker" else 2
    with FakeServer(sock, *behaviours) as server, served(server.uri, queues=queues) as (device, driver):
        thread = threading.Thread(target=lambda: driver.write(0, b"a" * BLOCK))
        thread.start()
        wait_until(lambda: order == ["slow begins"], "the first write is there")
        if victim == "worker":
            kill_worker(device)
        else:
            os.kill(device.info()["relay_pid"], signal.SIGKILL)
        thread.join(10)
        driver.write(0, b"b" * BLOCK)
        time.sleep(1.0)
        assert driver.read(0, BLOCK) == b"b" * BLOCK
    assert order == ["slow begins", "slow ends", "quick", "quick"]


@pytest.mark.slow
def test_request_without_an_answer_ends_with_an_error_after_its_time(
    sock: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()

    def late(connection: socket.socket, request: Request) -> bool:
        if request.kind == READ and request.offset == BLOCK:
            answers.wait(20)
        return False

    behaviours = (
        Behaviour(),
        Behaviour(on_request=late),
        Behaviour(),
    )  # of the probe's connection, the first, the next
    # Time enough for the request that is answered, by a server that is a thread of a busy machine.
    with FakeServer(sock, *behaviours) as server, served(server.uri, timeout_s=3.0) as (_, driver):
        server.data[0:BLOCK] = b"x" * BLOCK
        began = time.monotonic()
        with pytest.raises(OSError, match="request type 0"):
            driver.read(BLOCK, BLOCK)
        assert time.monotonic() - began > 2.9
        answers.set()
        assert driver.read(0, BLOCK) == b"x" * BLOCK
        assert server.connection_count == 3
    assert "had no reply for 3.0 s" in caplog.text


@pytest.mark.slow
def test_qcow2_of_qemu_nbd_is_right_and_stays_sound(sock: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M"], check=True)
    server = qemu_nbd(sock, image, "--format=qcow2", "--discard=unmap")
    with server:
        verified_fio(server.uri, "--fsync=32")
        with served(server.uri, queues=2) as (_, driver):
            driver.discard(0, MIB)
            driver.write_zeroes(MIB, MIB)
            load = Load(driver, seconds=1.0)
            time.sleep(0.3)
            server.stop(signal.SIGTERM)
            server.start()
            load.check()
        server.stop(signal.SIGTERM)
    subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)


@pytest.mark.slow
def test_larger_export_after_a_reconnect_makes_the_device_larger(sock: Path, image: Path) -> None:
    with nbdkit(sock, "file", f"file={image}") as server, served(server.uri) as (_, driver):
        driver.write(0, b"a" * BLOCK)
        server.stop()
        os.truncate(image, 2 * SIZE)
        server.start()
        wait_until(lambda: driver.capacity_bytes == 2 * SIZE, "the device follows")
        driver.write(2 * SIZE - BLOCK, b"z" * BLOCK)
        assert driver.read(0, BLOCK) == b"a" * BLOCK


@pytest.mark.slow
def test_device_resized_on_request_reaches_what_the_old_connection_did_not_have(sock: Path, image: Path) -> None:
    # nbdkit's file plugin looks at the size for each connection.
    with nbdkit(sock, "file", f"file={image}") as server, served(server.uri) as (device, driver):
        driver.write(0, b"a" * BLOCK)
        os.truncate(image, 2 * SIZE)
        assert device.resize() == 2 * SIZE
        wait_until(lambda: driver.capacity_bytes == 2 * SIZE, "the device follows")
        driver.write(2 * SIZE - BLOCK, b"z" * BLOCK)
        assert driver.read(2 * SIZE - BLOCK, BLOCK) == b"z" * BLOCK


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "said", "queues"),
    [
        (Behaviour(size=4 * MIB), "the export has 4194304 bytes now, but the device has 8388608", 1),
        (Behaviour(size=8 * MIB + 512, blocks=(4096, 4096, MIB)), "bytes now, no multiple of its block size 4096", 1),
        (Behaviour(flags=ALL_FLAGS | 2), "the export is read-only now", 1),
        (Behaviour(blocks=(4096, 4096, MIB)), "has no blocks below 4096 bytes now", 2),  # which several would change
    ],
    ids=["smaller", "odd", "read-only", "blocks"],
)
def test_export_that_has_changed_is_refused_until_it_is_right_again(
    sock: Path, changed: Behaviour, said: str, queues: int, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        FakeServer(sock, Behaviour()) as server,
        served(server.uri, reconnect_s=30, queues=queues) as (device, driver),
    ):
        driver.write(0, b"a" * BLOCK)
        server.behave(changed)
        server.hang_up()
        wait_until(lambda: said in caplog.text, "the reason is told")
        server.behave(Behaviour())
        assert driver.read(0, BLOCK) == b"a" * BLOCK
        assert device.failure is None


@pytest.mark.slow
def test_plain_tcp(image: Path) -> None:
    with nbdkit_tcp("file", f"file={image}") as server:
        verified_fio(server.uri, "--queues=2")


@pytest.mark.slow
def test_memory_that_vanishes_under_the_socket_fails_that_request_alone(sock: Path) -> None:
    with FakeServer(sock, Behaviour()) as server, served(server.uri, queues=2) as (device, driver):
        driver.write(0, b"a" * BLOCK)
        data, header, status = (driver.add_region(BLOCK) for _ in range(3))
        header.buf[:16] = bytes(16)
        os.ftruncate(data.fd, 0)
        chain = [(header.iova, 16, False), (data.iova, BLOCK, True), (status.iova, 1, True)]
        driver.submit_chain(chain)
        wait_until(lambda: device.stats().counters["host_errors"] == 1 or device.failure is not None, "its end")
        assert driver.read(0, BLOCK, queue=1) == b"a" * BLOCK
        os.kill(device.queues()[0].pid, 0)
