"""A queue under random orders of operations, deaths, refusals and wrong answers: what must hold in all of them."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from scripted_worker import QuickLoop, Script, ScriptedPages, ScriptedTransport, ScriptedWorker, scripted

from vdusefast.base.guard import Guard, Part
from vdusefast.control import worker_slot
from vdusefast.control.limits import Limits
from vdusefast.control.virtqueue import VqCallbacks, VqControl
from vdusefast.control.vq_states import Position, VqStage
from vdusefast.errors import VdusefastError
from vdusefast.transport import Transport
from vdusefast.transport.uapi import VIRTIO_F_VERSION_1, VqInfo
from vdusefast.worker.protocol import WorkerSpec

pytestmark = pytest.mark.slow

SCHEDULES = 250  # of one test: half a second of CPU time
STEPS = 14
SETTLE_S = 200.0  # of the loop's own clock: longer than every limit, pause and hang together
AT_REST = {VqStage.STOPPED, VqStage.RUNNING, VqStage.FAILED, VqStage.INTERRUPTED, VqStage.LOST}


class Rig:
    """One queue, its script, and the operations of a driver, a kernel and a server."""

    def __init__(self, seed: int) -> None:
        self.script = Script(random.Random(seed))
        self.internal: list[VdusefastError] = []
        self.guard = Guard("d0", self.internal.append)
        self.started = 0
        self.tasks: list[asyncio.Task[Any]] = []
        spec = WorkerSpec("d0", 0, 64, os.getpid(), -1, -1, -1, capacity_sectors=2048)
        transport: Transport = ScriptedTransport()  # type: ignore[assignment]
        ignore: Callable[[object], None] = lambda _: None  # noqa: E731
        callbacks = VqCallbacks(failed=ignore, well=lambda: None, store_size=ignore, before_spawn=lambda: None)
        self.vq = VqControl(spec, transport, ScriptedPages(self.script), [], Limits(), self.guard, callbacks)

    def stage(self) -> VqStage:
        return self.vq.stage

    @property
    def worker(self) -> ScriptedWorker | None:
        worker = self.vq.worker
        assert worker is None or isinstance(worker, ScriptedWorker)
        return worker

    def start(self) -> Coroutine[Any, Any, bool]:
        self.started += 1
        return self.vq.start(VIRTIO_F_VERSION_1, VqInfo(0, 64, self.started, ready=True))

    def void_starts(self) -> None:
        self.script.void_ids = set(range(self.started + 1))

    async def reset(self) -> bool:
        gone = await self.vq.reset()
        self.void_starts()
        self.script.is_logged = self.script.is_lost = False
        return gone

    async def quiesce(self) -> None:
        last_avail_idx = await self.vq.quiesce()
        if last_avail_idx is not None:
            self.void_starts()
            self.script.expect(not self.script.is_logged, "a position was told that nobody knows")
            self.script.expect(self.vq.stage.position is Position.KNOWN, "a position was told, and is not known")

    async def hold(self) -> None:
        await self.vq.lock()
        await self.vq.hold(0xFFF, 1.0)
        await self.vq.release(self.script.chosen.choice((0, 4096)))

    async def resize(self) -> None:
        with suppress(VdusefastError):
            await self.vq.slot.resize(self.script.chosen.choice((1024, 2048)))

    async def kick(self) -> None:
        if self.vq.stage is VqStage.STOPPED:
            self.vq.watch_kick(lambda vq: self.begin(self.start()))
            os.eventfd_write(self.vq.kick_fd, 1)

    async def kill(self) -> None:
        if self.worker is not None:
            self.worker.end(-9)

    async def give_up(self) -> None:
        self.vq.give_up()

    def begin(self, work: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(self.guard.task(Part.QUEUE_START, work, self.vq.give_up))

    def disturb(self) -> Coroutine[Any, Any, object]:
        vq, chosen = self.vq, self.script.chosen
        usual: list[Callable[[], Coroutine[Any, Any, object]]] = [
            *(self.start, self.start, self.start, self.quiesce, self.quiesce, self.reset, vq.prepare, self.hold),
            *(lambda: vq.invalidate(0, 0xFFF), self.resize, self.kick, self.kill, self.kill),
        ]
        if chosen.random() < 0.06:
            return chosen.choice((vq.fail_pending, self.give_up))()
        return chosen.choice(usual)()

    async def stop(self) -> None:
        self.vq.begin_close()
        await self.vq.stop(self.script.chosen.choice((0.0, 0.5, 30.0)))

    async def play(self, *, ends: bool) -> None:
        """Play one schedule. ends: the device is stopped in its middle."""
        chosen, stop_at = self.script.chosen, STEPS // 2 if ends else STEPS
        with suppress(VdusefastError):
            await self.vq.slot.spawn(10.0)
        self.script.chance = chosen.choice((0.05, 0.2, 0.5))
        for step in range(STEPS):
            self.begin(self.stop() if step == stop_at else self.disturb())
            await asyncio.sleep(chosen.choice((0.0, 0.0, 0.0, 0.01, 0.3, 2.0)))
        self.script.chance = 0.0
        await asyncio.sleep(SETTLE_S)
        assert all(task.done() for task in self.tasks)
        self.check()

    def check(self) -> None:
        """Check what must hold once everything has come to rest."""
        assert not self.internal, self.internal
        assert not self.script.broken_rules, self.script.broken_rules
        assert self.vq.stage in AT_REST or self.vq.stage.is_closing, self.vq.stage
        if self.vq.stage is VqStage.RUNNING:
            assert self.script.serving is not None, "nobody serves"
            assert self.script.serving is self.vq.worker
        if self.vq.stage.position is Position.KNOWN:
            assert self.script.serving is None

    async def check_reset(self) -> None:
        """Check that a reset leads to a queue that can be served."""
        assert await self.reset()
        assert self.stage() is VqStage.STOPPED
        assert self.vq.reason == ""
        assert self.script.serving is None
        assert await self.start()
        assert self.stage() is VqStage.RUNNING
        self.check()
        assert await self.vq.quiesce() == self.script.idx
        assert self.stage() is VqStage.STOPPED

    async def end(self) -> None:
        self.script.chance = 0.0
        await self.vq.stop(30.0)
        assert self.vq.stage.is_closing
        await self.vq.slot.kill()
        await self.guard.close()
        await asyncio.sleep(SETTLE_S)
        assert self.script.serving is None
        self.vq.close()


def play(seed: int, monkeypatch: pytest.MonkeyPatch, *, ends: bool) -> None:
    async def all_of_it() -> None:
        rig = Rig(seed)
        monkeypatch.setattr(worker_slot, "WorkerProcess", scripted(rig.script))
        try:
            await rig.play(ends=ends)
            if not ends:
                await rig.check_reset()
        finally:
            await rig.end()

    try:
        with asyncio.Runner(loop_factory=QuickLoop) as runner:
            runner.run(all_of_it())
    except Exception as error:
        error.add_note(f"the schedule of seed {seed}")
        raise


@pytest.mark.parametrize("first", range(0, 6 * SCHEDULES, SCHEDULES))
def test_a_reset_has_a_queue_serve_again_after_whatever_came(
    first: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="vdusefast")
    for seed in range(first, first + SCHEDULES):
        play(seed, monkeypatch, ends=False)


@pytest.mark.parametrize("first", range(10_750, 10_750 + 4 * SCHEDULES, SCHEDULES))
def test_a_queue_ends_amid_whatever_comes(
    first: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="vdusefast")
    for seed in range(first, first + SCHEDULES):
        play(seed, monkeypatch, ends=True)
