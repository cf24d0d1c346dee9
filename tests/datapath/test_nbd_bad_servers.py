"""Servers that do what no NBD server should: each a clear line or a fresh connection, and never wrong data."""

from __future__ import annotations

import itertools
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from nbd_misdeeds import MISDEEDS, StaleCookies, half_of_the_data, twice
from nbd_rig import (
    ALL_FLAGS,
    MIB,
    READ,
    WRITE,
    Behaviour,
    CloseError,
    FakeServer,
    Request,
    nbdkit,
    served,
    simple_reply,
    unix_uri,
)
from verified_load import Load

from vdusefast.backends import nbd
from vdusefast.backends.plugin import StoreSpec
from vdusefast.errors import BackendError, ConfigError, VdusefastError

BLOCK = 4096
OPTION_REPLY = 0x3E889045565A9


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "s"


def option_reply(kind: int, body: bytes, *, magic: int = OPTION_REPLY, length: int | None = None) -> bytes:
    return struct.pack(">QIII", magic, 7, kind, len(body) if length is None else length) + body


def complaint(uri: str, **fields: object) -> str:
    """Return what is said of a store that cannot be described: one line that names it."""
    with pytest.raises(VdusefastError) as caught:
        nbd.describe(StoreSpec(uri, **fields))  # type: ignore[arg-type]
    text = str(caught.value)
    assert uri in text
    assert "\n" not in text
    return text


def test_uri_that_is_none_is_a_configuration_error() -> None:
    for uri in ("nbd:foo", "nbd+unix:///?sock=/x", "nbd://localhost:1/?socket=/x"):
        with pytest.raises(ConfigError, match=r"write for example nbd://"):
            nbd.describe(StoreSpec(uri))


def test_nobody_listens(tmp_path: Path) -> None:
    assert "nobody listens there; start the server" in complaint(unix_uri(tmp_path / "none"))
    assert "nobody listens there; start the server" in complaint("nbd://127.0.0.1:1/")


def test_what_listens_is_no_nbd_server(sock: Path) -> None:
    with FakeServer(sock, Behaviour(greeting=b"SSH-2.0-OpenSSH_9.2 and more\r\n")) as server:
        assert "no NBD server" in complaint(server.uri)


def test_server_that_hangs_in_the_handshake(sock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "HANDSHAKE_LIMIT_S", 0.3)
    for where in ("greeting", "option"):
        with FakeServer(sock, Behaviour(hang_at=where)) as server:
            began = time.monotonic()
            assert "has not finished the handshake within 0.3 s" in complaint(server.uri)
            assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (Behaviour(greeting=b""), "hung up|handshake within"),
        (Behaviour(greeting=b"NBDMAGIC" + b"\xff" * 10), "no NBD server|handshake failed"),
        (Behaviour(go_reply=b"\xde\xad" * 10), "handshake failed|no NBD server"),
        (Behaviour(go_reply=option_reply(1, b"")), "does not report the size of its export; correct the server"),
        (Behaviour(go_reply=option_reply(3, bytes(2))), "handshake failed"),
        (Behaviour(go_reply=option_reply(3, b"", length=1 << 31)), "handshake failed"),
        (Behaviour(refuse=(0x80000002, "not for you")), "policy"),
        (Behaviour(refuse=(0x80000005, "")), "TLS.*write nbds://"),
        (Behaviour(refuse=(0x80000007, "")), "shutting down"),
        (Behaviour(refuse=(0x8000FFFF, "odd")), "handshake failed"),
        (Behaviour(size=0), "the export is empty"),
        (Behaviour(size=MIB + 100), "no multiple of its block size 512; make the server's store 1049088 bytes"),
        (Behaviour(flags=ALL_FLAGS | 2), "read-only; set read_only"),
    ],
    ids=lambda value: None,
)
def test_handshake_that_goes_wrong_is_told(
    sock: Path, behaviour: Behaviour, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "HANDSHAKE_LIMIT_S", 1)
    with FakeServer(sock, behaviour) as server:
        text = complaint(server.uri)
    assert re.search(said, text), text


def test_export_that_is_not_there_is_told_with_those_that_are(sock: Path) -> None:
    with FakeServer(sock, Behaviour(exports=("disk", "tape"))) as server:
        assert "it has 'disk', 'tape'" in complaint(server.uri)
        assert nbd.describe(StoreSpec(unix_uri(sock, "tape"))).size_bytes == 8 * MIB


def test_server_without_tls_that_is_asked_for_it(sock: Path) -> None:
    with nbdkit(sock, "memory", "8M"):
        assert "refused TLS" in complaint(unix_uri(sock, scheme="nbds+unix"))


def test_description_is_what_the_export_says(sock: Path) -> None:
    with FakeServer(sock, Behaviour(blocks=(1024, 65536, 1 << 20))) as server:
        described = nbd.describe(StoreSpec(server.uri))
    assert (described.block_size_bytes, described.physical_block_size_bytes) == (1024, 4096)
    assert described.opt_io_size_bytes == 65536
    assert (described.can_discard, described.can_write_zeroes, described.shareable) == (True, True, True)
    with FakeServer(sock, Behaviour(flags=1 | 2)) as server:
        described = nbd.describe(StoreSpec(server.uri, read_only=True))
    assert described.read_only
    assert (described.can_discard, described.can_write_zeroes, described.shareable) == (False, False, False)


def test_device_is_not_made_over_a_bad_server(sock: Path) -> None:
    said = "the export is empty; give the server's store a size"
    with FakeServer(sock, Behaviour(size=0)) as server, pytest.raises(BackendError, match=said), served(server.uri):
        pass


def test_usability_names_the_library() -> None:
    usable = nbd.usability()
    assert usable.ok
    assert usable.text.startswith("libnbd 1.")


def test_paths_in_a_uri_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert nbd.absolute_uri("nbd+unix:///name?socket=dir/s") == f"nbd+unix:///name?socket={tmp_path}/dir/s"
    assert nbd.absolute_uri("nbds://h:1/x?tls-psk-file=k") == f"nbds://h:1/x?tls-psk-file={tmp_path}/k"
    assert nbd.absolute_uri("nbd://h") == "nbd://h"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        pytest.param(bad, kind, id=f"{bad.__name__}-{kind}")
        for bad in MISDEEDS
        for kind in (READ, WRITE)
        if (bad, kind) != (half_of_the_data, WRITE)  # a write has none: that would be an answer
    ],
)
def test_what_makes_no_sense_costs_the_connection_and_no_request(
    sock: Path, bad: Callable[[socket.socket, Request], None], kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    met = []

    def behave(connection: socket.socket, request: Request) -> bool:
        if request.kind != kind or len(met) >= 2:
            return False
        met.append(request)
        bad(connection, request)
        return True

    with FakeServer(sock, Behaviour(on_request=behave)) as server, served(server.uri) as (device, driver):
        server.data[:] = data = os.urandom(len(server.data))
        if kind == WRITE:
            driver.write(BLOCK, b"w" * BLOCK)
            data = data[:BLOCK] + b"w" * BLOCK + data[2 * BLOCK :]
        assert driver.read(0, 4 * BLOCK) == data[: 4 * BLOCK]
        assert bytes(server.data[: 4 * BLOCK]) == data[: 4 * BLOCK]
        assert device.failure is None
    assert len(met) == 2
    assert "the connection is lost" in caplog.text
    assert server.uri in caplog.text


@pytest.mark.slow
def test_second_answer_to_one_request_costs_the_connection(sock: Path) -> None:
    met = []

    def behave(connection: socket.socket, request: Request) -> bool:
        if met:
            return False
        met.append(request)
        twice(connection, request)
        return True

    with FakeServer(sock, Behaviour(on_request=behave)) as server, served(server.uri) as (device, driver):
        with pytest.raises(OSError, match="request type 0"):
            driver.read(0, BLOCK)  # the answer was an error
        assert driver.read(0, BLOCK) == bytes(BLOCK)
        assert device.failure is None


@pytest.mark.slow
@pytest.mark.parametrize("error", [1, 5, 12, 22, 28, 75, 95, 0xDEAD])
def test_errors_of_a_server_are_errors_of_the_request(sock: Path, error: int) -> None:
    def behave(connection: socket.socket, request: Request) -> bool:
        if request.offset:
            return False
        connection.sendall(simple_reply(request, error))
        return True

    with FakeServer(sock, Behaviour(on_request=behave)) as server, served(server.uri) as (device, driver):
        with pytest.raises(OSError, match="request type 1"):
            driver.write(0, b"a" * BLOCK)
        driver.write(BLOCK, b"b" * BLOCK)
        assert driver.read(BLOCK, BLOCK) == b"b" * BLOCK
        assert server.connection_count == 2
        assert device.stats().counters["host_errors"] == 1


@pytest.mark.slow
def test_request_that_kills_every_connection_ends_with_an_error(sock: Path, caplog: pytest.LogCaptureFixture) -> None:
    def behave(connection: socket.socket, request: Request) -> bool:
        if request.offset == 0 and request.kind == READ:
            raise CloseError
        return False

    with FakeServer(sock, Behaviour(on_request=behave)) as server, served(server.uri) as (_, driver):
        with pytest.raises(OSError, match="request type 0"):
            driver.read(0, BLOCK)
        assert driver.read(BLOCK, BLOCK) == bytes(BLOCK)
    assert "connections have died with a request at 0; it ends with an error" in caplog.text


@pytest.mark.slow
def test_answers_to_requests_of_earlier_connections_write_nothing(sock: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The request has ended with an error; its memory is the driver's again when its cookie is answered."""
    stale = StaleCookies()
    far = 4 * MIB

    def behave(connection: socket.socket, request: Request) -> bool:
        if request.kind == READ and request.offset >= far:
            stale.keep(connection, request)
            raise CloseError
        return stale.answer(connection)

    with FakeServer(sock, Behaviour(on_request=behave)) as server, served(server.uri) as (device, driver):
        region, ring = driver.add_region(2 * BLOCK), driver.ring(0)
        struct.pack_into("<IIQ", region.buf, BLOCK, 0, 0, far // 512)
        header = (region.iova + BLOCK, 16, False)
        ring.add([header, (region.iova, BLOCK, True), (region.iova + BLOCK + 16, 1, True)], 0)
        ring.publish()
        deadline = time.monotonic() + 30
        while not (ring.wait(50) and ring.reap()):
            assert time.monotonic() < deadline
        assert region.buf[BLOCK + 16] == 1  # IOERR
        region.buf[:BLOCK] = b"G" * BLOCK
        assert driver.read(0, BLOCK) == bytes(BLOCK)
        assert stale.answered_count > 1
        assert bytes(region.buf[:BLOCK]) == b"G" * BLOCK
        assert device.queues()[0].restarts == 0
    assert "the server replies to a request that was not sent" in caplog.text


@pytest.mark.slow
def test_no_cookie_can_be_told_from_earlier_ones(sock: Path) -> None:
    with FakeServer(sock, Behaviour()) as server:
        for _ in range(2):
            with served(server.uri) as (_, driver):
                for _ in range(40):
                    driver.read(0, BLOCK)
        cookies = [request.cookie >> 16 for request in server.requests if request.kind == READ]
    assert len(set(cookies)) == len(cookies) == 80
    steps = {after - before for before, after in itertools.pairwise(cookies)}
    assert len(steps) == len(cookies) - 1
    ones = sum(cookie.bit_count() for cookie in cookies) / len(cookies)
    assert 20 < ones < 28  # of 48 random bits


@pytest.mark.slow
def test_answers_in_pieces_and_out_of_order_are_put_together(sock: Path) -> None:
    chance, lock = random.Random(7), threading.Lock()

    def answer(connection: socket.socket, request: Request) -> None:
        time.sleep(chance.random() * 0.005)
        text = simple_reply(request, 0)
        with lock:
            if request.kind == WRITE:
                server.data[request.offset : request.offset + request.length] = request.data
            elif request.kind == READ:
                text += bytes(server.data[request.offset : request.offset + request.length])
            for at in range(0, len(text), 1499):
                connection.sendall(text[at : at + 1499])

    with ThreadPoolExecutor(4) as pool:

        def behave(connection: socket.socket, request: Request) -> bool:
            pool.submit(answer, connection, request)
            return True

        with FakeServer(sock, Behaviour(on_request=behave)) as server, served(server.uri) as (device, driver):
            load = Load(driver, seconds=0.7)
            load.check()
            data = os.urandom(MIB)
            driver.write(0, data)
            assert driver.read(0, MIB) == data
            assert device.failure is None
