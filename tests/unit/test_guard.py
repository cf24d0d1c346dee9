"""Any part of a device may fail in an unexpected way: the failure is seen, and the device serves on. By injection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from nbd_rig import nbdkit
from supervised import MEMORY_IOVA, in_loop, kick, make_device, set_up, states, wait_state, wait_until

import vdusefast
from vdusefast.api import Device
from vdusefast.base.guard import Guard, InternalError, Part
from vdusefast.control import device_watch, messages, relay_control, take_over
from vdusefast.control.relay_process import RelayProcess
from vdusefast.control.stall_watch import QueueWatch
from vdusefast.control.states import DeviceState
from vdusefast.control.vq_states import VqState
from vdusefast.state import keeper_control
from vdusefast.transport import TransportError
from vdusefast.transport.loopback import LoopbackTransport

ROOT = Path(__file__).parents[2]

# A relay that dies takes nothing of the disk with it.
CLASS = """
import mmap
import vdusefast

class Disk(vdusefast.Backend):
    size_bytes = 1 << 20
    shareable = False

    def __init__(self):
        with open(__file__ + ".data", "a+b") as file:
            file.truncate(self.size_bytes)
            self.data = memoryview(mmap.mmap(file.fileno(), self.size_bytes))

    def pread(self, buffer, offset_bytes):
        buffer[:] = self.data[offset_bytes : offset_bytes + len(buffer)]

    def pwrite(self, buffer, offset_bytes):
        print("a write")
        self.data[offset_bytes : offset_bytes + len(buffer)] = buffer
"""


class BoomError(Exception):
    """An exception that no part expects."""


class Injector:
    """Has a part fail the next times that it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.left: Counter[Part] = Counter()
        attend, call = Guard._attend, Guard.call

        async def fail() -> None:
            raise BoomError("injected")

        def attend_injected(
            guard: Guard, part: Part, work: Coroutine[Any, Any, Any], recover: Callable[[], object] | None
        ) -> Coroutine[Any, Any, Any]:
            return attend(guard, part, fail() if self.take(part) else work, recover)

        def call_injected(
            guard: Guard, part: Part, function: Callable[[], object], recover: Callable[[], object] | None = None
        ) -> None:
            def boom() -> None:
                raise BoomError("injected")

            call(guard, part, boom if self.take(part) else function, recover)

        monkeypatch.setattr(Guard, "_attend", attend_injected)
        monkeypatch.setattr(Guard, "call", call_injected)

    def take(self, part: Part) -> bool:
        if self.left[part] <= 0:
            return False
        self.left[part] -= 1
        return True


@pytest.fixture
def injector(monkeypatch: pytest.MonkeyPatch) -> Injector:
    for module in (device_watch, take_over):
        monkeypatch.setattr(module, "PAUSE_S", 0.05)
    monkeypatch.setattr(relay_control, "PAUSE_MAX_S", 0.05)
    return Injector(monkeypatch)


def served(device: Device) -> None:
    """Check that the device serves a driver that begins again."""
    device.bus.reset()
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    for queue in (0, 1):
        wait_state(device, queue, VqState.RUNNING)
        kick(device.bus, queue)


def check_seen(device: Device, part: Part, caplog: pytest.LogCaptureFixture) -> None:
    wait_until(lambda: device.failure is not None)
    assert isinstance(device.failure, InternalError)
    expected = f"device {device.name}: {part.what} failed: BoomError: injected; {part.follows}"
    assert str(device.failure) == expected
    assert device.info()["failure"] == expected
    assert any(record.getMessage() == expected and record.exc_info for record in caplog.records)


def provoke_answer(device: Device) -> None:
    with pytest.raises(TransportError, match="GET_VQ_STATE was refused"):
        device.bus.get_vq_state(0)


def provoke_kick(device: Device) -> None:
    device.bus.negotiate(device.bus.offered_features)
    device.bus.driver_ok()
    os.eventfd_write(device.bus.kickfd(0), 1)
    assert "internal failure" in wait_state(device, 0, VqState.FAILED).reason


def provoke_start(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    assert "internal failure" in wait_state(device, 0, VqState.FAILED).reason
    wait_state(device, 1, VqState.RUNNING)


def provoke_death(device: Device) -> None:
    served(device)
    pid = device.queues()[0].pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: device.queues()[0].pid not in (pid, -1))
    wait_state(device, 0, VqState.RUNNING)
    kick(device.bus, 0)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))


def provoke_events(device: Device) -> None:
    pids = {queue.pid for queue in device.queues()}
    served(device)
    wait_until(lambda: len(pids & {queue.pid for queue in device.queues()}) == 1)


def provoke_capacity(device: Device) -> None:
    assert device.supervisor is not None
    in_loop(device, device.supervisor.resize(1024))
    assert device.info()["size_bytes"] == 1024 * 512


def provoke_follow(device: Device) -> None:
    device._follow_store(12345)


def provoke_loop(device: Device) -> None:
    def boom() -> None:
        raise BoomError("injected")

    assert device._loop is not None
    device._loop.call_soon_threadsafe(boom)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "provoke"),
    [
        (Part.MESSAGES, served),
        (Part.ANSWER, provoke_answer),
        (Part.CONFIG_IRQ, provoke_capacity),
        (Part.QUEUE_START, provoke_start),
        (Part.KICK, provoke_kick),
        (Part.TAKE_OVER, provoke_death),
        (Part.WORKER_EVENTS, provoke_events),
        (Part.WORKER_OUTPUT, served),
        (Part.WORKER_END, provoke_death),
        (Part.RESIZE, provoke_follow),
        (Part.LOOP, provoke_loop),
    ],
    ids=lambda value: value.name.lower() if isinstance(value, Part) else "",
)
def test_part_that_fails_is_seen_and_the_device_serves_on(
    part: Part, provoke: Callable[[Device], None], injector: Injector, caplog: pytest.LogCaptureFixture
) -> None:
    with make_device() as device:
        device.bus.add_region(MEMORY_IOVA, 4096)
        injector.left[part] = 1
        provoke(device)
        check_seen(device, part, caplog)
        served(device)


def test_exit_in_the_loop_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    with make_device() as device:
        device.bus.add_region(MEMORY_IOVA, 4096)
        assert device._loop is not None
        device._loop.call_soon_threadsafe(sys.exit, 3)
        wait_until(lambda: device.failure is not None)
        assert "running the device's loop failed: SystemExit" in str(device.failure)
        served(device)


def test_watch_begins_again(
    injector: Injector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(device_watch, "LOOK_S", 0.01)
    monkeypatch.setattr(QueueWatch, "look", lambda watch, queue, *_, **__: looked.append(queue))
    injector.left[Part.QUEUE_WATCH] = 2
    with make_device() as device:
        check_seen(device, Part.QUEUE_WATCH, caplog)
        wait_until(lambda: 1 in looked)


def test_memory_that_fails_is_left_as_it_is(
    injector: Injector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoopbackTransport, "user_memory", lambda _: object())
    injector.left[Part.MEMORY] = 1
    with make_device() as device:
        check_seen(device, Part.MEMORY, caplog)
        assert "no user memory: an internal failure" in device.info()["memory"]


def test_messages_that_can_never_be_read_break_the_device(injector: Injector, caplog: pytest.LogCaptureFixture) -> None:
    with make_device() as device:
        device.bus.add_region(MEMORY_IOVA, 4096)
        pids = [queue.pid for queue in device.queues()]
        injector.left[Part.MESSAGES] = messages.DEAF_COUNT_MAX
        injector.left[Part.QUEUE_RESET] = 2
        device.bus.msg_timeout_s = 0.5
        with pytest.raises(TransportError):
            device.bus.get_vq_state(0)
        wait_until(lambda: device.state == DeviceState.BROKEN)
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
        assert states(device) == ["failed", "failed"]
        assert sum(Part.QUEUE_RESET.what in record.getMessage() for record in caplog.records) >= 2


class EagerLoop:
    """A loop that carries out a call before the caller continues, as on a machine that is busy elsewhere."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop

    def call_soon_threadsafe(self, callback: Callable[..., object], *words: Any) -> None:
        self._loop.call_soon_threadsafe(callback, *words)
        for _ in range(3):  # also what that has started
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(30)


@pytest.mark.slow
def test_relay_that_fails_before_the_start_goes_on_is_seen(
    tmp_path: Path, injector: Injector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_loop = Device._start_loop
    monkeypatch.setattr(Device, "_start_loop", lambda device: EagerLoop(start_loop(device)))
    (tmp_path / "disk.py").write_text(CLASS)
    injector.left[Part.RELAY] = 1
    with Device(vdusefast.make_config(name="d0", uri=f"python:{tmp_path}/disk.py:Disk", queues=2)) as device:
        check_seen(device, Part.RELAY, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("part", [Part.RELAY, Part.RELAY_EVENTS, Part.RELAY_OUTPUT])
def test_relay_that_fails_is_seen_and_the_device_serves_on(
    tmp_path: Path, part: Part, injector: Injector, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "disk.py").write_text(CLASS)
    config = vdusefast.make_config(name="d0", uri=f"python:{tmp_path}/disk.py:Disk", queues=2)
    injector.left[part] = 1
    with Device(config) as device, device.driver() as driver:
        driver.write(0, b"a" * 4096, queue=0)
        assert driver.read(0, 4096, queue=1) == b"a" * 4096
        check_seen(device, part, caplog)
        driver.write(0, b"b" * 4096, queue=1)
        assert driver.read(0, 4096, queue=0) == b"b" * 4096


@pytest.mark.slow
def test_keeper_that_is_not_understood_is_replaced(
    tmp_path: Path, injector: Injector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_control, "PAUSE_S", 0.05)
    injector.left[Part.KEEPER] = 2  # its first answer, and the start of the next one
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(nbdkit(tmp_path / "socket", "memory", "1M"))
        device = opened.enter_context(Device(vdusefast.make_config(name="d0", uri=server.uri)))
        driver = opened.enter_context(device.driver())
        driver.write(0, b"a" * 4096)
        check_seen(device, Part.KEEPER, caplog)
        wait_until(lambda: not injector.left[Part.KEEPER])
        assert driver.read(0, 4096) == b"a" * 4096
        assert device.queues()[0].restarts == 0
        assert not any("the connection is lost" in record.getMessage() for record in caplog.records)


def test_recovery_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise BoomError("again")

    guard = Guard("d0", refuse)
    guard.call(Part.LOOP, refuse, refuse)
    assert sum("so did its recovery" in record.getMessage() for record in caplog.records) == 2


def test_task_that_is_cancelled_before_it_begins_leaves_nothing() -> None:
    async def work() -> None:
        raise AssertionError

    async def main() -> None:
        guard = Guard("d0", lambda error: None)
        guard.task(Part.LOOP, work())
        await guard.close()
        assert not guard._tasks

    asyncio.run(main())


def test_every_part_is_documented_and_injected() -> None:
    """The table in docs/design/control-plane.md is that of the code."""
    table = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs/design/control-plane.md").read_text(), re.MULTILINE)
    assert {(part.what, part.follows) for part in Part} <= set(table)
    source = Path(__file__).read_text()
    assert [part.name for part in Part if f"Part.{part.name}" not in source] == []


# -- a relay that the kernel does not let go


@pytest.fixture
def unkillable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device whose relay is stopped, and does not mind being killed, as one that waits for its storage."""
    (tmp_path / "disk.py").write_text(CLASS)
    monkeypatch.setattr(relay_control, "END_S", 0.1)
    monkeypatch.setattr(relay_control, "REAP_S", 0.2)
    device = Device(vdusefast.make_config(name="d0", uri=f"python:{tmp_path}/disk.py:Disk", queues=2))
    device.start()
    wait_until(lambda: device.info()["relay_pid"] > 0)
    pid = device.info()["relay_pid"]
    os.kill(pid, signal.SIGSTOP)
    process = next(p for p in gc.get_objects() if isinstance(p, subprocess.Popen) and p.pid == pid)
    kill = subprocess.Popen.kill
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: process.pid == pid or kill(process))
    try:
        yield device
    finally:
        device.stop()
        os.kill(pid, signal.SIGKILL)
        process.wait(10)


@pytest.mark.slow
def test_relay_that_cannot_be_killed_holds_up_neither_the_loop_nor_the_stop(
    unkillable: Device, caplog: pytest.LogCaptureFixture
) -> None:
    pid = unkillable.info()["relay_pid"]
    began = time.monotonic()
    unkillable.stop()
    assert time.monotonic() - began < 10
    assert f"relay (pid {pid}) waits in the kernel for its storage and cannot be killed" in caplog.text


@pytest.mark.slow
def test_no_other_relay_takes_the_place_of_one_that_cannot_be_killed(
    unkillable: Device, injector: Injector, caplog: pytest.LogCaptureFixture
) -> None:
    pid = unkillable.info()["relay_pid"]
    relay = next(r for r in gc.get_objects() if isinstance(r, RelayProcess) and r.pid == pid)
    assert unkillable._loop is not None
    unkillable._loop.call_soon_threadsafe(relay._hear_no_more)
    wait_until(lambda: "cannot be killed; no other can take its place" in caplog.text)
    assert unkillable.responds(5)
    assert unkillable.info()["relay_pid"] == pid
    assert "cannot be killed" in unkillable.info()["failure"]
