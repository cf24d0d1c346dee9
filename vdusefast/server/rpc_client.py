"""The client's side of rpc.py: how commands talk to the process that serves a device."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from vdusefast.base.decoding import decode_json
from vdusefast.errors import TimedOutError, VdusefastError, from_exit_code
from vdusefast.host import processes
from vdusefast.host.containers import pid_text
from vdusefast.server.rpc import ANSWER_MAX_BYTES, LineReader, peer_of, socket_address

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0


class NoServerError(VdusefastError):
    """Nobody listens on the socket of a run directory."""


class HungUpError(VdusefastError):
    """The server closed the connection and has not answered."""


class _Error(msgspec.Struct):
    message: str
    data: dict[str, Any] = {}


class _Answer(msgspec.Struct):
    result: Any = None
    error: _Error | None = None
    id: int | None = None


class RpcClient:
    """A connection to the server of the run directory at `path`. A context manager.

    Raises NoServerError when nobody listens there, or a server that was killed and has not ended yet, TimedOutError
    when it does not take the connection, VdusefastError without permission.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._connection = _connect(path)
        self._lines = LineReader(self._connection, ANSWER_MAX_BYTES)
        self.server_pid, _uid = peer_of(self._connection)  # 0 in a PID namespace that we do not see
        # Until the kernel has closed all that it had, a killed server takes connections.
        if processes.is_ending(self.server_pid):
            self._connection.close()
            raise NoServerError(f"{path.name}: its server ({pid_text(self.server_pid)}) is ending")
        self._last_id = 0

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._connection.close()

    def __enter__(self) -> RpcClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def call(self, method: str, params: dict[str, Any] | None = None, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Call a method and return its result.

        Raises the VdusefastError that the server reports, TimedOutError when it says nothing within `timeout_s`.
        """
        self.send(method, params)
        return self.receive(timeout_s)

    def send(self, method: str, params: dict[str, Any] | None = None) -> None:
        """Send a call, to be followed by `receive`. Raises VdusefastError when the server has hung up."""
        self._last_id += 1
        request = {"jsonrpc": "2.0", "method": method, "params": params or {}, "id": self._last_id}
        try:
            self._connection.settimeout(CONNECT_TIMEOUT_S)
            self._connection.sendall(msgspec.json.encode(request) + b"\n")
        except TimeoutError:
            raise self._silent(CONNECT_TIMEOUT_S) from None
        except OSError:
            # It may have said why before it hung up, which `receive` finds.
            return

    def receive(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Return the result of the call sent last. Raises as `call` does."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.read(until - time.monotonic())
                if line is None:
                    raise ConnectionResetError
                answer = decode_json(line, _Answer)
            except TimeoutError:
                raise self._silent(timeout_s) from None
            except OSError:
                raise HungUpError(
                    f"{self.name}: its server ({pid_text(self.server_pid)}) hung up without an answer; see its log"
                ) from None
            except (ValueError, msgspec.DecodeError) as error:
                raise VdusefastError(
                    f"{self.name}: its server ({pid_text(self.server_pid)}) answered rubbish: {error}"
                ) from None
            if answer.error is not None:
                raise from_exit_code(_named(self.name, answer.error.message), _exit_code(answer.error))
            if answer.id == self._last_id:
                return answer.result

    def _silent(self, timeout_s: float) -> TimedOutError:
        return TimedOutError(
            f"{self.name}: its server ({pid_text(self.server_pid)}) did not answer within {timeout_s:.3g} s; "
            "see its log, and whether that process is stopped"
        )


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(CONNECT_TIMEOUT_S)
    try:
        directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connection.connect(socket_address(directory_fd))
        finally:
            os.close(directory_fd)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        raise NoServerError(f"{path.name}: nobody listens on {path / 'socket'}") from None
    except (BlockingIOError, TimeoutError):  # more clients wait than it lets
        connection.close()
        raise TimedOutError(f"{path.name}: its server takes no connections; see {path / 'log'}") from None
    except PermissionError:
        connection.close()
        raise VdusefastError(f"{path.name}: no permission for {path}; be the user who added it, or root") from None
    except OSError as error:
        connection.close()
        raise VdusefastError(f"{path.name}: cannot connect to {path / 'socket'}: {error.strerror}") from None
    return connection


def _exit_code(error: _Error) -> int:
    code = error.data.get("exit_code")
    return code if isinstance(code, int) else 1


def _named(name: str, message: str) -> str:
    """Return a message that names the device."""
    return message if name in message else f"{name}: {message}"
