"""The bus of the loopback transport: plays the kernel (VDUSE and the vDPA bus) to a driver in this process.

Messages to the device cross a SOCK_SEQPACKET pair in the structures of /dev/vduse. The ioctls of /dev/vduse are method
calls here, with the same errors. The bus is synchronous. Any thread may use it except the supervisor's, which has to
answer its messages. A daemon thread reads the answers and serves the workers' ports.

A server opens the device with `connect`, and releases it by closing the socket that it got, at the latest by its death.
The device then waits for the next server, with its status, its queues, and the unanswered messages.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import NoReturn

from vdusefast.errors import DeviceBusyError
from vdusefast.transport import DeviceBrokenError, DeviceSpec, TransportError, WorkerPort, uapi
from vdusefast.transport.loopback_queue import EVENTFD_FLAGS, BusQueue
from vdusefast.transport.loopback_region import Region, RegionTable
from vdusefast.transport.uapi import IotlbEntry, Request, Response, VqInfo

MSG_TIMEOUT_S = 30.0  # as /sys/class/vduse/NAME/msg_timeout

_PORT_QUERY = struct.Struct("=QQ")  # start, last
_PORT_ANSWER = struct.Struct("=iI")  # errno or 0, padding; an IotlbEntry follows
_NO_ENTRY = IotlbEntry(0, 0, 0, 0)

_log = logging.getLogger("vdusefast")


def _fail(error: int) -> NoReturn:
    raise OSError(error, os.strerror(error))


class _Pending:
    """A message that waits for its answer."""

    def __init__(self, packet: bytes) -> None:
        self.packet = packet
        self.done = threading.Event()
        self.response: Response | None = None


class LoopbackBus:
    """The driver's way to the device. Thread-safe; calls that send a message return when it has been answered."""

    def __init__(self, spec: DeviceSpec, msg_timeout_s: float = MSG_TIMEOUT_S):
        self.name = spec.name
        self.offered_features = spec.offered_features
        self.queue_count = spec.queue_count
        self.queue_size_max = spec.queue_size_max
        self.msg_timeout_s = msg_timeout_s
        self.status = 0
        self.driver_features = 0
        self.broken = False
        self.attached = False
        self._config = bytearray(spec.config)
        self._lock = threading.RLock()
        self._closed = False
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._regions = RegionTable(spec.name)
        self._messages: socket.socket | None = None  # while a server has the device
        self._ports: dict[int, socket.socket] = {}
        self._queues: list[BusQueue] = []
        with ExitStack() as opened:  # a failure half-way leaves nothing open
            for index in range(spec.queue_count):
                self._queues.append(BusQueue(index))
                opened.callback(self._queues[-1].close)
            self.config_irqfd = os.eventfd(0, EVENTFD_FLAGS)
            opened.callback(os.close, self.config_irqfd)
            self._wake_fd = os.eventfd(0, EVENTFD_FLAGS)
            opened.callback(os.close, self._wake_fd)
            self._epoll = select.epoll()
            opened.pop_all()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, name=f"vdusefast-bus-{spec.name}", daemon=True)
        self._thread.start()

    # -- memory

    def add_region(
        self,
        iova: int,
        size_bytes: int,
        perm: int = uapi.VDUSE_ACCESS_RW,
        fd: int | None = None,
        fd_offset: int = 0,
    ) -> Region:
        """Let the device reach `size_bytes` bytes at `iova`; the device fetches the region when it first needs it.

        `perm` is the device's (uapi.VDUSE_ACCESS_*). `fd` (borrowed) is the memory, at `fd_offset`, a multiple of the
        page size; a new memfd when None. Raises ValueError when the range is empty, does not fit into 64 bits or
        overlaps another.
        """
        with self._lock:
            self._check_usable()
            return self._regions.add(iova, size_bytes, perm, fd, fd_offset)

    def remove_region(self, iova: int) -> None:
        """Remove the region that starts at `iova`; no worker has it mapped when this returns.

        The region leaves the table before UPDATE_IOTLB is sent, so that no worker can fetch it again in between (as
        in the kernel). Raises KeyError when there is none, TransportError when the device does not confirm.
        """
        with self._lock:
            self._check_usable()
            region = self._regions.take(iova)
        try:
            self.update_iotlb(region.iova, region.last)
        finally:
            region.close()

    def update_iotlb(self, start: int, last: int) -> None:
        """Ask the device to drop every mapping that overlaps [start, last]. Raises TransportError."""
        if not self._call("UPDATE_IOTLB", lambda i: uapi.UpdateIotlb(i, start, last)).ok:
            raise TransportError(f"device {self.name}: UPDATE_IOTLB [{start:#x}, {last:#x}] was refused")

    # -- status, features, configuration space

    @property
    def config(self) -> bytes:
        """The configuration space as it is now."""
        with self._lock:
            return bytes(self._config)

    def set_status(self, status: int, timeout_s: float | None = None) -> None:
        """Set the device status; 0 resets. `timeout_s` replaces msg_timeout for this message.

        Raises TransportError when the device answers FAILED (the status then stays what it was, except for 0),
        DeviceBrokenError when it does not answer in time.
        """
        try:
            response = self._call(f"SET_STATUS {status:#x}", lambda i: uapi.SetStatus(i, status), timeout_s)
        finally:
            if status == 0:
                self._reset_state()
        if not response.ok:
            raise TransportError(f"device {self.name}: SET_STATUS {status:#x} was refused")
        with self._lock:
            self.status = status

    def reset(self) -> None:
        """Reset the device; does nothing once the device has been stopped, so a driver can always clean up."""
        with self._lock:
            if self._closed or not self.attached:
                return
        self.set_status(0)

    def set_driver_features(self, features: int) -> None:
        """Set the features that the driver accepts; the device checks them at FEATURES_OK."""
        with self._lock:
            self._check_usable()
            self.driver_features = features

    def negotiate(self, features: int) -> None:
        """Send what virtio-vdpa sends when it probes: status 0, 1, 3, features, 0xb. Queues and `driver_ok` follow."""
        self.set_status(0)
        self.set_status(uapi.VIRTIO_CONFIG_S_ACKNOWLEDGE)
        self.set_status(self.status | uapi.VIRTIO_CONFIG_S_DRIVER)
        self.set_driver_features(features)
        self.set_status(self.status | uapi.VIRTIO_CONFIG_S_FEATURES_OK)

    def driver_ok(self) -> None:
        """Add DRIVER_OK to the status: the device serves its queues from now on."""
        self.set_status(self.status | uapi.VIRTIO_CONFIG_S_DRIVER_OK)

    # -- queues

    def set_vq(
        self,
        index: int,
        size: int,
        desc_addr: int,
        driver_addr: int,
        device_addr: int,
        last_avail_idx: int = 0,
    ) -> None:
        """Set up queue `index`: `size` descriptors, three IOVAs, where the device shall begin. Nothing is checked."""
        with self._lock:
            self._check_usable()
            vq = self._queues[index]
            vq.info = VqInfo(index, size, desc_addr, driver_addr, device_addr, last_avail_idx, vq.info.ready)

    def set_vq_ready(self, index: int, ready: bool = True) -> None:
        """Make queue `index` ready. After DRIVER_OK the device notices with the next kick, as under Linux 6.12."""
        with self._lock:
            self._check_usable()
            vq = self._queues[index]
            vq.info = vq.info._replace(ready=ready)

    def get_vq_state(self, index: int) -> int:
        """Stop queue `index`; return its position, as VqInfo.last_avail_idx.

        Raises TransportError when the device does not know it.
        """
        response = self._call(f"GET_VQ_STATE {index}", lambda i: uapi.GetVqState(i, index))
        if not response.ok:
            raise TransportError(f"device {self.name}: queue {index}: GET_VQ_STATE was refused")
        return response.avail_idx

    def vq_info(self, index: int) -> VqInfo:
        """Return the driver's settings of queue `index`."""
        with self._lock:
            return self._queues[index].info

    def kickfd(self, index: int) -> int:
        """Return the eventfd (the bus's own) that kicks queue `index`; the number stays the same over resets.

        Raises TransportError while the device has not set one, which it does at DRIVER_OK.
        """
        with self._lock:
            self._check_usable()
            if not self._queues[index].kickfd_set:
                raise TransportError(f"device {self.name}: queue {index} has no kick eventfd before DRIVER_OK")
            return self._queues[index].kickfd

    def irqfd(self, index: int) -> int:
        """Return the eventfd (the bus's own) by which queue `index` interrupts the driver."""
        with self._lock:
            self._check_usable()
            return self._queues[index].irqfd

    # -- the device's side: what are open() and ioctls on /dev/vduse/NAME

    def connect(self) -> socket.socket:
        """Return the device's end of the messages, owned by the caller: closing it releases the device.

        Messages that an earlier server left unanswered come again. Raises DeviceBusyError while one, or its worker,
        holds the device; DeviceBrokenError; TransportError once the bus is closed.
        """
        with self._lock:
            if self.broken:
                raise DeviceBrokenError(f"device {self.name} is broken: it did not answer a message in time; remove it")
            if self._closed:
                raise TransportError(f"device {self.name} has been removed")
            if self._messages is not None or self._ports:
                raise DeviceBusyError(f"device {self.name} is held by another server, or by a worker of one")
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            theirs.setblocking(False)
            self._messages = ours
            self._epoll.register(ours, select.EPOLLIN)
            for pending in self._pending.values():
                ours.send(pending.packet)
            return theirs

    def status_seen(self) -> int:
        """Return the status that a device can deduce from its ioctls: 0, or all up to FEATURES_OK or DRIVER_OK."""
        with self._lock:
            self.check_device_call()
            features_ok = uapi.VIRTIO_CONFIG_S_FEATURES_OK
            if not self.status & features_ok:
                return 0
            return (
                uapi.VIRTIO_CONFIG_S_ACKNOWLEDGE
                | uapi.VIRTIO_CONFIG_S_DRIVER
                | features_ok
                | self.status & uapi.VIRTIO_CONFIG_S_DRIVER_OK
            )

    def check_response(self, response: Response) -> None:
        """Raise OSError as the kernel's write() does: ENOENT for an id that is unknown, answered, or timed out."""
        with self._lock:
            if response.request_id not in self._pending:
                _fail(errno.ENOENT)

    def check_device_call(self, index: int = 0) -> None:
        """Raise OSError as the kernel does to the device: EPERM once broken, EINVAL for a queue that is not there."""
        if self.broken or self._closed:
            _fail(errno.EPERM)
        if not 0 <= index < self.queue_count:
            _fail(errno.EINVAL)

    def set_kickfd(self, index: int, fd: int) -> None:
        """Let kicks of queue `index` signal `fd` (borrowed); -1 removes it."""
        with self._lock:
            self.check_device_call(index)
            self._queues[index].set_kickfd(fd)

    def inject_irq(self, index: int) -> None:
        """Interrupt the driver for queue `index`."""
        with self._lock:
            self.check_device_call(index)
            if not self.status & uapi.VIRTIO_CONFIG_S_DRIVER_OK:
                _fail(errno.EINVAL)
            os.eventfd_write(self._queues[index].irqfd, 1)

    def set_config(self, offset_bytes: int, data: bytes) -> None:
        """Overwrite a part of the configuration space."""
        with self._lock:
            self.check_device_call()
            if offset_bytes < 0 or offset_bytes + len(data) > len(self._config):
                _fail(errno.EINVAL)
            self._config[offset_bytes : offset_bytes + len(data)] = data

    def inject_config_irq(self) -> None:
        """Notify the driver that the configuration space has changed."""
        with self._lock:
            self.check_device_call()
            os.eventfd_write(self.config_irqfd, 1)

    def open_port(self, index: int) -> WorkerPort:
        """Return a port for a worker of queue `index`."""
        with self._lock:
            self.check_device_call(index)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            self._ports[ours.fileno()] = ours
            self._epoll.register(ours, select.EPOLLIN)
            port_fd = theirs.detach()
            return WorkerPort("loopback", port_fd, self._queues[index].irqfd, owned_fds=[port_fd])

    def close(self) -> None:
        """Stop the thread, fail waiting calls, and close every descriptor; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.attached = False
            self._fail_pending()
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        with self._lock:
            for sock in (self._messages, *self._ports.values()):
                if sock is not None:
                    sock.close()
            self._messages = None
            self._ports.clear()
            self._regions.close()
            for vq in self._queues:
                vq.close()
            self._epoll.close()
            os.close(self._wake_fd)
            os.close(self.config_irqfd)

    # -- inside

    def _check_usable(self) -> None:
        if self.broken:
            raise DeviceBrokenError(f"device {self.name} is broken: it did not answer a message in time; remove it")
        if self._closed or not self.attached:
            raise TransportError(f"device {self.name} is not on the bus: not yet started, or stopped")

    def _reset_state(self) -> None:
        """Forget the driver's settings, except its memory, which stays the driver's own."""
        with self._lock:
            if self._closed:
                return
            self.status = 0
            self.driver_features = 0
            for vq in self._queues:
                vq.reset()

    def _call(self, what: str, make: Callable[[int], Request], timeout_s: float | None = None) -> Response:
        """Send the message that `make` builds for an id and return its answer."""
        limit_s = self.msg_timeout_s if timeout_s is None else timeout_s
        with self._lock:
            self._check_usable()
            request_id = next(self._ids) & 0xFFFFFFFF
            pending = self._pending[request_id] = _Pending(uapi.pack_request(make(request_id)))
            sent = self._send(pending.packet)
        try:
            if not sent:
                raise TransportError(f"device {self.name}: {what} cannot be sent: its server reads no messages")
            pending.done.wait(limit_s or None)
        finally:
            with self._lock:
                self._pending.pop(request_id, None)
        if pending.response is not None:
            return pending.response
        with self._lock:
            if self._closed:
                raise TransportError(f"device {self.name} was stopped before it answered {what}")
            if not self.broken:
                self._break()
        raise DeviceBrokenError(f"device {self.name} is broken: it did not answer {what} within {limit_s:g} s")

    def _send(self, packet: bytes) -> bool:
        """Send a message to the server. Without a living server it waits for the next one."""
        if self._messages is None:
            return True
        try:
            self._messages.send(packet)
        except (BrokenPipeError, ConnectionResetError):
            return True
        except OSError:
            return False
        return True

    def _break(self) -> None:
        """Mark the device broken, as the kernel does: waiting calls fail, and only removing it works from then on."""
        self.broken = True
        self._fail_pending()
        if self._messages is not None:
            self._messages.shutdown(socket.SHUT_WR)  # wakes the device, as POLLERR does

    def _fail_pending(self) -> None:
        for pending in self._pending.values():
            pending.done.set()

    def _serve(self) -> None:
        """Take answers and serve ports until `close`."""
        while True:
            for fd, _events in self._epoll.poll():
                if fd == self._wake_fd:
                    return
                with self._lock:
                    messages = self._messages
                if messages is not None and fd == messages.fileno():
                    self._take_responses(messages)
                else:
                    self._serve_port(fd)

    def _take_responses(self, messages: socket.socket) -> None:
        while True:
            try:
                packet = messages.recv(uapi.RESPONSE.size + 1)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._disconnect(messages)
                return
            try:
                response = uapi.unpack_response(packet, packed=uapi.is_packed(self.driver_features))
            except ValueError as error:
                _log.error("device %s: %s", self.name, error)
                continue
            with self._lock:
                pending = self._pending.pop(response.request_id, None)
            if pending is None:
                _log.error("device %s: answer to message %d, which nobody waits for", self.name, response.request_id)
                continue
            pending.response = response
            pending.done.set()

    def _disconnect(self, messages: socket.socket) -> None:
        """Note that the server has released the device. Its unanswered messages wait for the next server."""
        with self._lock:
            self._epoll.unregister(messages)
            messages.close()
            self._messages = None

    def _serve_port(self, fd: int) -> None:
        """Answer one query of a worker; a worker that is gone, or does not keep to the protocol, loses its port."""
        with self._lock:
            sock = self._ports.get(fd)
            if sock is None:
                return
            try:
                query = sock.recv(_PORT_QUERY.size + 1)
                if len(query) == _PORT_QUERY.size:
                    self._answer_port(sock, *_PORT_QUERY.unpack(query))
                    return
            except BlockingIOError:
                return
            except ConnectionError:
                pass  # it died without having read our last answer
            except OSError as error:
                _log.warning("device %s: a worker's port failed: %s", self.name, error.strerror)
            self._epoll.unregister(fd)
            del self._ports[fd]
            sock.close()

    def _answer_port(self, sock: socket.socket, start: int, last: int) -> None:
        """Answer as VDUSE_IOTLB_GET_FD does: the first region that overlaps [start, last], else EINVAL."""
        region = self._regions.find(start, last) if start <= last else None
        if region is None:
            sock.send(_PORT_ANSWER.pack(errno.EINVAL, 0) + _NO_ENTRY.pack())
        else:
            socket.send_fds(sock, [_PORT_ANSWER.pack(0, 0) + region.entry.pack()], [region.fd])
