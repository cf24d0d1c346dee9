"""The lives of queues and workers: the tables of the document are those of the code, and hold through the door.

The workers here are tests/unit/fake_worker.py.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import suppress
from enum import Enum
from typing import Any

import fake_worker
import pytest
from documents import rows, section
from supervised import MEMORY_IOVA, QUICK, control, in_loop, kick, make_device, set_up, wait_state, wait_until

from vdusefast.api import Device
from vdusefast.base.guard import InternalError
from vdusefast.control.state_machine import ForbiddenEventError, StateMachine, Transition, TransitionTable
from vdusefast.control.vq_states import VQ_TRANSITIONS, Position, VqEvent, VqLife, VqStage, VqState
from vdusefast.control.worker_states import WORKER_TRANSITIONS, WorkerEvent, WorkerState
from vdusefast.transport import TransportError

DOCUMENT = "docs/design/control-plane.md"
QUEUE, WORKER = section(DOCUMENT, "The life of a queue"), section(DOCUMENT, "The life of a worker process")
CLOSING = {VqStage.CLOSING, VqStage.CLOSED, VqStage.CLOSED_LOGGED, VqStage.CLOSED_FAILED}


def documented(text: str, cells: list[list[str]], kind: type[Enum]) -> None:
    """Check that the rows of a text that begin with a name of `kind`, and have as many cells, are `cells`."""
    names = {member.name for member in kind}
    assert [row for row in rows(text) if row[0] in names and len(row) == len(cells[0])] == cells


def written(table: TransitionTable[Any, Any]) -> list[list[str]]:
    """Return a table of transitions as the document has it."""
    return [
        [row.event.name, ", ".join(s.name for s in row.sources), row.target.name if row.target else "it stays"]
        for row in table.rows
    ]


# -- the tables


def test_the_life_of_a_queue_is_documented() -> None:
    states = [[stage.name, stage.shown, stage.position, stage.meaning] for stage in VqStage]
    documented(QUEUE, states, VqStage)
    documented(QUEUE, [[event.name, event.meaning] for event in VqEvent], VqEvent)
    documented(QUEUE, written(VQ_TRANSITIONS), VqEvent)


def test_the_life_of_a_worker_is_documented() -> None:
    documented(WORKER, [[state.name, state.meaning] for state in WorkerState], WorkerState)
    documented(WORKER, [[event.name, event.meaning] for event in WorkerEvent], WorkerEvent)
    documented(WORKER, written(WORKER_TRANSITIONS), WorkerEvent)


def test_an_event_that_a_state_does_not_allow_is_an_error_that_names_both() -> None:
    life = VqLife()
    with pytest.raises(ForbiddenEventError, match="event STARTED is not allowed in the state STOPPED"):
        life.apply(VqEvent.STARTED)
    assert life.state is VqStage.STOPPED
    assert life.apply(VqEvent.SERVE) == (VqStage.STOPPED, VqStage.STARTING)
    assert life.apply(VqEvent.STARTED) == (VqStage.STARTING, VqStage.RUNNING)


def test_a_table_has_one_row_for_a_state_and_an_event() -> None:
    class Lamp(Enum):
        OFF = 0
        ON = 1

    class Press(Enum):
        BUTTON = 0

    both = [Transition(Press.BUTTON, (Lamp.OFF, Lamp.ON), Lamp.ON), Transition(Press.BUTTON, (Lamp.ON,), Lamp.OFF)]
    with pytest.raises(ValueError, match="ON has two rows for the event BUTTON"):
        TransitionTable(both)
    lamp = StateMachine(TransitionTable([both[1]]), Lamp.ON)
    assert lamp.apply(Press.BUTTON) == (Lamp.ON, Lamp.OFF)


@pytest.mark.parametrize("event", [VqEvent.FAIL, VqEvent.LOSE, VqEvent.CLOSE])
@pytest.mark.parametrize("stage", list(VqStage))
def test_events_that_come_at_any_time_are_allowed_at_any_time(stage: VqStage, event: VqEvent) -> None:
    """A worker says that its ring is bad, an internal failure, the end of the device."""
    assert VQ_TRANSITIONS.allows(stage, event)


@pytest.mark.parametrize("stage", sorted(CLOSING, key=lambda stage: stage.name))
@pytest.mark.parametrize("event", list(VqEvent))
def test_no_event_leads_out_of_the_end(stage: VqStage, event: VqEvent) -> None:
    assert stage.is_closing
    assert not VQ_TRANSITIONS.allows(stage, event) or VQ_TRANSITIONS.target(stage, event) in CLOSING


@pytest.mark.parametrize("stage", [stage for stage in VqStage if stage.position is Position.LOST])
def test_a_lost_position_is_found_again_only_by_a_reset_or_at_a_forced_end(stage: VqStage) -> None:
    found = {
        event
        for event in VqEvent
        if VQ_TRANSITIONS.allows(stage, event) and VQ_TRANSITIONS.target(stage, event).position is not Position.LOST
    }
    assert found <= {VqEvent.RESET, VqEvent.SERVE, VqEvent.READY}


@pytest.mark.parametrize("state", [state for state in WorkerState if state is not WorkerState.GONE])
@pytest.mark.parametrize("event", [WorkerEvent.KILL, WorkerEvent.STOP])
def test_a_worker_can_be_ended_in_every_state(state: WorkerState, event: WorkerEvent) -> None:
    assert WORKER_TRANSITIONS.allows(state, event)


# -- through the door


def wait_stage(device: Device, stage: VqStage) -> None:
    wait_until(lambda: control(device).stage is stage)


def test_stages_of_a_queue_that_is_served_quiesced_and_reset() -> None:
    with make_device(queues=1) as device:
        device.bus.add_region(MEMORY_IOVA, 4096)
        wait_stage(device, VqStage.STOPPED)
        set_up(device.bus, MEMORY_IOVA)
        wait_stage(device, VqStage.RUNNING)
        device.bus.get_vq_state(0)
        wait_stage(device, VqStage.STOPPED)
        device.bus.set_status(0xF)
        wait_stage(device, VqStage.RUNNING)
        device.bus.update_iotlb(0, 0xFFF)
        wait_stage(device, VqStage.RUNNING)
        device.bus.reset()
        wait_stage(device, VqStage.STOPPED)


def test_stages_of_a_queue_whose_worker_dies() -> None:
    with make_device(queues=1) as device:
        device.bus.add_region(MEMORY_IOVA, 4096)
        os.kill(device.queues()[0].pid, signal.SIGKILL)
        wait_until(lambda: device.queues()[0].restarts == 1)
        wait_stage(device, VqStage.STOPPED)
        set_up(device.bus, fake_worker.CRASH_ADDR)
        wait_stage(device, VqStage.RECOVERING)
        device.bus.reset()
        wait_stage(device, VqStage.STOPPED)


def test_stages_of_a_queue_that_fails() -> None:
    with make_device(queues=1) as device:
        device.bus.add_region(MEMORY_IOVA, 4096)
        set_up(device.bus, fake_worker.REFUSED_ADDR)
        wait_stage(device, VqStage.FAILED)
        set_up(device.bus, fake_worker.RING_FAILED_ADDR)
        wait_stage(device, VqStage.LOST)
        set_up(device.bus, MEMORY_IOVA)
        wait_stage(device, VqStage.RUNNING)
        device.supervisor.loop.call_soon_threadsafe(control(device).give_up)  # type: ignore[union-attr]
        wait_stage(device, VqStage.INTERRUPTED)
        device.bus.set_status(0xF)  # continues by the log
        wait_stage(device, VqStage.RUNNING)
        kick(device.bus, 0)


def test_a_worker_is_gone_once_it_has_stopped() -> None:
    with make_device(queues=1) as device:
        vq = control(device)
        worker = vq.worker
        assert worker is not None
        assert (worker.state, worker.alive, worker.usable, worker.hung) == (WorkerState.READY, True, True, False)
        in_loop(device, vq.stop(5))
        assert vq.stage is VqStage.CLOSED
        assert (worker.state, worker.alive, worker.hung) == (WorkerState.GONE, False, False)
        assert device.failure is None


def test_a_worker_that_is_killed_hangs_until_it_is_gone() -> None:
    with make_device(queues=1) as device:
        worker = control(device).worker
        assert worker is not None

        async def kill() -> WorkerState:
            worker.abort()
            return worker.state

        assert in_loop(device, kill()) is WorkerState.KILLED
        wait_until(lambda: worker.state is WorkerState.GONE)
        assert "was killed by SIGKILL" in worker.cause()


ADDRESSES = (MEMORY_IOVA, fake_worker.REFUSED_ADDR, fake_worker.RING_FAILED_ADDR, fake_worker.CRASH_ADDR)


async def disturb(device: Device, chosen: random.Random) -> None:
    """Do something to queue 0 that may come at any time."""
    vq, transport = control(device), device.supervisor.transport  # type: ignore[union-attr]
    match chosen.randrange(9):
        case 0 | 1:
            address = chosen.choice(ADDRESSES)
            info = transport.vq_info(0)._replace(size=64, desc_addr=address, driver_addr=MEMORY_IOVA)
            await vq.start(device.bus.offered_features, info)
        case 2:
            await vq.quiesce()
        case 3:
            await vq.reset()
        case 4:
            await vq.invalidate(0, 0xFFF)
        case 5:
            await vq.prepare()
        case 6:
            vq.give_up()
        case 7:
            if vq.worker is not None and vq.worker.usable:
                with suppress(ProcessLookupError):
                    os.kill(vq.worker.pid, signal.SIGKILL)
        case 8:
            await vq.fail_pending()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_operations_deaths_and_failures_is_forbidden(seed: int) -> None:
    """The state machine allows every event at any time, and after a reset the queue serves again."""
    chosen = random.Random(seed)
    with make_device(queues=1, limits=QUICK) as device:
        device.bus.add_region(MEMORY_IOVA, 4096)

        async def disturb_often() -> None:
            for _ in range(8):
                waves = (disturb(device, chosen) for _ in range(chosen.randrange(1, 4)))
                for result in await asyncio.gather(*waves, return_exceptions=True):
                    assert not isinstance(result, BaseException), result
                await asyncio.sleep(chosen.random() / 50)

        supervisor = device.supervisor
        assert supervisor is not None
        assert supervisor.loop is not None
        asyncio.run_coroutine_threadsafe(disturb_often(), supervisor.loop).result(90)
        with suppress(TransportError):  # a worker that was just killed may still be there
            device.bus.reset()
        set_up(device.bus, MEMORY_IOVA)
        wait_state(device, 0, VqState.RUNNING)
        kick(device.bus, 0)
        assert not isinstance(device.failure, InternalError)
    assert device.failure is None
    assert supervisor.vqs[0].stage is VqStage.CLOSED_LOGGED
