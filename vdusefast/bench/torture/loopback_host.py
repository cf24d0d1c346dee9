"""A loopback device whose bus lives in another process, so that the device's server may die and another follow it.

`LoopbackHost` is the bus's side: it stands for the kernel. `RemoteLoopbackTransport` is the server's: what are method
calls on a bus of one's own are here packets over a SOCK_SEQPACKET connection, one question and one answer at a time,
with descriptors beside them where there are any.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vdusefast.base.decoding import decode_json
from vdusefast.base.kinds import TransportKind
from vdusefast.errors import DeviceBusyError
from vdusefast.transport import DeviceBrokenError, DeviceSpec, TransportError, WorkerPort, uapi
from vdusefast.transport.loopback import REOPEN_PAUSE_S, REOPEN_TIMEOUT_S
from vdusefast.transport.loopback_bus import MSG_TIMEOUT_S, LoopbackBus
from vdusefast.transport.uapi import Request, Response, VqInfo

PACKET_MAX_BYTES = 65536
DESCRIPTORS_MAX = 2

_ERRORS: dict[str, type[TransportError] | type[DeviceBusyError]] = {
    "busy": DeviceBusyError,
    "broken": DeviceBrokenError,
    "refused": TransportError,
}


class _Question(msgspec.Struct, array_like=True):
    what: str
    arguments: list[Any] = []  # msgspec copies it


class _Answer(msgspec.Struct, array_like=True):
    value: Any = None
    error: str = ""  # a key of _ERRORS, or "errno"
    errno: int = 0
    text: str = ""


class LoopbackHost:
    """Holds one loopback device for servers that come and go. A context manager.

    `bus` is the driver's way to the device, once a server has created it.
    """

    def __init__(self, path: Path):
        """Listen on a new Unix socket at `path`. Raises OSError."""
        self.path = path
        self._bus: LoopbackBus | None = None
        self._attached = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wake_fd = -1
        try:
            self._listener.bind(os.fspath(path))
            self._listener.listen()
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            self._listener.close()
            raise
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="vdusefast-bus-host", daemon=True)
        self._thread.start()

    def __enter__(self) -> LoopbackHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bus(self) -> LoopbackBus:
        """The driver's way to the device. Raises TransportError while there is none."""
        bus = self._bus
        if bus is None:
            raise TransportError("no server has created the loopback device")
        return bus

    def wait_attached(self, timeout_s: float) -> bool:
        """Wait until a server shows the device to drivers. Returns whether one does."""
        return self._attached.wait(timeout_s)

    def close(self) -> None:
        """Close every connection, and the device if there still is one; a second call does nothing."""
        if self._wake_fd < 0:
            return
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        os.close(self._wake_fd)
        self._wake_fd = -1
        self.path.unlink(missing_ok=True)
        if self._bus is not None:
            self._bus.close()

    # -- inside

    def _serve(self) -> None:
        while True:
            for key, _events in self._selector.select():
                if key.fd == self._wake_fd:
                    return
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._listener:
                    connection, _address = self._listener.accept()
                    self._selector.register(connection, selectors.EVENT_READ)
                elif not self._hear(key.fileobj):
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()

    def _hear(self, connection: socket.socket) -> bool:
        """Answer one question. Returns whether the other side is still there."""
        fds: list[int] = []
        try:
            packet, fds, _flags, _address = socket.recv_fds(
                connection, PACKET_MAX_BYTES, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
            )
            if not packet:
                return False
            answer, sent = self._answer(decode_json(packet, _Question), fds)
            fds += sent.owned_fds
            socket.send_fds(connection, [msgspec.json.encode(answer)], sent.fds)
        except (OSError, msgspec.DecodeError):
            return False  # it has died, or is no device of ours
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _answer(self, question: _Question, fds: list[int]) -> tuple[_Answer, _Sent]:
        methods: dict[str, Callable[..., _Sent]] = {
            "create": self._create,
            "reopen": self._reopen,
            "attach": self._attach,
            "detach": self._detach,
            "destroy": self._destroy,
            "open_port": self._open_port,
        }
        try:
            method = methods.get(question.what)
            if method is not None:
                sent = method(*question.arguments)
                return _Answer(sent.value), sent
            return _Answer(self._ask_bus(question, fds)), _Sent()
        except DeviceBusyError as error:
            return _Answer(error="busy", text=str(error)), _Sent()
        except DeviceBrokenError as error:
            return _Answer(error="broken", text=str(error)), _Sent()
        except TransportError as error:
            return _Answer(error="refused", text=str(error)), _Sent()
        except OSError as error:
            return _Answer(error="errno", errno=error.errno or errno.EIO), _Sent()

    def _ask_bus(self, question: _Question, fds: list[int]) -> Any:
        """Do what needs no more than the bus."""
        bus, arguments = self.bus, question.arguments
        match question.what:
            case "acked_features":
                bus.check_device_call()
                return bus.driver_features
            case "vq_info":
                bus.check_device_call(arguments[0])
                return bus.vq_info(arguments[0])
            case "check_response":
                return bus.check_response(Response(arguments[0], True))
            case "set_kickfd":
                return bus.set_kickfd(arguments[0], fds[0] if fds else -1)
            case "set_config":
                return bus.set_config(arguments[0], bytes.fromhex(arguments[1]))
            case "status_seen" | "inject_irq" | "inject_config_irq":
                return getattr(bus, question.what)(*arguments)
        raise TransportError(f"{bus.name}: the bus knows no question {question.what!r}")

    def _create(self, spec: object, msg_timeout_s: float) -> _Sent:
        described = msgspec.convert(spec, DeviceSpec)
        if self._bus is not None:
            raise TransportError(f"device {described.name} has been created already")
        self._bus = LoopbackBus(described, msg_timeout_s)
        return self._reopen()

    def _reopen(self) -> _Sent:
        fd = self.bus.connect().detach()
        return _Sent(self.bus.msg_timeout_s, [fd], [fd])

    def _attach(self) -> _Sent:
        self.bus.attached = True
        self._attached.set()
        return _Sent()

    def _detach(self) -> _Sent:
        if self._bus is not None:
            self._bus.attached = False
            self._attached.clear()
        return _Sent()

    def _destroy(self) -> _Sent:
        if self._bus is not None:
            self._bus.close()
            self._bus = None
            self._attached.clear()
        return _Sent()

    def _open_port(self, index: int) -> _Sent:
        port = self.bus.open_port(index)
        return _Sent(None, [port.port_fd, port.irq_fd], port.owned_fds)


class _Sent:
    """What goes out with an answer: a value, descriptors, and which of those are closed afterwards."""

    def __init__(self, value: Any = None, fds: list[int] | None = None, owned_fds: list[int] | None = None):
        self.value = value
        self.fds = fds or []
        self.owned_fds = owned_fds or []


class RemoteLoopbackTransport:
    """The device's side of a loopback device on a `LoopbackHost`; see `Transport` for the methods.

    As with /dev/vduse, the death of this process lets go of the device and leaves everything else as it is.
    """

    kind = TransportKind.LOOPBACK
    keeps = True
    memory_text = "the driver's own"
    node = ""
    driver = ""
    irq_cpus: tuple[int | None, ...] = ()

    def __init__(self, path: Path, msg_timeout_s: float = MSG_TIMEOUT_S):
        """Prepare; the host at `path` is asked when the device is created or reopened."""
        self.msg_timeout_s = msg_timeout_s
        self._path = path
        self._name = "loopback"
        self._host: socket.socket | None = None
        self._messages: socket.socket | None = None

    def create(self, spec: DeviceSpec) -> None:
        """Have the host make the device."""
        self._name = spec.name
        self._connect()
        _value, fds = self._ask("create", msgspec.to_builtins(spec), self.msg_timeout_s)
        self._messages = _message_socket(fds)

    def reopen(self, spec: DeviceSpec) -> None:
        """Take over the device that the host has, once a dead server's last process has let go of it."""
        self._name = spec.name
        self._connect()
        deadline = time.monotonic() + REOPEN_TIMEOUT_S
        while True:
            try:
                self.msg_timeout_s, fds = self._ask("reopen")
                self._messages = _message_socket(fds)
                return
            except DeviceBusyError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(REOPEN_PAUSE_S)

    def check(self, spec: DeviceSpec) -> None:
        """Do nothing: the bus takes every server."""

    def driver_status(self) -> int:
        """Return what can be told of the device status."""
        return int(self._ask("status_seen")[0])

    async def attach(self) -> None:
        """Let the driver use the device."""
        self._ask("attach")

    async def detach(self) -> None:
        """Refuse every further call of the driver."""
        if self._host is not None:
            self._ask("detach")

    def message_fd(self) -> int:
        """Return the device's end of the message socket."""
        return self._device_end().fileno()

    def receive(self) -> Request | None:
        """Return the next message, None when there is none."""
        try:
            packet = self._device_end().recv(uapi.REQUEST.size + 1)
        except BlockingIOError:
            return None
        if not packet:
            raise DeviceBrokenError(f"device {self._name} is broken: a message was not answered in time")
        try:
            return uapi.unpack_request(packet)
        except ValueError as error:
            raise TransportError(f"device {self._name}: {error}") from error

    def respond(self, response: Response) -> None:
        """Answer a message."""
        self._ask("check_response", response.request_id)
        self._device_end().send(uapi.pack_response(response))

    def acked_features(self) -> int:
        """Return the features that the driver has accepted."""
        return int(self._ask("acked_features")[0])

    def vq_info(self, index: int) -> VqInfo:
        """Return what the driver has set up for queue `index`."""
        return VqInfo(*self._ask("vq_info", index)[0])

    def set_kickfd(self, index: int, fd: int) -> None:
        """Have the driver's kicks of queue `index` signal `fd` (borrowed)."""
        self._ask("set_kickfd", index, fds=[fd] if fd >= 0 else [])

    def place_irqs(self) -> None:
        """Do nothing: an eventfd wakes its reader wherever that runs."""

    def inject_irq(self, index: int) -> None:
        """Interrupt the driver for queue `index`."""
        self._ask("inject_irq", index)

    def inject_config_irq(self) -> None:
        """Tell the driver that the configuration space has changed."""
        self._ask("inject_config_irq")

    def set_config(self, offset_bytes: int, data: bytes) -> None:
        """Overwrite a part of the configuration space."""
        self._ask("set_config", offset_bytes, data.hex())

    def user_memory(self) -> None:
        """Return nothing: the driver's memory is used as it is, nothing is copied."""

    def worker_port(self, index: int) -> WorkerPort:
        """Return a new port for a worker that serves queue `index`."""
        _value, fds = self._ask("open_port", index)
        return WorkerPort("loopback", fds[0], fds[1], owned_fds=fds)

    def close(self, *, keep: bool = False) -> None:
        """Have the host destroy the device, and let go of it; with `keep` only let go."""
        if self._host is None:
            return
        try:
            if self._messages is not None and not keep:
                self._ask("destroy")
        finally:
            for sock in (self._messages, self._host):
                if sock is not None:
                    sock.close()
            self._messages = self._host = None

    # -- inside

    def _connect(self) -> None:
        if self._host is not None:
            raise TransportError(f"device {self._name} is open already")
        self._host = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._host.settimeout(MSG_TIMEOUT_S)  # the bus waits as long for us
        try:
            self._host.connect(os.fspath(self._path))
        except OSError as error:
            self._host.close()
            self._host = None
            raise TransportError(f"device {self._name}: no bus at {self._path}: {error.strerror}") from error

    def _device_end(self) -> socket.socket:
        if self._messages is None:
            raise TransportError(f"device {self._name} is not open")
        return self._messages

    def _ask(self, what: str, *arguments: object, fds: list[int] | None = None) -> tuple[Any, list[int]]:
        """Ask the host. Returns the value and the descriptors (the caller's). Raises what the bus has raised."""
        if self._host is None:
            raise TransportError(f"device {self._name} is not open")
        try:
            socket.send_fds(self._host, [msgspec.json.encode(_Question(what, list(arguments)))], fds or [])
            packet, got, _flags, _address = socket.recv_fds(
                self._host, PACKET_MAX_BYTES, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise TransportError(f"device {self._name}: the bus at {self._path} does not answer: {error}") from error
        if not packet:
            raise TransportError(f"device {self._name}: the bus at {self._path} is gone")
        try:
            answer = decode_json(packet, _Answer)
        except msgspec.DecodeError as error:
            for fd in got:
                os.close(fd)
            raise TransportError(f"device {self._name}: the bus at {self._path} answered rubbish: {error}") from None
        if answer.error == "errno":
            raise OSError(answer.errno, os.strerror(answer.errno))
        if answer.error:
            raise _ERRORS[answer.error](answer.text)
        return answer.value, list(got)


def _message_socket(fds: list[int]) -> socket.socket:
    sock = socket.socket(fileno=fds[0])
    sock.setblocking(False)
    return sock
