"""Workers that are kept from the driver's memory for a moment, while its pages are replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest

import vdusefast
from vdusefast.control.virtqueue import VqControl
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.transport import uapi
from vdusefast.transport.loopback import LoopbackTransport
from vdusefast.transport.user_memory import UserMemory

MIB = 1 << 20
ALL = 2**64 - 1
BLOCK = os.urandom(4096)
SOON_S = 0.3
WAIT_S = 20.0

_T = TypeVar("_T")

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[vdusefast.Device]:
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    os.truncate(path, 2 * MIB)
    with vdusefast.Device(vdusefast.make_config(name="d0", uri=f"file:{path}", queues=2)) as made:
        yield made


def begin(device: vdusefast.Device, work: Coroutine[Any, Any, _T]) -> Future[_T]:
    assert device.supervisor is not None
    assert device.supervisor.loop is not None
    return asyncio.run_coroutine_threadsafe(work, device.supervisor.loop)


def run(device: vdusefast.Device, work: Coroutine[Any, Any, _T]) -> _T:
    return begin(device, work).result(WAIT_S)


def queue(device: vdusefast.Device, index: int = 0) -> VqControl:
    assert device.supervisor is not None
    return device.supervisor.vqs[index]


def hold(device: vdusefast.Device, *, timeout_s: float = WAIT_S) -> bool:
    async def work() -> bool:
        await queue(device).lock()
        return await queue(device).hold(ALL, timeout_s)

    return run(device, work())


class Write:
    """A write to queue 0, in a thread."""

    def __init__(self, driver: LoopbackDriver):
        self._thread = threading.Thread(target=driver.write, args=(8192, BLOCK))
        self._thread.start()

    def done(self, within_s: float) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()


def test_nothing_is_taken_until_it_is_released(device: vdusefast.Device) -> None:
    with device.driver() as driver:
        driver.write(0, BLOCK)
        assert hold(device)
        write = Write(driver)
        driver.write(4096, BLOCK, queue=1)  # the others are not concerned
        assert not write.done(SOON_S)
        run(device, queue(device).release(0))
        assert write.done(WAIT_S)
        assert driver.read(0, 3 * len(BLOCK)) == 3 * BLOCK


def test_other_operations_wait_for_the_release(device: vdusefast.Device) -> None:
    with device.driver() as driver:
        driver.write(0, BLOCK)
        assert hold(device)
        quiesce = begin(device, queue(device).quiesce())
        with pytest.raises(TimeoutError):
            quiesce.result(SOON_S)
        run(device, queue(device).release(0))
        assert quiesce.result(WAIT_S) == 1


def test_a_worker_that_dies_while_it_is_held_is_replaced(device: vdusefast.Device) -> None:
    with device.driver() as driver:
        driver.write(0, BLOCK)
        assert hold(device)
        write = Write(driver)
        os.kill(device.queues()[0].pid, signal.SIGKILL)
        assert not write.done(SOON_S)
        run(device, queue(device).release(MIB))
        assert write.done(WAIT_S)
        assert driver.read(8192, len(BLOCK)) == BLOCK
        assert device.queues()[0].restarts == 1


def test_one_that_is_too_slow_goes_on_by_itself(device: vdusefast.Device) -> None:
    """It carries out both commands when it can; nobody kills it for that."""
    with device.driver() as driver:
        driver.write(0, BLOCK)
        pid = device.queues()[0].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            assert not hold(device, timeout_s=SOON_S)
            run(device, queue(device).release(0))
        finally:
            os.kill(pid, signal.SIGCONT)
        driver.write(8192, BLOCK)
        assert driver.read(8192, len(BLOCK)) == BLOCK
        assert device.queues()[0].pid == pid


def test_memory_is_put_to_use_while_the_device_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor's side of it with real workers; what the kernel then does with it, guests show."""
    asked: list[int] = []
    due = threading.Event()

    def ioctl(number: int, argument: bytes) -> bytes:
        asked.append(number)
        capability = uapi.VDUSE_IOVA_CAP_UMEM if due.is_set() else 0
        return uapi.IOVA_INFO.pack(0, MIB - 1, capability, 0) if number == uapi.VDUSE_IOTLB_GET_INFO else argument

    memory = UserMemory("d0", MIB, ioctl)
    monkeypatch.setattr(LoopbackTransport, "user_memory", lambda _self: memory)
    config = vdusefast.make_config(name="d0", uri="memory:4M", queues=2)
    try:
        with vdusefast.Device(config) as device, device.driver() as driver:
            assert device.info()["memory"] == "the driver's own"
            for index in range(400):
                driver.write(index * 4096, BLOCK, queue=index % 2)
                if index == 100:
                    due.set()
                if index >= 200 and memory.registered:
                    break
            while not device.info()["memory"].startswith("user memory"):
                assert driver.read(0, len(BLOCK)) == BLOCK
            assert driver.read(0, index * 4096 + 4096) == BLOCK * (index + 1)
        assert asked.count(uapi.VDUSE_IOTLB_REG_UMEM) == 1
    finally:
        memory.close()
