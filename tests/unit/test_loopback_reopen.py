"""A device on a loopback bus outlives its server, as one in the kernel does."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vdusefast.bench.torture import loopback_host as remote_module
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.errors import DeviceBusyError
from vdusefast.transport import DeviceBrokenError, DeviceSpec, TransportError, uapi
from vdusefast.transport import loopback as loopback_module
from vdusefast.transport.loopback import LoopbackBus, LoopbackTransport
from vdusefast.transport.uapi import Request, Response

SPEC = DeviceSpec("t0", uapi.VIRTIO_F_VERSION_1, bytes(range(96)), queue_count=2, queue_size_max=64)
AnyTransport = LoopbackTransport | RemoteLoopbackTransport


class Servers:
    """Makes the servers of one device, one after another; `bus` is the driver's side."""

    def __init__(self, opened: ExitStack, path: Path | None):
        self.opened = opened
        self.host = None if path is None else opened.enter_context(LoopbackHost(path))
        self.local: LoopbackBus | None = None

    def make(self, msg_timeout_s: float = 30.0) -> AnyTransport:
        made: AnyTransport
        if self.host is not None:
            made = RemoteLoopbackTransport(self.host.path, msg_timeout_s)
        else:
            made = LoopbackTransport(msg_timeout_s, self.local)
        self.opened.callback(made.close)
        return made

    def first(self, msg_timeout_s: float = 30.0) -> AnyTransport:
        made = self.make(msg_timeout_s)
        made.create(SPEC)
        asyncio.run(made.attach())
        if isinstance(made, LoopbackTransport):
            self.local = made.bus
        return made

    @property
    def bus(self) -> LoopbackBus:
        bus = self.local if self.host is None else self.host.bus
        assert bus is not None
        return bus


@pytest.fixture(params=["here", "in another process's bus"])
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Servers]:
    with ExitStack() as opened:
        yield Servers(opened, None if request.param == "here" else tmp_path / "bus")


def next_message(transport: AnyTransport) -> Request:
    select.select([transport.message_fd()], [], [], 10)
    request = transport.receive()
    assert request is not None
    return request


def answer(transport: AnyTransport, count: int) -> None:
    for _ in range(count):
        transport.respond(Response(next_message(transport).request_id, True))


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_unanswered_message_comes_again_to_the_next_server(servers: Servers) -> None:
    first = servers.first()
    driver = in_background(lambda: servers.bus.set_status(1))
    lost = next_message(first)
    first.close(keep=True)
    second = servers.make()
    second.reopen(SPEC)
    assert next_message(second) == lost
    second.respond(Response(lost.request_id, True))
    driver.join(10)
    assert servers.bus.status == 1
    assert second.receive() is None


def test_message_sent_while_nobody_serves_waits(servers: Servers) -> None:
    servers.first().close(keep=True)
    driver = in_background(lambda: servers.bus.set_status(1))
    second = servers.make()
    second.reopen(SPEC)
    answer(second, 1)
    driver.join(10)
    assert servers.bus.status == 1


def test_messages_that_wait_for_a_server_count_their_time(servers: Servers) -> None:
    servers.first(msg_timeout_s=0.1).close(keep=True)
    with pytest.raises(DeviceBrokenError, match="did not answer SET_STATUS 0x1 within"):
        servers.bus.set_status(1)
    with pytest.raises(DeviceBrokenError, match="broken"):
        servers.make().reopen(SPEC)


def test_device_has_one_server_at_a_time(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loopback_module, remote_module):
        monkeypatch.setattr(module, "REOPEN_TIMEOUT_S", 0.05)
    first = servers.first()
    with pytest.raises(DeviceBusyError, match="held by another server"):
        servers.make().reopen(SPEC)
    port = first.worker_port(1)
    first.close(keep=True)
    with pytest.raises(DeviceBusyError, match="a worker of one"):
        servers.make().reopen(SPEC)
    port.close()
    second = servers.make()
    second.reopen(SPEC)
    assert second.receive() is None


def test_reopen_waits_for_the_last_worker_to_end(servers: Servers) -> None:
    first = servers.first()
    port = first.worker_port(0)
    first.close(keep=True)

    def end_late() -> None:
        time.sleep(0.1)
        port.close()

    thread = in_background(end_late)
    begin = time.monotonic()
    servers.make().reopen(SPEC)
    assert 0.05 < time.monotonic() - begin < 5
    thread.join()


def test_what_the_driver_has_set_up_is_still_there(servers: Servers) -> None:
    first = servers.first()
    assert first.driver_status() == 0
    statuses = [0, 1, 3, 0xB]
    driver = in_background(lambda: servers.bus.negotiate(5))
    answer(first, len(statuses))
    driver.join(10)
    assert first.driver_status() == 0xB
    servers.bus.set_vq(1, 32, 0x1000, 0x2000, 0x3000, 5)
    servers.bus.set_vq_ready(1)
    driver = in_background(servers.bus.driver_ok)
    answer(first, 1)
    driver.join(10)
    first.close(keep=True)
    second = servers.make()
    second.reopen(SPEC)
    assert second.driver_status() == 0xF
    assert second.acked_features() == 5
    assert second.vq_info(1) == uapi.VqInfo(1, 32, 0x1000, 0x2000, 0x3000, 5, True)
    second.inject_irq(1)
    assert os.eventfd_read(servers.bus.irqfd(1)) == 1


def test_kicks_of_a_dead_server_are_lost_with_its_eventfd(servers: Servers) -> None:
    first = servers.first()
    servers.bus.set_vq_ready(0)
    dead, live = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    try:
        first.set_kickfd(0, dead)
        kickfd = servers.bus.kickfd(0)
        first.close(keep=True)
        os.eventfd_write(kickfd, 1)
        second = servers.make()
        second.reopen(SPEC)
        second.set_kickfd(0, live)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(live)
        os.eventfd_write(kickfd, 1)
        assert os.eventfd_read(live) == 1
    finally:
        os.close(dead)
        os.close(live)


def test_device_that_was_destroyed_cannot_be_taken_over(servers: Servers) -> None:
    servers.first().close()
    with pytest.raises(TransportError, match=r"removed|no server has created"):
        servers.make().reopen(SPEC)


def test_second_device_of_one_bus_is_refused(servers: Servers) -> None:
    servers.first()
    with pytest.raises(TransportError, match="created already"):
        servers.make().create(SPEC)


def test_death_of_a_server_lets_go_of_the_device(tmp_path: Path) -> None:
    with LoopbackHost(tmp_path / "bus") as host:
        report, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            RemoteLoopbackTransport(host.path).create(SPEC)
            os.write(told, b"x")
            signal.pause()
        os.read(report, 1)
        second = RemoteLoopbackTransport(host.path)
        os.kill(pid, signal.SIGKILL)
        second.reopen(SPEC)
        os.waitpid(pid, 0)
        assert second.driver_status() == 0
        second.close()
        for fd in (report, told):
            os.close(fd)


def test_server_whose_bus_is_gone_is_told(tmp_path: Path) -> None:
    host = LoopbackHost(tmp_path / "bus")
    transport = RemoteLoopbackTransport(host.path)
    transport.create(SPEC)
    host.close()
    with pytest.raises(TransportError, match=r"is gone|does not answer"):
        transport.acked_features()
    transport.close(keep=True)
    with pytest.raises(TransportError, match="no bus at"):
        RemoteLoopbackTransport(host.path).create(SPEC)


def test_questions_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with LoopbackHost(tmp_path / "bus") as host:
        transport = RemoteLoopbackTransport(host.path)
        with pytest.raises(TransportError, match="not open"):
            transport.acked_features()
        transport.create(SPEC)
        with pytest.raises(TransportError, match="no question 'what'"):
            transport._ask("what")
        with pytest.raises(OSError, match="Invalid") as wrong:
            transport.vq_info(2)
        assert wrong.value.errno == errno.EINVAL
        transport.close()
