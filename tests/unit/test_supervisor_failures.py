"""A failure under a supervisor does not spread: storage that hangs, workers that die, bad rings. And the stop.

The workers here are tests/unit/fake_worker.py: they count kicks and fail on request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fake_worker
import pytest
from supervised import (
    MEMORY_IOVA,
    PROMPT,
    QUICK,
    WAIT_S,
    control,
    errors_logged,
    in_loop,
    kick,
    make_device,
    paused,
    set_up,
    states,
    wait_state,
    wait_until,
)

from vdusefast.api import Device
from vdusefast.cli import render
from vdusefast.control import supervisor, take_over
from vdusefast.control.limits import Limits
from vdusefast.control.states import DeviceState
from vdusefast.control.take_over import TRIES_AT_ONCE
from vdusefast.control.virtqueue import VqControl
from vdusefast.control.vq_states import VqState
from vdusefast.transport import DeviceBrokenError, TransportError
from vdusefast.transport.loopback import LoopbackTransport


@pytest.fixture
def device() -> Iterator[Device]:
    with make_device() as made:
        made.bus.add_region(MEMORY_IOVA, 4096)
        yield made


@pytest.fixture
def impatient() -> Iterator[Device]:
    """Return a device that soon gives up a worker, for tests that stop one."""
    with make_device(limits=QUICK) as made:
        made.bus.add_region(MEMORY_IOVA, 4096)
        yield made


# -- storage that does not return


def test_reset_replaces_a_worker_that_does_not_finish(impatient: Device, caplog: pytest.LogCaptureFixture) -> None:
    device = impatient
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    stuck, other = device.queues()
    with paused(stuck.pid):
        began = time.monotonic()
        device.bus.reset()
        assert time.monotonic() - began >= QUICK.quiesce_s
    fresh, same = device.queues()
    assert fresh.pid != stuck.pid
    assert (fresh.engine, fresh.state, fresh.restarts) == ("fake", VqState.STOPPED, 1)
    assert same.pid == other.pid
    assert not os.path.exists(f"/proc/{stuck.pid}")
    message = f"device d0: queue 0: worker (pid {stuck.pid}) did not finish its requests within 1 s and was killed"
    assert sum(record.getMessage().startswith(message) for record in caplog.records) == 1
    assert device.failure is None
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    kick(device.bus, 0)


def test_other_messages_are_answered_while_one_waits_for_storage() -> None:
    with make_device(limits=PROMPT) as device:
        bus = device.bus
        bus.add_region(MEMORY_IOVA, 4096)
        set_up(bus, MEMORY_IOVA, MEMORY_IOVA)
        for index in range(2):
            wait_state(device, index, VqState.RUNNING)
        with paused(device.queues()[0].pid):
            waiting = threading.Thread(target=bus.get_vq_state, args=(0,))
            waiting.start()
            wait_state(device, 0, VqState.QUIESCING)
            assert bus.get_vq_state(1) == 0
            bus.set_status(0xF)  # starts queue 1 again; queue 0 is being quiesced
            assert device.queues()[0].state == VqState.QUIESCING
            assert waiting.is_alive()
        waiting.join()
        assert device.failure is None


def test_lost_position_is_said_to_be_lost(device: Device) -> None:
    set_up(device.bus, fake_worker.RING_FAILED_ADDR, MEMORY_IOVA)
    wait_state(device, 0, VqState.FAILED)
    with pytest.raises(TransportError, match="GET_VQ_STATE was refused"):
        device.bus.get_vq_state(0)
    device.bus.set_status(0xF)  # cannot go on where it does not know where that is
    assert "reset the device" in device.queues()[0].reason
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    kick(device.bus, 0)


@pytest.mark.slow
def test_a_worker_killed_for_a_message_is_replaced_and_tells_where_it_stands(impatient: Device) -> None:
    device = impatient
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    with paused(device.queues()[0].pid):
        device.bus.update_iotlb(0, 0xFFF)  # answered: the killed worker's mappings are gone
    assert wait_state(device, 0, VqState.RUNNING).restarts == 1
    with paused(device.queues()[0].pid):
        assert device.bus.get_vq_state(0) == 0
    assert device.queues()[0].restarts == 2


def test_driver_ok_is_answered_though_a_worker_is_late() -> None:
    with make_device(limits=PROMPT) as device:
        device.bus.add_region(MEMORY_IOVA, 4096)
        device.bus.negotiate(device.bus.offered_features)
        device.bus.set_vq(0, 64, MEMORY_IOVA, MEMORY_IOVA, MEMORY_IOVA)
        device.bus.set_vq_ready(0)
        late = device.queues()[0].pid
        with paused(late):
            device.bus.driver_ok()
            os.eventfd_write(device.bus.kickfd(0), 1)
        assert (wait_state(device, 0, VqState.RUNNING).pid, device.queues()[0].restarts) == (late, 0)
        assert select.select([device.bus.irqfd(0)], [], [], WAIT_S)[0]


def test_message_unanswered_in_time_breaks_the_device(caplog: pytest.LogCaptureFixture) -> None:
    with make_device(limits=Limits(quiesce_s=1.0)) as device:
        bus = device.bus
        bus.add_region(MEMORY_IOVA, 4096)
        set_up(bus, MEMORY_IOVA)
        with paused(device.queues()[0].pid), pytest.raises(DeviceBrokenError):
            bus.set_status(0, timeout_s=0.1)
        deadline = time.monotonic() + WAIT_S
        while device.state != DeviceState.BROKEN:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        wait_state(device, 0, VqState.STOPPED)
    assert isinstance(device.failure, DeviceBrokenError)


# -- workers that die


def test_killed_worker_is_named_once_and_replaced(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    victim, other = device.queues()
    with caplog.at_level(logging.WARNING, "vdusefast"):
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: device.queues()[0].pid != victim.pid)
        fresh = wait_state(device, 0, VqState.RUNNING)
    assert fresh.restarts == 1
    named = f"device d0: queue 0: worker (pid {victim.pid}) was killed by SIGKILL"
    assert sum(record.getMessage().startswith(named) for record in caplog.records) == 1
    assert device.failure is None
    assert device.queues()[1].pid == other.pid
    kick(device.bus, 0)
    kick(device.bus, 1)


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_is_tried_again_with_pauses(device: Device) -> None:
    set_up(device.bus, fake_worker.CRASH_ADDR, MEMORY_IOVA)
    wait_until(lambda: device.failure is not None)
    assert "so did those before it: tried again with pauses" in str(device.failure)
    assert device.queues()[0].restarts == TRIES_AT_ONCE + 1
    assert states(device) == ["recovering", "running"]
    device.bus.reset()  # which ends the trying, too
    wait_state(device, 0, VqState.STOPPED)


def kill_idle_worker(device: Device) -> None:
    """Kill the worker of queue 0 and wait for the next one."""
    victim = device.queues()[0]
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(lambda: device.queues()[0].pid not in (victim.pid, -1))
    wait_state(device, 0, VqState.RUNNING)


def test_failure_ends_and_is_history(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    began_s = time.time()
    for _ in range(TRIES_AT_ONCE + 1):
        assert device.last_failure is None
        kill_idle_worker(device)
    assert device.failure is None
    past = device.last_failure
    assert past is not None
    assert "so did those before it: tried again with pauses" in str(past.error)
    assert began_s <= past.began_s <= past.ended_s <= time.time()
    info = device.info()
    assert (info["failure"], info["last_failure"]["text"]) == ("", str(past.error))
    assert render.list_text([info]).splitlines()[1].split()[:2] == ["d0", "running"]
    shown = render.show_text(info)
    assert "failed until" in shown
    assert "\n  failure" not in shown


def test_deaths_far_apart_are_no_failure(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take_over, "WINDOW_S", 0.0)
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    for _ in range(TRIES_AT_ONCE + 2):
        kill_idle_worker(device)
    assert device.last_failure is None


@pytest.mark.slow
def test_failure_of_a_ring_ends_with_a_reset(device: Device) -> None:
    set_up(device.bus, fake_worker.RING_FAILED_ADDR, MEMORY_IOVA)
    wait_until(lambda: "stopped serving" in str(device.failure))
    device.bus.reset()
    wait_state(device, 0, VqState.STOPPED)
    assert device.failure is None
    assert "stopped serving" in str(device.last_failure)


def test_idle_worker_that_died_is_replaced_at_once(device: Device) -> None:
    bus = device.bus
    bus.negotiate(bus.offered_features)
    bus.set_vq(0, 64, MEMORY_IOVA, MEMORY_IOVA, MEMORY_IOVA)
    bus.set_vq_ready(0)
    victim = device.queues()[0]
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(lambda: device.queues()[0].pid != victim.pid)
    wait_state(device, 0, VqState.STOPPED)
    bus.driver_ok()
    wait_state(device, 0, VqState.RUNNING)
    kick(bus, 0)


def test_crash_during_a_message_does_not_hold_up_its_answer(device: Device) -> None:
    set_up(device.bus, fake_worker.CRASH_ADDR, MEMORY_IOVA)
    assert "was killed by SIGSEGV" in device.queues()[0].reason
    assert states(device) == ["recovering", "running"]


def test_exit_is_named_with_status_and_last_line(device: Device) -> None:
    set_up(device.bus, fake_worker.EXIT_ADDR)
    assert "ended with status 3; its last line: out of pixie dust" in device.queues()[0].reason


@pytest.mark.slow
def test_worker_that_sends_rubbish_is_killed(device: Device) -> None:
    set_up(device.bus, fake_worker.MALFORMED_ADDR)
    assert "sent a malformed message" in device.queues()[0].reason


def test_a_start_that_is_cut_short_leaves_no_worker(device: Device) -> None:
    slot = control(device).slot
    slot.command = [sys.executable, "-c", "import time; time.sleep(60)"]

    async def cut_short() -> int:
        await slot.kill()
        spawning = asyncio.ensure_future(slot.spawn(30))
        while slot.usable is None:
            await asyncio.sleep(0.01)
        pid = slot.usable.pid
        spawning.cancel()
        await asyncio.gather(spawning, return_exceptions=True)
        await slot.kill()
        return pid

    pid = in_loop(device, cut_short())
    assert not Path(f"/proc/{pid}").exists()


# -- bad rings


def test_bad_ring_stops_its_queue_and_keeps_its_worker(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    pids = [q.pid for q in device.queues()]
    device.bus.negotiate(device.bus.offered_features)
    for index, desc_addr in enumerate((MEMORY_IOVA, fake_worker.RING_FAILED_ADDR)):
        device.bus.set_vq(index, 64, desc_addr, MEMORY_IOVA, MEMORY_IOVA)
        device.bus.set_vq_ready(index)
    device.bus.driver_ok()
    info = wait_state(device, 1, VqState.FAILED)
    assert info.reason == f"device d0: queue 1: worker (pid {pids[1]}) stopped serving: head 99 is out of range"
    assert errors_logged(caplog) == [info.reason]
    assert states(device) == ["running", "failed"]
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    assert states(device) == ["running", "running"]
    assert [q.pid for q in device.queues()] == pids


# -- stop


@pytest.mark.slow
def test_stop_drains_every_worker(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    set_up(device.bus, MEMORY_IOVA)
    with caplog.at_level(logging.INFO, "vdusefast"):
        device.stop()
        device.stop()
    assert sorted(re.findall(r"queue (\d): worker \(pid \d+\): STOP", caplog.text)) == ["0", "1"]
    assert device.state == DeviceState.STOPPED
    assert device.failure is None


def test_stop_kills_what_does_not_drain(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA)
    with paused(device.queues()[0].pid):
        began = time.monotonic()
        device.stop(0.3)
        assert time.monotonic() - began < 3
    assert "did not stop in" in str(device.failure)


def test_stop_during_a_message_is_bounded(impatient: Device) -> None:
    device = impatient
    set_up(device.bus, MEMORY_IOVA)
    errors: list[Exception] = []

    def reset() -> None:
        try:
            device.bus.reset()
        except TransportError as error:
            errors.append(error)

    with paused(device.queues()[0].pid):
        thread = threading.Thread(target=reset)
        thread.start()
        wait_state(device, 0, VqState.QUIESCING)
        device.stop(0.1)
    thread.join()
    assert "did not" in str(device.failure)


@pytest.mark.slow
def test_stop_that_waits_for_requests_becomes_one_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver lets go when the requests that are pending have been failed, and not before."""
    failed = asyncio.Event()

    async def fail_pending(_vq: VqControl) -> None:
        failed.set()

    async def detach(_transport: LoopbackTransport) -> None:
        await failed.wait()

    monkeypatch.setattr(supervisor, "FORCE_GRACE_S", 0.1)
    monkeypatch.setattr(VqControl, "fail_pending", fail_pending)
    monkeypatch.setattr(LoopbackTransport, "detach", detach)
    device = make_device()
    device.start()
    stopping = threading.Thread(target=device.stop, args=(3600.0,))
    stopping.start()
    stopping.join(0.3)
    assert stopping.is_alive()
    device.force(5.0)
    stopping.join(WAIT_S)
    assert not stopping.is_alive()
    device.force(5.0)  # it is over
