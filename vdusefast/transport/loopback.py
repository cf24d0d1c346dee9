"""The embedded default: a device whose driver lives in the same group of processes, without any kernel module.

`LoopbackTransport` is the device's side; the driver's side is its `bus`.
"""

from __future__ import annotations

import socket
import time

from vdusefast.base.kinds import TransportKind
from vdusefast.errors import DeviceBusyError
from vdusefast.transport import DeviceBrokenError, DeviceSpec, TransportError, WorkerPort, uapi
from vdusefast.transport.loopback_bus import MSG_TIMEOUT_S, LoopbackBus
from vdusefast.transport.loopback_region import Region
from vdusefast.transport.uapi import Request, Response, VqInfo

__all__ = ["MSG_TIMEOUT_S", "LoopbackBus", "LoopbackTransport", "Region"]

REOPEN_TIMEOUT_S = 10.0  # for the last processes of a dead server to end
REOPEN_PAUSE_S = 0.005


class LoopbackTransport:
    """The device's side of a loopback device; see `Transport` for the methods."""

    kind = TransportKind.LOOPBACK
    keeps = False
    memory_text = "the driver's own"
    node = ""
    driver = ""
    irq_cpus: tuple[int | None, ...] = ()

    def __init__(self, msg_timeout_s: float = MSG_TIMEOUT_S, bus: LoopbackBus | None = None):
        """Make a transport whose bus marks the device broken after `msg_timeout_s` without an answer; 0 = never.

        bus: that of a device to adopt by `reopen`, after a `close(keep=True)`.
        """
        self.msg_timeout_s = msg_timeout_s if bus is None else bus.msg_timeout_s
        self._bus = bus
        self._messages: socket.socket | None = None

    @property
    def bus(self) -> LoopbackBus:
        """The driver's way to this device. Raises TransportError before `create`."""
        if self._bus is None:
            raise TransportError("the loopback device has not been created")
        return self._bus

    def create(self, spec: DeviceSpec) -> None:
        """Make the bus."""
        if self._bus is not None:
            raise TransportError(f"device {spec.name} has been created already")
        self._bus = LoopbackBus(spec, self.msg_timeout_s)
        self._messages = self._bus.connect()

    def reopen(self, spec: DeviceSpec) -> None:
        """Adopt the device on the bus, once its holder has released it."""
        if self._bus is None:
            raise TransportError(f"device {spec.name}: there is no bus on which it could have been left")
        deadline = time.monotonic() + REOPEN_TIMEOUT_S
        while True:
            try:
                self._messages = self._bus.connect()
                return
            except DeviceBusyError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(REOPEN_PAUSE_S)

    def check(self, spec: DeviceSpec) -> None:
        """Do nothing: the bus accepts every server."""

    def driver_status(self) -> int:
        """Return the device status, as far as it is known."""
        return self.bus.status_seen()

    async def attach(self) -> None:
        """Let the driver use the bus."""
        self.bus.attached = True

    async def detach(self) -> None:
        """Refuse every further call of the driver; stopping the workers drains its requests in flight."""
        if self._bus is not None:
            self._bus.attached = False

    def message_fd(self) -> int:
        """Return the device's end of the message socket."""
        return self._device_end().fileno()

    def receive(self) -> Request | None:
        """Return the next message, None when there is none."""
        if self.bus.broken:
            raise DeviceBrokenError(f"device {self.bus.name} is broken: a message was not answered in time")
        try:
            packet = self._device_end().recv(uapi.REQUEST.size + 1)
        except BlockingIOError:
            return None
        try:
            return uapi.unpack_request(packet)
        except ValueError as error:
            raise TransportError(f"device {self.bus.name}: {error}") from error

    def respond(self, response: Response) -> None:
        """Answer a message."""
        self.bus.check_response(response)
        self._device_end().send(uapi.pack_response(response))

    def acked_features(self) -> int:
        """Return the features that the driver has accepted."""
        self.bus.check_device_call()
        return self.bus.driver_features

    def vq_info(self, index: int) -> VqInfo:
        """Return the driver's settings of queue `index`."""
        self.bus.check_device_call(index)
        return self.bus.vq_info(index)

    def set_kickfd(self, index: int, fd: int) -> None:
        """Let the driver's kicks of queue `index` signal `fd` (borrowed)."""
        self.bus.set_kickfd(index, fd)

    def place_irqs(self) -> None:
        """Do nothing: an eventfd wakes its reader wherever that runs."""

    def inject_irq(self, index: int) -> None:
        """Interrupt the driver for queue `index`."""
        self.bus.inject_irq(index)

    def inject_config_irq(self) -> None:
        """Notify the driver that the configuration space has changed."""
        self.bus.inject_config_irq()

    def set_config(self, offset_bytes: int, data: bytes) -> None:
        """Overwrite a part of the configuration space."""
        self.bus.set_config(offset_bytes, data)

    def user_memory(self) -> None:
        """Return nothing: the driver's memory is used as it is, nothing is copied."""

    def worker_port(self, index: int) -> WorkerPort:
        """Return a new port for a worker that serves queue `index`."""
        return self.bus.open_port(index)

    def close(self, *, keep: bool = False) -> None:
        """Close the bus; drivers get an error from then on. With `keep` only release the device."""
        if self._messages is not None:
            self._messages.close()
            self._messages = None
        if self._bus is not None and not keep:
            self._bus.close()

    def _device_end(self) -> socket.socket:
        if self._messages is None:
            raise TransportError("the loopback device is not open")
        return self._messages
