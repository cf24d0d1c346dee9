"""JSON-RPC over the run directory's socket: answers, errors, limits, and clients that misbehave."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vdusefast import errors
from vdusefast.host import processes, run_dirs
from vdusefast.server import registry, rpc, rpc_client
from vdusefast.server.rpc import Method, NoParams, RpcServer
from vdusefast.server.rpc_client import NoServerError, RpcClient
from vdusefast.state import run_dir


class EchoParams(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    times: int = 1


def refuse(_: NoParams) -> None:
    raise errors.DeviceBusyError("vd0: mounted on /mnt")


def fail(_: NoParams) -> None:
    raise RuntimeError("a bug")


METHODS: dict[str, Method[Any]] = {
    "echo": Method(EchoParams, lambda params: params.text * params.times),
    "refuse": Method(NoParams, refuse),
    "fail": Method(NoParams, fail),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / ("deep" * 30) / "vd0"  # longer than a socket's address may be
    path.mkdir(parents=True, mode=0o700)
    return path


@pytest.fixture
def server(directory: Path) -> Iterator[RpcServer]:
    with RpcServer(directory, METHODS) as server:
        yield server


def raw(directory: Path) -> socket.socket:
    """Return a plain connection to the server."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(5)
    fd = os.open(directory, os.O_RDONLY)
    connection.connect(rpc.socket_address(fd))
    os.close(fd)
    return connection


def ask(connection: socket.socket, line: bytes) -> dict[str, Any]:
    connection.sendall(line)
    answer = rpc.LineReader(connection, 1 << 20).read(5)
    assert answer is not None
    found: dict[str, Any] = json.loads(answer)
    assert found["jsonrpc"] == "2.0"
    return found


def test_call_is_answered(server: RpcServer, directory: Path) -> None:
    with RpcClient(directory) as client:
        assert client.server_pid == os.getpid()
        assert client.call("echo", {"text": "ab", "times": 2}) == "abab"
        assert client.call("echo", {"text": "c"}) == "c"


def test_socket_is_private(server: RpcServer, directory: Path) -> None:
    assert (directory / "socket").stat().st_mode & 0o777 == 0o600


def test_stale_socket_is_replaced(directory: Path) -> None:
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fd = os.open(directory, os.O_RDONLY)
    stale.bind(rpc.socket_address(fd))
    os.close(fd)
    stale.close()
    with pytest.raises(NoServerError):
        RpcClient(directory)
    with RpcServer(directory, METHODS), RpcClient(directory) as client:
        assert client.call("echo", {"text": "x"}) == "x"


def test_device_error_keeps_its_exit_status_and_the_connection_goes_on(server: RpcServer, directory: Path) -> None:
    with RpcClient(directory) as client:
        with pytest.raises(errors.DeviceBusyError, match=r"^vd0: mounted on /mnt$"):
            client.call("refuse")
        assert client.call("echo", {"text": "x"}) == "x"


def test_bug_in_a_method_is_an_error_and_no_end(
    server: RpcServer, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RpcClient(directory) as client:
        with pytest.raises(errors.VdusefastError, match="vd0: fail: RuntimeError: a bug"):
            client.call("fail")
        assert client.call("echo", {"text": "x"}) == "x"
    assert "fail failed" in caplog.text


@pytest.mark.parametrize(
    ("line", "code", "stays"),
    [
        (b"rubbish\n", rpc.PARSE_ERROR, False),
        (b"\xff\xfe\n", rpc.PARSE_ERROR, False),
        (b"[]\n", rpc.INVALID_REQUEST, False),
        (b'{"jsonrpc": "1.0", "method": "echo", "id": 1}\n', rpc.INVALID_REQUEST, False),
        (b'{"jsonrpc": "2.0", "method": 5, "id": 1}\n', rpc.INVALID_REQUEST, False),
        (b'{"jsonrpc": "2.0", "method": "nothing", "id": 1}\n', rpc.METHOD_NOT_FOUND, True),
        (b'{"jsonrpc": "2.0", "method": "echo", "id": 1}\n', rpc.INVALID_PARAMS, True),
        (b'{"jsonrpc": "2.0", "method": "echo", "params": {"txt": 1}, "id": 1}\n', rpc.INVALID_PARAMS, True),
        (b'{"jsonrpc": "2.0", "method": "refuse", "params": {}, "id": "a"}\n', rpc.DEVICE_ERROR, True),
        (b"x" * (rpc.REQUEST_MAX_BYTES + rpc.RECEIVE_BYTES + 1), rpc.INVALID_REQUEST, False),
    ],
)
def test_error_answers(server: RpcServer, directory: Path, line: bytes, code: int, stays: bool) -> None:
    with raw(directory) as connection:
        answer = ask(connection, line)
        assert answer["error"]["code"] == code
        assert answer["error"]["data"]["exit_code"] == {rpc.DEVICE_ERROR: 4, rpc.INVALID_PARAMS: 2}.get(code, 1)
        if stays:
            good = b'{"jsonrpc": "2.0", "method": "echo", "params": {"text": "y"}, "id": 7}\n'
            assert ask(connection, good) == {"jsonrpc": "2.0", "result": "y", "id": 7}
        else:
            with pytest.raises((ConnectionResetError, IndexError)):
                _ = connection.recv(1)[0]


def test_notification_is_not_answered(server: RpcServer, directory: Path) -> None:
    with raw(directory) as connection:
        connection.sendall(b'{"jsonrpc": "2.0", "method": "refuse"}\n')
        answer = ask(connection, b'{"jsonrpc": "2.0", "method": "echo", "params": {"text": "y"}, "id": 2}\n')
        assert answer["id"] == 2


def test_two_calls_in_one_packet_are_both_answered(server: RpcServer, directory: Path) -> None:
    line = b'{"jsonrpc": "2.0", "method": "echo", "params": {"text": "%d"}, "id": %d}\n'
    with raw(directory) as connection:
        connection.sendall(line % (1, 1) + line % (2, 2))
        lines = rpc.LineReader(connection, 1 << 20)
        assert [json.loads(lines.read(5) or b"")["result"] for _ in range(2)] == ["1", "2"]


def test_silent_and_slow_clients_are_hung_up_on(directory: Path) -> None:
    """A byte now and then does not keep a place: the limit is for a whole message."""
    with RpcServer(directory, METHODS, idle_timeout_s=0.5), raw(directory) as silent, raw(directory) as slow:
        began = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            while time.monotonic() < began + 20:
                slow.sendall(b"x")
                time.sleep(0.05)
        assert silent.recv(1) == b""


def test_client_that_does_not_read_disturbs_nobody(directory: Path) -> None:
    methods = {**METHODS, "big": Method(NoParams, lambda _: "x" * (4 << 20))}
    with RpcServer(directory, methods) as server, raw(directory) as lazy, RpcClient(directory) as client:
        lazy.sendall(b'{"jsonrpc": "2.0", "method": "big", "id": 1}\n')
        assert client.call("echo", {"text": "x"}) == "x"
        client.close()
        server.close()


def test_clients_are_limited(server: RpcServer, directory: Path) -> None:
    taken = [raw(directory) for _ in range(rpc.CLIENT_COUNT_MAX)]
    try:
        for connection in taken:
            ask(connection, b'{"jsonrpc": "2.0", "method": "echo", "params": {"text": "x"}, "id": 1}\n')
        with (
            RpcClient(directory) as client,
            pytest.raises(errors.VdusefastError, match="clients are connected already"),
        ):
            client.call("echo", {"text": "x"})
    finally:
        for connection in taken:
            connection.close()
    deadline = time.monotonic() + 5
    while True:
        try:
            with RpcClient(directory) as client:
                assert client.call("echo", {"text": "x"}) == "x"
            return
        except errors.VdusefastError:
            assert time.monotonic() < deadline


def test_other_users_are_refused(server: RpcServer, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "peer_of", lambda _: (4711, os.geteuid() + 1))
    with RpcClient(directory) as client, pytest.raises(errors.VdusefastError, match="may not command this device"):
        client.call("echo", {"text": "x"})


def test_client_that_cannot_be_taken_is_told_and_the_next_one_is_served(
    server: RpcServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with RpcClient(directory) as client, pytest.raises(errors.VdusefastError, match="cannot take a client now"):
            client.call("echo", {"text": "x"})
    with RpcClient(directory) as client:
        assert client.call("echo", {"text": "x"}) == "x"


def test_client_that_cannot_be_told_apart_is_hung_up_on(
    server: RpcServer, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: socket.socket) -> tuple[int, int]:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(rpc, "peer_of", fail)
        with raw(directory) as connection:
            assert connection.recv(1) == b""
    assert "cannot serve a client" in caplog.text
    with RpcClient(directory) as client:
        assert client.call("echo", {"text": "x"}) == "x"


def test_call_that_runs_is_answered_although_the_server_closes(directory: Path) -> None:
    """`delete` needs this: its own success ends the server."""
    entered, leave = threading.Event(), threading.Event()

    def slow(_: NoParams) -> str:
        entered.set()
        leave.wait(5)
        return "done"

    server = RpcServer(directory, {"slow": Method(NoParams, slow)})
    server.start()
    with RpcClient(directory) as client:
        client.send("slow")
        assert entered.wait(5)
        closing = threading.Thread(target=server.close)
        closing.start()
        leave.set()
        assert client.receive(5) == "done"
        closing.join()
    with pytest.raises(NoServerError):
        RpcClient(directory)


def test_close_hangs_up_on_idle_clients_at_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for them, as it does for a call that runs."""
    monkeypatch.setattr(rpc, "JOIN_TIMEOUT_S", 50.0)
    server = RpcServer(directory, METHODS)
    server.start()
    with raw(directory) as connection:
        ask(connection, b'{"jsonrpc": "2.0", "method": "echo", "params": {"text": "x"}, "id": 1}\n')
        began = time.monotonic()
        server.close()
        server.close()
        assert time.monotonic() - began < rpc.JOIN_TIMEOUT_S / 2
        assert connection.recv(1) == b""


# -- the client against servers that are not ours


def fake_server(directory: Path, behave: Callable[[socket.socket], None]) -> threading.Thread:
    """Listen in `directory` for one client and let `behave` answer it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fd = os.open(directory, os.O_RDONLY)
    listener.bind(rpc.socket_address(fd))
    os.close(fd)
    listener.listen(1)

    def run() -> None:
        with listener, listener.accept()[0] as connection:
            behave(connection)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_client_gives_a_silent_server_up(directory: Path) -> None:
    done = threading.Event()
    thread = fake_server(directory, lambda _: assert_wait(done))
    with RpcClient(directory) as client, pytest.raises(errors.TimedOutError) as caught:
        client.call("info", timeout_s=0.1)
    done.set()
    thread.join()
    assert str(caught.value).startswith(f"vd0: its server (pid {os.getpid()}) did not answer within 0.1 s")


def assert_wait(event: threading.Event) -> None:
    assert event.wait(10)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(b"", "hung up without an answer"), (b"rubbish\n", "answered rubbish"), (b'{"id": "x"}\n', "answered rubbish")],
)
def test_client_names_a_server_that_breaks_the_rules(directory: Path, answer: bytes, message: str) -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(answer)

    thread = fake_server(directory, behave)
    with RpcClient(directory) as client, pytest.raises(errors.VdusefastError, match=message):
        client.call("info", timeout_s=5)
    thread.join()


def test_server_that_was_killed_takes_no_commands(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes connections for it until it has closed its sockets."""
    done = threading.Event()
    thread = fake_server(directory, lambda _: assert_wait(done))
    with monkeypatch.context() as patch:
        patch.setattr(processes, "is_ending", lambda pid: pid == os.getpid())
        with pytest.raises(NoServerError, match="is ending"):
            RpcClient(directory)
    done.set()
    thread.join()


@pytest.mark.parametrize("ends", [True, False])
def test_server_that_hangs_up_while_it_dies_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """The kernel closes the sockets of a killed server one by one; until then it still takes connections."""
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(run_dirs, "DYING_S", 5.0 if ends else 0.1)
    held = run_dir.RunDirectory("vd0", tmp_path)

    def behave(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.close()
        if ends:
            time.sleep(0.2)
            held.release()

    thread = fake_server(tmp_path / "vd0", behave)
    try:
        if ends:
            assert registry.describe("vd0")["state"] == "dead"
        else:
            with pytest.raises(rpc_client.HungUpError, match="hung up without an answer"):
                registry.describe("vd0")
    finally:
        thread.join()
        held.close()


def test_client_without_a_place_in_the_queue_says_so(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_client, "CONNECT_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        fd = os.open(directory, os.O_RDONLY)
        listener.bind(rpc.socket_address(fd))
        os.close(fd)
        listener.listen(0)
        first = RpcClient(directory)
        with first, pytest.raises(errors.TimedOutError, match="takes no connections"):
            RpcClient(directory)


def test_client_without_a_server_or_a_directory(directory: Path) -> None:
    with pytest.raises(NoServerError):
        RpcClient(directory)
    with pytest.raises(NoServerError):
        RpcClient(directory / "gone")
