"""A device with made-up workers (fake_worker.py), and the driver's steps: for the tests of the supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import fake_worker
import pytest

from vdusefast.api import Device
from vdusefast.config import make_config
from vdusefast.control.limits import Limits
from vdusefast.control.states import QueueInfo
from vdusefast.control.virtqueue import VqControl
from vdusefast.control.vq_states import VqState
from vdusefast.transport.loopback import LoopbackBus

WAIT_S = 10.0
# By the first two, DRIVER_OK is answered once every queue has started or failed: tests look at the queues then.
# No worker that runs is given up by PATIENT, however busy the machine is.
PATIENT = Limits(reset_s=10.0, start_grace_s=WAIT_S)
# For tests that stop a worker, which is to be given up soon; the other ones have to answer within this time, too.
QUICK = Limits(quiesce_s=1.0, reset_s=1.0, start_grace_s=WAIT_S)
# For tests in which DRIVER_OK does not wait for a queue.
PROMPT = Limits(reset_s=10.0)
MEMORY_IOVA = 0x10000
T = TypeVar("T")


def make_device(
    behaviour: str = "normal", queues: int = 2, limits: Limits = PATIENT, *, packed: bool = False
) -> Device:
    config = make_config(name="d0", uri="memory:1M", queues=queues, queue_size=64, packed=packed)
    return Device(config, limits=limits, worker_command=[sys.executable, fake_worker.__file__, behaviour])


def set_up(bus: LoopbackBus, *desc_addrs: int, idx: int = 0, size: int = 64) -> None:
    """Probe, with a ready queue for each of `desc_addrs`."""
    bus.negotiate(bus.offered_features)
    for index, desc_addr in enumerate(desc_addrs):
        bus.set_vq(index, size, desc_addr, MEMORY_IOVA, MEMORY_IOVA, idx)
        bus.set_vq_ready(index)
    bus.driver_ok()


def kick(bus: LoopbackBus, index: int) -> None:
    """Kick, and wait until the worker has interrupted for it."""
    os.eventfd_write(bus.kickfd(index), 1)
    assert select.select([bus.irqfd(index)], [], [], WAIT_S)[0], "no interrupt"
    os.eventfd_read(bus.irqfd(index))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_state(device: Device, index: int, state: VqState) -> QueueInfo:
    deadline = time.monotonic() + WAIT_S
    while device.queues()[index].state != state:
        assert time.monotonic() < deadline, device.queues()
        time.sleep(0.005)
    return device.queues()[index]


def states(device: Device) -> list[str]:
    return [str(queue.state) for queue in device.queues()]


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@contextmanager
def paused(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed meanwhile, as it should
            os.kill(pid, signal.SIGCONT)


def control(device: Device, index: int = 0) -> VqControl:
    """Return a queue as the supervisor has it; to be used in the loop's thread."""
    assert device.supervisor is not None
    return device.supervisor.vqs[index]


def in_loop(device: Device, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in the supervisor's loop, and return its result."""
    assert device.supervisor is not None
    assert device.supervisor.loop is not None
    return asyncio.run_coroutine_threadsafe(work, device.supervisor.loop).result(WAIT_S)
