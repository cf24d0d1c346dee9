"""The supervisor answers in time, and a worker that fails takes nothing else down.

The workers here are tests/unit/fake_worker.py: they count kicks and fail on request.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from unittest import mock

import fake_worker
import pytest
from supervised import (
    MEMORY_IOVA,
    QUICK,
    control,
    errors_logged,
    in_loop,
    kick,
    make_device,
    paused,
    set_up,
    states,
    wait_state,
)

from vdusefast.api import Device
from vdusefast.backends import open_store
from vdusefast.config import make_config
from vdusefast.control.assembly import worker_specs
from vdusefast.control.device_model import BlockDevice
from vdusefast.control.states import DeviceState
from vdusefast.control.supervisor import Supervisor
from vdusefast.control.vq_states import VqState
from vdusefast.errors import (
    ConfigError,
    DeviceBusyError,
    DeviceNotFoundError,
    KernelSupportError,
    TimedOutError,
    VdusefastError,
    WorkerError,
)
from vdusefast.state.shared_pages import SharedPages
from vdusefast.transport import TransportError, uapi
from vdusefast.transport.loopback import LoopbackTransport


@pytest.fixture
def device() -> Iterator[Device]:
    with make_device() as made:
        made.bus.add_region(MEMORY_IOVA, 4096)
        yield made


# -- start


@pytest.mark.slow
def test_start_makes_one_stopped_worker_a_queue(device: Device) -> None:
    queues = device.queues()
    assert [(q.index, q.cpu, q.engine, q.state, q.reason) for q in queues] == [
        (0, -1, "fake", VqState.STOPPED, ""),
        (1, -1, "fake", VqState.STOPPED, ""),
    ]
    assert len({q.pid for q in queues}) == 2
    assert all(os.getpgid(q.pid) == q.pid for q in queues)  # Ctrl-C is not for them
    assert device.state == DeviceState.ATTACHED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exit_code", "error"),
    [
        (1, WorkerError),
        (2, ConfigError),
        (3, DeviceNotFoundError),
        (4, DeviceBusyError),
        (5, KernelSupportError),
        (6, TimedOutError),
    ],
)
def test_workers_report_becomes_the_exception(exit_code: int, error: type[VdusefastError]) -> None:
    with pytest.raises(error, match=r"device d0: queue [01]: no engine today"):
        make_device(f"startup-failed={exit_code}").start()


def test_worker_that_exits_at_once_is_named_with_its_last_line() -> None:
    with pytest.raises(WorkerError, match=r"queue 0: worker \(pid \d+\) ended with status 7; .*: the last words"):
        make_device("exit", queues=1).start()


def test_one_failing_worker_takes_the_start_back(caplog: pytest.LogCaptureFixture) -> None:
    device = make_device("second-queue-exits")
    with pytest.raises(WorkerError, match="queue 1"):
        device.start()
    assert not errors_logged(caplog)  # raised, and therefore not logged


@pytest.mark.slow
def test_silent_worker_is_given_up_after_the_limit() -> None:
    began = time.monotonic()
    with pytest.raises(TimedOutError, match=r"was not ready within 0\.5 s"):
        make_device("silent").start(0.5)
    assert time.monotonic() - began < 3


def test_start_that_is_cut_short_leaves_nothing() -> None:
    config = make_config(name="d0", uri="null:1M", queues=2)
    command = [sys.executable, fake_worker.__file__, "silent"]

    async def start_and_cancel() -> None:
        with open_store(config.backend) as store, SharedPages.create(None, "d0", 2, 256) as pages:
            model = BlockDevice(config, store)
            specs = worker_specs(config, model, store, pages)
            supervisor = Supervisor(model, LoopbackTransport(), pages, specs, command=command)
            with suppress(TimeoutError):
                await asyncio.wait_for(supervisor.start(), 0.2)
            assert supervisor.state == DeviceState.STOPPED

    asyncio.run(start_and_cancel())


def test_command_that_cannot_be_run_is_an_error() -> None:
    config = make_config(name="d0", uri="memory:1M")
    with pytest.raises(WorkerError, match="cannot be started"):
        Device(config, worker_command=["/nonexistent/worker"]).start()


def test_limits_beyond_msg_timeout_are_refused() -> None:
    transport = LoopbackTransport(msg_timeout_s=5.0)
    with pytest.raises(ValueError, match="a message may take"):
        Supervisor(mock.Mock(), transport, mock.Mock(), [])


# -- status


def test_driver_ok_starts_the_ready_queues(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA, idx=7)
    assert states(device) == ["running", "unused"]
    assert device.state == DeviceState.RUNNING
    kick(device.bus, 0)
    assert device.bus.get_vq_state(0) == 8


def test_queue_made_ready_later_starts_with_its_first_kick(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA)
    device.bus.set_vq(1, 64, MEMORY_IOVA, MEMORY_IOVA, MEMORY_IOVA, 0)
    os.eventfd_write(device.bus.kickfd(1), 1)  # not ready yet: nothing comes of it
    time.sleep(0.05)
    assert states(device) == ["running", "unused"]
    device.bus.set_vq_ready(1)
    os.eventfd_write(device.bus.kickfd(1), 1)
    wait_state(device, 1, VqState.RUNNING)
    kick(device.bus, 1)


def test_features_that_cannot_be_served_are_answered_failed(device: Device) -> None:
    bus = device.bus
    with pytest.raises(TransportError, match="SET_STATUS 0xb was refused"):
        bus.negotiate(bus.offered_features | uapi.VIRTIO_F_RING_PACKED)
    with pytest.raises(TransportError, match="SET_STATUS 0xb was refused"):
        bus.negotiate(bus.offered_features & ~uapi.VIRTIO_F_VERSION_1)
    assert bus.status == 3
    set_up(bus, MEMORY_IOVA)
    assert states(device)[0] == "running"


@pytest.mark.slow
def test_features_changed_after_features_ok_are_refused(device: Device) -> None:
    device.bus.negotiate(device.bus.offered_features)
    device.bus.set_driver_features(0)
    with pytest.raises(TransportError, match="SET_STATUS 0xf was refused"):
        device.bus.driver_ok()


def test_status_out_of_order_is_answered_failed(device: Device) -> None:
    device.bus.set_status(1)
    with pytest.raises(TransportError):
        device.bus.set_status(0xF)


def test_messages_of_unknown_type_are_answered_failed(device: Device) -> None:
    response = device.bus._call("TYPE 99", lambda i: uapi.UnknownRequest(i, 99))
    assert not response.ok


@pytest.mark.slow
def test_a_queue_is_taken_back_and_made_ready_again_by_messages(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    kick(device.bus, 1)
    assert device.bus._call("SET_VQ_READY", lambda i: uapi.SetVqReady(i, 1, False)).ok
    assert states(device) == ["running", "stopped"]
    stood = device.bus.get_vq_state(1)
    device.bus.set_vq_ready(1, False)
    assert device.bus._call("SET_VQ_READY", lambda i: uapi.SetVqReady(i, 1, True)).ok
    time.sleep(0.05)  # an interrupt would be lost until the driver's side has taken the answer
    assert states(device) == ["running", "stopped"]
    device.bus.set_vq_ready(1, True)
    wait_state(device, 1, VqState.RUNNING)
    assert device.bus.get_vq_state(1) == stood
    assert not device.bus._call("SET_VQ_READY", lambda i: uapi.SetVqReady(i, 2, True)).ok


def test_a_queue_that_is_being_reset_is_not_started_though_it_still_shows_as_ready(device: Device) -> None:
    device.bus.negotiate(device.bus.offered_features)
    device.bus.set_vq(0, 64, MEMORY_IOVA, MEMORY_IOVA, MEMORY_IOVA, 0)
    device.bus.driver_ok()
    vq, supervisor = control(device), device.supervisor
    assert supervisor is not None
    device.bus.set_vq_ready(0)
    started: list[bool] = []

    async def race() -> None:
        await vq.lock()  # a reset has begun, and waits for its turn or for the worker
        reset = asyncio.ensure_future(vq.reset())
        await asyncio.sleep(0)
        start = asyncio.ensure_future(vq.start(supervisor.transport.acked_features(), supervisor.transport.vq_info(0)))
        await asyncio.sleep(0)
        await vq.release(0)
        assert await reset
        started.append(await start)

    in_loop(device, race())
    assert started == [False]
    assert states(device)[0] == "unused"


def test_a_queue_made_ready_before_driver_ok_starts_with_it(device: Device) -> None:
    device.bus.negotiate(device.bus.offered_features)
    assert device.bus._call("SET_VQ_READY", lambda i: uapi.SetVqReady(i, 0, True)).ok
    assert states(device) == ["stopped", "stopped"]


def test_suspend_stops_every_queue_where_it_stands(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    assert device.bus._call("SUSPEND", uapi.Suspend).ok
    assert device.state == DeviceState.SUSPENDED
    assert states(device) == ["stopped", "stopped"]
    assert device.bus._call("SET_VQ_READY", lambda i: uapi.SetVqReady(i, 0, True)).ok
    assert states(device) == ["stopped", "stopped"]
    device.bus.reset()
    assert device.state == DeviceState.ATTACHED


@pytest.mark.slow
@pytest.mark.parametrize(("group", "asid", "ok"), [(0, 0, True), (0, 1, False), (1, 0, False)])
def test_there_is_one_group_of_queues_in_one_address_space(device: Device, group: int, asid: int, ok: bool) -> None:
    assert device.bus._call("SET_VQ_GROUP_ASID", lambda i: uapi.SetVqGroupAsid(i, group, asid)).ok == ok


@pytest.mark.slow
def test_reset_stops_every_queue_and_keeps_the_workers(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    before = device.queues()
    with caplog.at_level(logging.INFO, "vdusefast"):
        device.bus.reset()
    assert states(device) == ["stopped", "stopped"]
    assert [q.pid for q in device.queues()] == [q.pid for q in before]
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA, idx=3)
    assert device.bus.get_vq_state(1) == 3


def test_refused_start_fails_that_queue_only(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    set_up(device.bus, fake_worker.REFUSED_ADDR, MEMORY_IOVA)  # a driver would take no notice of a refusal
    assert states(device) == ["failed", "running"]
    assert device.queues()[0].reason == "device d0: queue 0: cannot start: desc_addr is not mapped"
    assert len(errors_logged(caplog)) == 1
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    assert states(device) == ["running", "running"]


@pytest.mark.parametrize("size", [3, 65536])
def test_impossible_queue_size_never_reaches_the_worker(device: Device, size: int) -> None:
    set_up(device.bus, MEMORY_IOVA, size=size)
    assert f"a ring of {size} entries, which is no power of two from 1 to 32768" in device.queues()[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 64, 128, 32768])
def test_a_driver_may_set_up_a_ring_of_another_size_than_was_offered(device: Device, size: int) -> None:
    set_up(device.bus, MEMORY_IOVA, size=size)
    queue = device.queues()[0]
    assert (queue.state, queue.size) == ("running", size)
    assert device.info()["queues"][0]["size"] == size
    kick(device.bus, 0)


def test_a_ring_for_whose_log_there_is_no_room_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _start: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    set_up(device.bus, MEMORY_IOVA, size=2048)
    assert "no room for the log of 2048 requests: No space left on device" in device.queues()[0].reason
    monkeypatch.undo()
    set_up(device.bus, MEMORY_IOVA, size=2048)
    assert states(device)[0] == "running"


def test_a_queue_that_the_driver_leaves_alone_is_unused(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """QEMU makes all queues ready, and those that its firmware has not set up have size 0."""
    with caplog.at_level(logging.WARNING, "vdusefast"):
        device.bus.negotiate(device.bus.offered_features)
        device.bus.set_vq(0, 64, MEMORY_IOVA, MEMORY_IOVA, MEMORY_IOVA, 0)
        device.bus.set_vq(1, 0, 0, 0, 0, 0)
        for index in range(2):
            device.bus.set_vq_ready(index)
        device.bus.driver_ok()
        assert states(device) == ["running", "unused"]
        assert device.failure is None
        kick(device.bus, 0)
    assert [record.getMessage() for record in caplog.records if record.module != "child_output"] == []
    device.bus.set_vq(1, 64, MEMORY_IOVA, MEMORY_IOVA, MEMORY_IOVA, 0)
    os.eventfd_write(device.bus.kickfd(1), 1)
    wait_state(device, 1, VqState.RUNNING)
    kick(device.bus, 1)
    device.bus.reset()
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    assert states(device) == ["running", "running"]


def test_a_driver_is_refused_its_features_while_a_queue_can_have_no_worker(device: Device) -> None:
    slot = control(device, 1).slot
    command, slot.command = slot.command, [sys.executable, "-c", "raise SystemExit(7)"]
    os.kill(device.queues()[1].pid, signal.SIGKILL)
    wait_state(device, 1, VqState.RECOVERING)
    with pytest.raises(TransportError, match="SET_STATUS 0xb was refused"):
        device.bus.negotiate(device.bus.offered_features)
    assert "ended with status 7" in device.queues()[1].reason
    slot.command = command
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
    kick(device.bus, 1)


@pytest.mark.slow
def test_a_queue_taken_back_while_its_start_is_waited_for_stays_off(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA)
    assert device.bus._call("SET_VQ_READY", lambda i: uapi.SetVqReady(i, 1, True)).ok
    assert device.bus._call("SET_VQ_READY", lambda i: uapi.SetVqReady(i, 1, False)).ok
    device.bus.set_vq(1, 64, MEMORY_IOVA, MEMORY_IOVA, MEMORY_IOVA)
    device.bus.set_vq_ready(1)  # as the kernel still shows it for a moment
    time.sleep(0.05)
    assert states(device) == ["running", "unused"]


def test_a_driver_may_go_on_after_asking_where_a_queue_stands(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA, idx=5)
    assert device.bus.get_vq_state(1) == 5
    assert states(device) == ["running", "stopped"]
    os.eventfd_write(device.bus.kickfd(1), 1)
    wait_state(device, 1, VqState.RUNNING)
    assert device.bus.get_vq_state(1) == 5


def test_a_device_that_cannot_be_suspended_goes_on(device: Device) -> None:
    set_up(device.bus, fake_worker.RING_FAILED_ADDR, MEMORY_IOVA)
    wait_state(device, 0, VqState.FAILED)
    assert not device.bus._call("SUSPEND", uapi.Suspend).ok  # nobody knows where that queue stands
    assert device.state == DeviceState.RUNNING
    os.eventfd_write(device.bus.kickfd(1), 1)
    wait_state(device, 1, VqState.RUNNING)


@pytest.mark.slow
def test_a_device_is_suspended_though_a_worker_has_to_be_replaced_for_it() -> None:
    with make_device(limits=QUICK) as device:
        device.bus.add_region(MEMORY_IOVA, 4096)
        set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA)
        with paused(device.queues()[0].pid):
            assert device.bus._call("SUSPEND", uapi.Suspend).ok
        assert device.state == DeviceState.SUSPENDED
        assert states(device) == ["stopped", "stopped"]
        assert device.queues()[0].restarts == 1


# -- where a queue stands


def test_vq_state_stops_the_queue_and_driver_ok_goes_on_from_there(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA, MEMORY_IOVA, idx=65534)
    for _ in range(3):
        kick(device.bus, 0)
    assert device.bus.get_vq_state(0) == 1  # free-running u16
    assert states(device) == ["stopped", "running"]
    assert device.bus.get_vq_state(0) == 1
    device.bus.set_status(0xF)
    assert states(device) == ["running", "running"]
    kick(device.bus, 0)
    assert device.bus.get_vq_state(0) == 2


def test_vq_state_of_a_packed_queue_has_both_sides_and_their_wrap_counters() -> None:
    with make_device(packed=True) as device:
        device.bus.add_region(MEMORY_IOVA, 4096)
        set_up(device.bus, MEMORY_IOVA, idx=0x8030_002F)
        kick(device.bus, 0)
        assert device.bus.get_vq_state(0) == 0x8030_0030
        device.bus.set_status(0xF)
        kick(device.bus, 0)
        assert device.bus.get_vq_state(0) == 0x8030_0031
        device.bus.set_vq(1, 64, MEMORY_IOVA, MEMORY_IOVA, MEMORY_IOVA, uapi.PACKED_FRESH)
        assert device.bus.get_vq_state(1) == uapi.PACKED_FRESH


def test_vq_state_of_a_queue_never_started_is_what_the_driver_set(device: Device) -> None:
    device.bus.set_vq(1, 64, MEMORY_IOVA, MEMORY_IOVA, MEMORY_IOVA, 42)
    assert device.bus.get_vq_state(1) == 42


@pytest.mark.slow
def test_vq_state_of_a_queue_that_is_not_there_is_refused(device: Device) -> None:
    with pytest.raises(TransportError):
        device.bus.get_vq_state(2)


# -- memory


def test_update_iotlb_reaches_every_worker_before_its_answer(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    set_up(device.bus, MEMORY_IOVA)
    with caplog.at_level(logging.INFO, "vdusefast"):
        device.bus.add_region(0x40000, 4096)
        device.bus.remove_region(0x40000)
        device.stop()
    seen = re.findall(r"queue (\d): worker \(pid \d+\): INVALIDATE (\w+) (\w+)", caplog.text)
    assert sorted(seen) == [("0", "0x40000", "0x40fff"), ("1", "0x40000", "0x40fff")]


def test_running_queue_goes_on_after_update_iotlb(device: Device) -> None:
    set_up(device.bus, MEMORY_IOVA)
    device.bus.update_iotlb(0, uapi.IOVA_LAST)
    assert states(device) == ["running", "unused"]
    kick(device.bus, 0)


@pytest.mark.slow
def test_worker_fetches_its_ring_through_the_bus(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vdusefast"):
        set_up(device.bus, MEMORY_IOVA, 0x99000)
        device.stop()
    assert f"fetched {MEMORY_IOVA:#x}: errno 0" in caplog.text
    assert "fetched 0x99000: errno 22" in caplog.text
