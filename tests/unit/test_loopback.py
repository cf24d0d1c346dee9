"""The loopback bus behaves as the kernel does, seen from both sides."""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.transport import DeviceBrokenError, DeviceSpec, TransportError, uapi
from vdusefast.transport.loopback import LoopbackBus, LoopbackTransport
from vdusefast.transport.uapi import Request, Response

SPEC = DeviceSpec("t0", uapi.VIRTIO_F_VERSION_1, bytes(range(96)), queue_count=2, queue_size_max=64)


class Side:
    """The device's side: answers messages from a thread; `answer` may be replaced."""

    def __init__(self, msg_timeout_s: float = 30.0, host: LoopbackHost | None = None):
        self.transport: LoopbackTransport | RemoteLoopbackTransport
        if host is None:
            self.transport = LoopbackTransport(msg_timeout_s)
        else:
            self.transport = RemoteLoopbackTransport(host.path, msg_timeout_s)
        self.transport.create(SPEC)
        asyncio.run(self.transport.attach())
        self.bus: LoopbackBus = host.bus if isinstance(self.transport, RemoteLoopbackTransport) else self.transport.bus
        self.seen: list[Request] = []
        self.answer: Callable[[Request], Response | None] = lambda request: Response(request.request_id, True)
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while not self.end.is_set():
            if not select.select([self.transport.message_fd()], [], [], 0.02)[0]:
                continue
            try:
                request = self.transport.receive()
            except DeviceBrokenError:
                return
            if request is not None:
                self.seen.append(request)
                response = self.answer(request)
                if response is not None:
                    self.transport.respond(response)

    def close(self) -> None:
        self.end.set()
        self.thread.join()
        self.transport.close()
        self.transport.close()


@pytest.fixture(params=["here", "in another process's bus"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    with ExitStack() as opened:
        host = None if request.param == "here" else opened.enter_context(LoopbackHost(tmp_path / "bus"))
        made = Side(host=host)
        opened.callback(made.close)
        yield made


def ask_port(fd: int, start: int, last: int) -> tuple[int, uapi.IotlbEntry, int]:
    """Ask as a worker does. Returns errno, entry and the region's descriptor, -1 where there is none."""
    with socket.socket(fileno=os.dup(fd)) as port:
        port.send(struct.pack("=QQ", start, last))
        data, control, _flags, _address = port.recvmsg(64, socket.CMSG_SPACE(4))
    assert len(data) == 40
    fds = [array.array("i", payload)[0] for _level, _kind, payload in control]
    entry = uapi.IotlbEntry(*uapi.IOTLB_ENTRY.unpack_from(data, 8))
    return struct.unpack_from("=i", data)[0], entry, fds[0] if fds else -1


def test_probe_sends_what_virtio_vdpa_sends(side: Side) -> None:
    side.bus.negotiate(uapi.VIRTIO_F_VERSION_1)
    side.bus.driver_ok()
    assert [request.status for request in side.seen if isinstance(request, uapi.SetStatus)] == [0, 1, 3, 0xB, 0xF]
    assert side.transport.acked_features() == uapi.VIRTIO_F_VERSION_1
    assert side.bus.status == 0xF


def test_refused_status_raises_and_changes_nothing(side: Side) -> None:
    side.bus.set_status(1)
    side.answer = lambda request: Response(request.request_id, False)
    with pytest.raises(TransportError, match="SET_STATUS 0x3 was refused"):
        side.bus.set_status(3)
    assert side.bus.status == 1


def test_vq_state_comes_from_the_device(side: Side) -> None:
    side.answer = lambda request: Response(request.request_id, True, 1, 0xFFFE)
    assert side.bus.get_vq_state(1) == 0xFFFE
    assert side.seen == [uapi.GetVqState(1, 1)]


def test_vq_state_of_a_packed_queue_comes_from_the_device(side: Side) -> None:
    side.bus.set_driver_features(uapi.VIRTIO_F_RING_PACKED)
    side.answer = lambda request: Response(request.request_id, True, 1, 0xFFFE_0003, packed=True)
    assert side.bus.get_vq_state(1) == 0xFFFE_0003


def test_answers_may_come_in_another_order(side: Side) -> None:
    waiting: list[uapi.GetVqState] = []

    def answer_last_first(request: Request) -> Response | None:
        assert isinstance(request, uapi.GetVqState)
        waiting.append(request)
        if len(waiting) < 2:
            return None
        for earlier in reversed(waiting):
            side.transport.respond(Response(earlier.request_id, True, 0, earlier.vq_index + 10))
        return None

    side.answer = answer_last_first
    results: dict[int, int] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: side.bus.get_vq_state(i)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: 10, 1: 11}


def test_answer_to_an_unknown_id_is_enoent(side: Side) -> None:
    side.bus.set_status(1)
    with pytest.raises(OSError, match="No such file") as unknown:
        side.transport.respond(Response(12345, True))
    with pytest.raises(OSError, match="No such file") as answered:
        side.transport.respond(Response(1, True))
    assert unknown.value.errno == answered.value.errno == errno.ENOENT


def test_malformed_answers_on_the_wire_are_logged_and_dropped(side: Side, caplog: pytest.LogCaptureFixture) -> None:
    packet = bytearray(uapi.pack_response(Response(1, True)))
    packet[8] = 1
    with caplog.at_level(logging.ERROR):
        with socket.socket(fileno=os.dup(side.transport.message_fd())) as device_end:
            device_end.send(bytes(packet))
            device_end.send(uapi.pack_response(Response(77, True)))
        side.bus.set_status(1)
    assert "reserved words" in caplog.text
    assert "message 77" in caplog.text


def test_unanswered_message_breaks_the_device_for_good() -> None:
    side = Side(msg_timeout_s=0.05)
    side.answer = lambda request: None
    try:
        with pytest.raises(DeviceBrokenError, match="did not answer SET_STATUS 0x1 within"):
            side.bus.set_status(1)
        side.thread.join(5)  # its receive() raised
        assert not side.thread.is_alive()
        with pytest.raises(DeviceBrokenError):
            side.bus.set_status(0)
        with pytest.raises(PermissionError) as error:
            side.transport.vq_info(0)
        assert error.value.errno == errno.EPERM
    finally:
        side.close()


def test_driver_waits_for_ever_without_msg_timeout() -> None:
    side = Side(msg_timeout_s=0)
    try:

        def late(request: Request) -> Response:
            time.sleep(0.1)
            return Response(request.request_id, True)

        side.answer = late
        side.bus.set_status(1)
    finally:
        side.close()


def test_queue_set_up_is_seen_by_the_device_until_reset(side: Side) -> None:
    side.bus.set_vq(1, 32, 0x1000, 0x2000, 0x3000, 5)
    assert not side.transport.vq_info(1).ready
    side.bus.set_vq_ready(1)
    assert side.transport.vq_info(1) == uapi.VqInfo(1, 32, 0x1000, 0x2000, 0x3000, 5, True)
    side.bus.set_driver_features(3)
    side.bus.reset()
    assert side.transport.vq_info(1) == uapi.VqInfo(1)
    assert side.transport.acked_features() == 0


def test_kicks_reach_the_eventfd_that_the_device_sets(side: Side) -> None:
    with pytest.raises(TransportError, match="no kick eventfd before DRIVER_OK"):
        side.bus.kickfd(0)
    ours = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        side.transport.set_kickfd(0, ours)
        number = side.bus.kickfd(0)
        os.eventfd_write(number, 1)
        assert os.eventfd_read(ours) == 1
        side.bus.reset()  # the kernel drops it, and so do kicks until the next one is set
        os.eventfd_write(number, 1)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(ours)
        side.bus.set_vq_ready(0)
        side.transport.set_kickfd(0, ours)
        assert side.bus.kickfd(0) == number
        assert os.eventfd_read(ours) == 1  # a ready queue's early kick is passed on
    finally:
        os.close(ours)


def test_interrupts_need_driver_ok(side: Side) -> None:
    with pytest.raises(OSError, match="Invalid") as error:
        side.transport.inject_irq(1)
    assert error.value.errno == errno.EINVAL
    side.bus.set_status(0xF)
    side.transport.inject_irq(1)
    assert os.eventfd_read(side.bus.irqfd(1)) == 1


def test_config_space_is_replaced_in_place(side: Side) -> None:
    side.transport.set_config(8, b"\xff\xff")
    side.transport.inject_config_irq()
    assert side.bus.config[7:11] == b"\x07\xff\xff\x0a"
    assert os.eventfd_read(side.bus.config_irqfd) == 1
    with pytest.raises(OSError, match="Invalid"):
        side.transport.set_config(95, b"12")


def test_port_gives_the_first_region_that_overlaps(side: Side) -> None:
    low = side.bus.add_region(0x10000, 8192, uapi.VDUSE_ACCESS_RO)
    side.bus.add_region(0x12000, 4096)
    port = side.transport.worker_port(0)
    assert port.kind == "loopback"
    try:
        os.eventfd_write(port.irq_fd, 7)
        assert os.eventfd_read(side.bus.irqfd(0)) == 7
        low.buf[:5] = b"hello"
        error, entry, fd = ask_port(port.port_fd, 0x11FFF, 0x12FFF)
        assert (error, entry) == (0, uapi.IotlbEntry(0, 0x10000, 0x11FFF, uapi.VDUSE_ACCESS_RO))
        assert os.pread(fd, 5, 0) == b"hello"
        os.close(fd)
        for start, last in ((0x13000, 0x13000), (0xFFFF, 0xFFFF), (0x12000, 0x10000)):
            assert ask_port(port.port_fd, start, last) == (errno.EINVAL, uapi.IotlbEntry(0, 0, 0, 0), -1)
    finally:
        port.close()


def test_region_may_lie_in_a_part_of_given_memory(side: Side) -> None:
    fd = os.memfd_create("mine")
    os.ftruncate(fd, 12288)
    region = side.bus.add_region(0x1000, 4096, fd=fd, fd_offset=4096)
    region.buf[0:2] = b"ab"
    assert os.pread(fd, 2, 4096) == b"ab"
    assert region.entry == uapi.IotlbEntry(4096, 0x1000, 0x1FFF, uapi.VDUSE_ACCESS_RW)
    os.close(fd)


def test_region_address_is_where_its_bytes_are(side: Side) -> None:
    import ctypes

    region = side.bus.add_region(0x1000, 4096)
    region.buf[10:13] = b"xyz"
    assert ctypes.string_at(region.address + 10, 3) == b"xyz"


def test_removed_region_cannot_be_fetched_while_the_device_drops_it(side: Side) -> None:
    side.bus.add_region(0x1000, 4096)
    port = side.transport.worker_port(0)
    errors: list[int] = []

    def answer(request: Request) -> Response:
        errors.append(ask_port(port.port_fd, 0x1000, 0x1000)[0])
        return Response(request.request_id, True)

    side.answer = answer
    side.bus.remove_region(0x1000)
    port.close()
    assert errors == [errno.EINVAL]
    assert side.seen == [uapi.UpdateIotlb(1, 0x1000, 0x1FFF)]
    with pytest.raises(KeyError):
        side.bus.remove_region(0x1000)


@pytest.mark.parametrize(("iova", "size_bytes"), [(0x1800, 4096), (0, 0x1001), (0, 0), (2**64 - 4096, 8192), (-1, 10)])
def test_overlapping_and_impossible_regions_are_refused(side: Side, iova: int, size_bytes: int) -> None:
    side.bus.add_region(0x1000, 4096)
    with pytest.raises(ValueError, match="region"):
        side.bus.add_region(iova, size_bytes)


def test_worker_that_breaks_the_protocol_loses_its_port(side: Side) -> None:
    port = side.transport.worker_port(0)
    with socket.socket(fileno=os.dup(port.port_fd)) as sock:
        sock.send(b"what?")
        assert sock.recv(64) == b""
    port.close()
    side.bus.set_status(1)  # the bus still serves


def test_queue_that_is_not_there_is_einval(side: Side) -> None:
    with pytest.raises(OSError, match="Invalid"):
        side.transport.vq_info(2)
    with pytest.raises(OSError, match="Invalid"):
        side.transport.worker_port(-1)


def test_stopped_device_refuses_drivers_but_lets_them_clean_up(side: Side) -> None:
    region = side.bus.add_region(0x1000, 4096)
    asyncio.run(side.transport.detach())
    with pytest.raises(TransportError, match="not on the bus"):
        side.bus.set_status(1)
    side.bus.reset()
    side.close()
    side.bus.reset()
    region.buf[0] = 1  # the mapping outlives the bus


def test_closing_fails_a_message_that_waits() -> None:
    side = Side()
    side.answer = lambda request: None
    errors: list[Exception] = []

    def wait() -> None:
        try:
            side.bus.set_status(1)
        except TransportError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not side.seen:
        time.sleep(0.01)
    side.close()
    thread.join()
    assert "stopped before it answered SET_STATUS 0x1" in str(errors[0])
