"""JSON-RPC 2.0 over a Unix socket, a message a line: the server's side, and what both sides agree on.

The server has a thread of its own, and one for each client: nothing that a client does or leaves undone reaches
the thread of the device.
"""

from __future__ import annotations

import contextvars
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import msgspec

from vdusefast.base.decoding import decode_json
from vdusefast.errors import VdusefastError

REQUEST_MAX_BYTES = 64 << 10
ANSWER_MAX_BYTES = 16 << 20
CLIENT_COUNT_MAX = 16
IDLE_TIMEOUT_S = 30.0  # for a whole message to arrive
SEND_TIMEOUT_S = 10.0
JOIN_TIMEOUT_S = 2.0
RECEIVE_BYTES = 16 << 10

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
DEVICE_ERROR = -32000  # a VdusefastError; data.exit_code tells which

_log = logging.getLogger("vdusefast")
_caller_pid = contextvars.ContextVar("caller_pid", default=0)
_P = TypeVar("_P", bound=msgspec.Struct)
_Id = int | float | str | None


def caller_pid() -> int:
    """Return the pid of the client whose call this thread answers, 0 for one in a PID namespace that we do not see."""
    return _caller_pid.get()


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends. Without `id` it is a notification, which is not answered."""

    jsonrpc: Literal["2.0"]
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")
    id: _Id | msgspec.UnsetType = msgspec.UNSET


class NoParams(msgspec.Struct, forbid_unknown_fields=True):
    """The parameters of a method that has none."""


@dataclass(frozen=True)
class Method(Generic[_P]):
    """One method: the struct of its parameters, and what to call with it. The result must be JSON-able."""

    params: type[_P]
    call: Callable[[_P], Any]


class _CallError(Exception):
    """A call that is answered with an error of the protocol."""

    def __init__(self, code: int, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.exit_code = exit_code


def socket_address(directory_fd: int) -> str:
    """Return the address of the socket in a run directory: short, however long the directory's path is."""
    return f"/proc/self/fd/{directory_fd}/socket"


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the process at the other end of a Unix socket."""
    pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


class RpcServer:
    """Answers calls on DIRECTORY/socket from `start` to `close`. A context manager.

    Only root and this process's own user are served. Methods are called in the client's thread, several at once.
    """

    def __init__(self, directory: Path, methods: dict[str, Method[Any]], *, idle_timeout_s: float = IDLE_TIMEOUT_S):
        """Prepare; see `start`. directory: exists, with mode 0700; a stale socket in it is replaced."""
        self._directory = directory
        self._methods = methods
        self._idle_timeout_s = idle_timeout_s
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}

    def start(self) -> None:
        """Listen. Raises VdusefastError when the socket cannot be made."""
        path = self._directory / "socket"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            directory_fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                path.unlink(missing_ok=True)
                listener.bind(socket_address(directory_fd))
                path.chmod(0o600)
            finally:
                os.close(directory_fd)
            listener.listen(CLIENT_COUNT_MAX)
        except OSError as error:
            listener.close()
            raise VdusefastError(f"cannot listen on {path}: {error.strerror or error}") from None
        self._listener = listener
        self._thread = threading.Thread(target=self._accept, args=(listener,), name="vdusefast-rpc", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, let the calls that are running be answered for a while, and hang up. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._closing.set()
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
        assert self._thread is not None
        self._thread.join()
        listener.close()
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):
            until = time.monotonic() + JOIN_TIMEOUT_S
            for thread in self._hang_up(how):
                thread.join(max(0.0, until - time.monotonic()))

    def __enter__(self) -> RpcServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- inside

    def _hang_up(self, how: int) -> list[threading.Thread]:
        """Shut the clients' connections down and return the threads that serve them."""
        with self._lock:
            for connection in self._clients:
                try:
                    connection.shutdown(how)
                except OSError as error:
                    _log.debug("a client is gone: %s", error)
            return list(self._clients.values())

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                _log.error("cannot accept a client: %s", error.strerror)
                time.sleep(1.0)  # out of descriptors, most likely: do not spin
                continue
            try:
                self._take(connection)
            except Exception as error:
                # One client is lost by it: without this thread, all would be.
                _log.error("cannot serve a client: %s", error)
                connection.close()

    def _take(self, connection: socket.socket) -> None:
        """Serve a new client in a thread of its own, or tell it why not. Consumes `connection`."""
        pid, uid = peer_of(connection)
        refusal = ""
        if uid not in (0, os.geteuid()):
            refusal = f"user {uid} may not command this device; be root"
        thread = threading.Thread(target=self._serve, args=(connection,), name=f"vdusefast-rpc-{pid}", daemon=True)
        with self._lock:
            if len(self._clients) >= CLIENT_COUNT_MAX:
                refusal = refusal or f"{CLIENT_COUNT_MAX} clients are connected already; try again"
            if not refusal:
                try:
                    thread.start()
                except RuntimeError as error:  # out of threads
                    refusal = f"its server cannot take a client now: {error}; try again"
                else:
                    self._clients[connection] = thread
                    return
        with connection:
            connection.settimeout(0)
            _try_send(connection, _failure(None, _CallError(DEVICE_ERROR, refusal)))

    def _serve(self, connection: socket.socket) -> None:
        """Answer a client's calls, one after the other, until it leaves or breaks the rules."""
        try:
            _caller_pid.set(peer_of(connection)[0])
            lines = LineReader(connection, REQUEST_MAX_BYTES)
            going = True
            while going:
                try:
                    line = lines.read(self._idle_timeout_s)
                except ValueError as error:
                    going, answer = False, _failure(None, _CallError(INVALID_REQUEST, str(error)))
                else:
                    if line is None:
                        return
                    going, answer = self._answer(line)
                connection.settimeout(SEND_TIMEOUT_S)
                going = _try_send(connection, answer) and going
        except OSError as error:  # it left, or said nothing for too long
            _log.debug("a client is gone: %s", error)
        except Exception:
            _log.exception("a client is lost: its calls cannot be answered")
        finally:
            with self._lock:
                self._clients.pop(connection, None)
                connection.close()

    def _answer(self, line: bytes) -> tuple[bool, bytes]:
        """Return whether to continue with this client, and the answer, empty for a notification."""
        try:
            request = decode_json(line, Request)
        except msgspec.ValidationError as error:
            return False, _failure(None, _CallError(INVALID_REQUEST, f"no JSON-RPC 2.0 request: {error}"))
        except msgspec.DecodeError as error:
            return False, _failure(None, _CallError(PARSE_ERROR, f"not JSON: {error}"))
        try:
            answer = _success(request.id, self._call(request))
        except _CallError as error:
            answer = _failure(request.id, error)
        return True, b"" if request.id is msgspec.UNSET else answer

    def _call(self, request: Request) -> Any:
        """Return the result of a call. Raises _CallError."""
        method = self._methods.get(request.method)
        if method is None:
            known = ", ".join(self._methods)
            raise _CallError(METHOD_NOT_FOUND, f"no method {request.method!r}; there are: {known}")
        try:
            params = decode_json(request.params, method.params)
        except msgspec.DecodeError as error:
            raise _CallError(INVALID_PARAMS, f"{request.method}: {error}", 2) from None
        try:
            return method.call(params)
        except VdusefastError as error:
            raise _CallError(DEVICE_ERROR, str(error), error.exit_code) from error
        except Exception as error:
            _log.exception("%s failed", request.method)
            raise _CallError(INTERNAL_ERROR, f"{request.method}: {type(error).__name__}: {error}") from error


class LineReader:
    """Lines from a stream socket, which it borrows, each bounded in size and in time."""

    def __init__(self, connection: socket.socket, max_bytes: int) -> None:
        self._connection = connection
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def read(self, timeout_s: float) -> bytes | None:
        """Return the next line without its end, None when the other side has hung up.

        Raises TimeoutError, ValueError for a line that is too long, OSError.
        """
        until = time.monotonic() + timeout_s
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self._max_bytes:
                raise ValueError(f"a message may have {self._max_bytes} bytes")
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("no whole message within the time")
            self._connection.settimeout(left_s)
            data = self._connection.recv(RECEIVE_BYTES)
            if not data:
                return None
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


def _success(request_id: _Id | msgspec.UnsetType, result: Any) -> bytes:
    answer = {"jsonrpc": "2.0", "result": result, "id": None if request_id is msgspec.UNSET else request_id}
    return msgspec.json.encode(answer) + b"\n"


def _failure(request_id: _Id | msgspec.UnsetType, error: _CallError) -> bytes:
    body = {"code": error.code, "message": str(error), "data": {"exit_code": error.exit_code}}
    answer = {"jsonrpc": "2.0", "error": body, "id": None if request_id is msgspec.UNSET else request_id}
    return msgspec.json.encode(answer) + b"\n"


def _try_send(connection: socket.socket, data: bytes) -> bool:
    """Return whether `data` could be sent: a client that does not read, or is gone, is its own loss."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True
