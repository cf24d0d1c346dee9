"""Any wrong JSON or TOML from outside is answered with one error in plain words."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import msgspec
import pytest

from vdusefast.base.decoding import decode_json
from vdusefast.config import load_config, make_config
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.server import launch
from vdusefast.server.rpc import Method, NoParams, RpcServer
from vdusefast.server.rpc_client import RpcClient
from vdusefast.server.served_device import ResizeParams
from vdusefast.state import saved_state

DEEP = b"[" * 30000 + b"]" * 30000
WORTHLESS = {
    "deep": DEEP,
    "deep objects": b'{"a":' * 10000 + b"1" + b"}" * 10000,
    "open": b"[" * 30000,
    "digits": b"9" * 5000,
    "long": b'"' + b"x" * 60000 + b'"',
    "utf8": b'"\xff\xfe"',
    "surrogate": b'"\\ud800"',
    "nan": b"NaN",
    "infinity": b"1e999",
    "nothing": b"",
    "nul": b"\0",
}
worthless = pytest.mark.parametrize("text", WORTHLESS.values(), ids=WORTHLESS)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """Serve two methods in a run directory."""
    path = tmp_path / "d0"
    path.mkdir(mode=0o700)
    methods = {"ping": Method(NoParams, lambda _: "pong"), "resize": Method(ResizeParams, lambda p: p.size_bytes)}
    with RpcServer(path, methods):
        yield path


def ask(path: Path, line: bytes) -> dict[str, object]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(os.fspath(path / "socket"))
        connection.sendall(line + b"\n")
        with connection.makefile("rb") as answers:
            answer: dict[str, object] = json.loads(answers.readline())
            return answer


def is_quiet(caplog: pytest.LogCaptureFixture) -> bool:
    return not [record for record in caplog.records if record.levelno >= logging.WARNING]


@worthless
def test_worthless_request_is_answered_with_an_error(
    server: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for line in (
        text.replace(b"\n", b""),
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":%s}' % text,
        b'{"jsonrpc":"2.0","id":1,"method":%s}' % text,
        b'{"jsonrpc":"2.0","id":1,"method":"resize","params":{"size_bytes":%s}}' % text,
        b'{"jsonrpc":"2.0","id":%s,"method":"none"}' % text,
    ):
        assert "error" in ask(server, line[: 64 << 10])
    assert is_quiet(caplog)
    with RpcClient(server) as client:
        assert client.call("ping") == "pong"


@pytest.mark.parametrize("size", [-1, 1 << 63, 10**30, 1.5, True, "1"])
def test_size_that_is_none_is_refused(server: Path, size: object, caplog: pytest.LogCaptureFixture) -> None:
    with RpcClient(server) as client, pytest.raises(VdusefastError, match="size_bytes"):
        client.call("resize", {"size_bytes": size})
    assert is_quiet(caplog)


@worthless
@pytest.mark.parametrize("wrapped", ["%s", '{"id":1,"result":%s}', '{"id":1,"error":{"message":%s}}'])
def test_worthless_answer_is_one_error(tmp_path: Path, text: bytes, wrapped: str) -> None:
    answer = wrapped.encode() % text
    path = tmp_path / "d0"
    path.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path / "socket"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            is_fine = "result" in wrapped and text == WORTHLESS["long"]
            with RpcClient(path) as client, nullcontext() if is_fine else pytest.raises(VdusefastError):
                client.call("ping")
        finally:
            thread.join()


@worthless
def test_worthless_state_is_one_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "d0" / "state"
    path.parent.mkdir()
    for content in (text, b'{"version": 1, "config_space": %s}' % text, b'{"version": %s}' % text):
        path.write_bytes(content)
        with pytest.raises(VdusefastError, match="is not the state of this device"):
            saved_state.load(path)


@pytest.mark.parametrize(
    "text",
    [
        b"a=" + DEEP,
        b"a=" + b"{b=" * 5000,
        b"a=" + b"9" * 5000,
        b"a=nan",
        b'a="\xff"',
        b'[device]\nname="x"\nqueues=' + b"9" * 50,
        b'[device]\nname="x"\nqueues=inf',
        b'[device]\nname="x"\n[backend]\nuri="memory:1M"\ntimeout_s=nan',
        b'[device]\nname="' + b"x" * 10000 + b'"\n[backend]\nuri="memory:1M"',
        b"a.b" * 5000,
    ],
    ids=["deep", "tables", "digits", "nan", "utf8", "queues", "inf", "timeout", "name", "dots"],
)
def test_worthless_configuration_is_one_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "d0.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"d0\.toml"):
        load_config(path)


def test_worthless_report_of_a_server_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", str(tmp_path))
    code = f"import os, sys; os.write(int(sys.argv[2]), b'[' * 60000 + b'\\n'); sys.stdin.read()"  # noqa: F541
    with pytest.raises(VdusefastError, match="its server sent a report that cannot be read"):
        launch.start(make_config(name="d0", uri="memory:1M"), 20, [sys.executable, "-c", code])


@worthless
def test_decoding_raises_one_kind_of_error(text: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_json(text, dict)


def test_output_of_the_vdpa_tool_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    from vdusefast.host import vdpa

    with pytest.raises(OSError, match="\ufffd"):
        vdpa._run_tool([sys.executable, "-c", r"import os; os.write(2, b'\xff\xfe'); os._exit(1)"])
