"""One virtqueue and its worker: start, quiesce, reset, and the replacement of a worker that dies or hangs.

The states of a queue and their transitions are in vq_states.py. A worker that dies is replaced at once. The next one
continues by the in-flight log of the dead one. Operations on one queue exclude each other; those on different queues
run side by side. Ring memory is never read here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from vdusefast.base.deadline import limit
from vdusefast.base.guard import Guard
from vdusefast.control.kick_watch import KickWatch
from vdusefast.control.limits import Limits
from vdusefast.control.ring_check import check_ring_size, is_position, log_format
from vdusefast.control.take_over import TakeOver
from vdusefast.control.vq_states import Position, VqEvent, VqLife, VqStage, VqState
from vdusefast.control.worker_process import Pages, RefusedError, WorkerCallbacks, WorkerProcess
from vdusefast.control.worker_slot import WorkerSlot
from vdusefast.errors import UpgradedError, VdusefastError, WorkerError
from vdusefast.transport import Transport
from vdusefast.transport.uapi import VqInfo
from vdusefast.worker.protocol import Command, FromWorker, ToWorker, WorkerSpec

_log = logging.getLogger("vdusefast")


@dataclass(frozen=True)
class VqCallbacks:
    """Functions that a queue calls in the event loop."""

    failed: Callable[[WorkerError], None]  # once for each failure
    well: Callable[[], None]  # the queue has recovered from its failures
    store_size: Callable[[int], None]  # the worker has seen that the store has another size, in bytes
    before_spawn: Callable[[], None]  # each time that a worker is about to be started


class VqControl:
    """One queue and its worker. `state` and `reason` may be read in any thread."""

    def __init__(
        self,
        spec: WorkerSpec,
        transport: Transport,
        pages: Pages,
        command: Sequence[str],
        limits: Limits,
        guard: Guard,
        callbacks: VqCallbacks,
    ):
        """Make a stopped queue without a worker; see `WorkerSlot.spawn`.

        `spec` is complete but for `ctl_fd`, `kick_fd` and the port, which are filled in here. `guard` runs everything
        that runs beside the operations.
        """
        self.index = spec.queue
        self.reason = ""
        self.restart_count = 0  # workers that had to be replaced
        self.stop_count = 0  # changes with resets and quiesces; a start asked for before does not count
        self.limits = limits
        self._kicks = KickWatch(guard)
        spec = spec._replace(kick_fd=self._kicks.fd)
        of_worker = WorkerCallbacks(self._ring_failed, self._died, callbacks.store_size)
        self.slot = WorkerSlot(spec, transport, pages, command, guard, of_worker, callbacks.before_spawn)
        self._transport = transport
        self._pages = pages
        self._callbacks = callbacks
        self._life = VqLife()
        # Where a queue of known position stands, as VqInfo.last_avail_idx; None = as the driver has set it up.
        self._noted_idx: int | None = None
        self._lost_reason = ""  # why nobody knows where the queue stands, in VqStage.LOST
        self._set_up: ToWorker | None = None  # START for the rings that the driver has set up since its last reset
        self._lock = asyncio.Lock()
        self._take_over = TakeOver(
            guard,
            lambda: pages.requests_done(spec.queue),
            self._attempt_take_over,
            self._report_repeated_deaths,
            self._is_take_over_wanted_after_fault,
        )

    @property
    def state(self) -> VqState:
        """The state of the queue, for people."""
        return self.stage.shown

    @property
    def stage(self) -> VqStage:
        """The state of the queue."""
        return self._life.state

    @property
    def worker(self) -> WorkerProcess | None:
        """The present worker process; it may have been killed."""
        return self.slot.process

    @property
    def kick_fd(self) -> int:
        """The eventfd of the queue's kicks, -1 after `close`."""
        return self._kicks.fd

    @property
    def ring_size(self) -> int:
        """The entries of the ring that the driver has set up since its last reset, 0 when it has not."""
        set_up = self._set_up  # another thread may ask
        return 0 if set_up is None else set_up.queue_size

    async def prepare(self) -> bool:
        """Be ready for a driver that is about to start. Returns whether there is a worker; a failure is reported."""
        async with self._lock:
            if self.stage.position is Position.KNOWN:
                self._pages.void_log(self.index)  # the rings will be new ones
            return self.stage.is_closing or await self._revive()

    def start(self, acked_features: int, info: VqInfo, *, recover: bool = False) -> Coroutine[Any, Any, bool]:
        """Serve the queue that `info` describes, from where it was quiesced if it was. Returns whether it runs.

        recover: by the in-flight log of a previous supervisor. A failure is reported through `on_failure`. A worker
        that has died is replaced first. A reset or quiesce that is under way, or gets the lock before this does,
        leaves the queue stopped.
        """
        return self._start(acked_features, info, self.stop_count, recover)

    async def _start(self, acked_features: int, info: VqInfo, stop_count: int, recover: bool) -> bool:
        async with self._lock:
            self.unwatch_kick()
            await self.slot.reap_given_up()
            if self.stage is VqStage.RUNNING:
                return True
            if self.stage.is_closing or stop_count != self.stop_count:
                return False
            # Known from here on: should it never run, its requests can still be failed.
            self._set_up = start = ToWorker(
                Command.START,
                0,
                acked_features=acked_features,
                desc_addr=info.desc_addr,
                driver_addr=info.driver_addr,
                device_addr=info.device_addr,
                queue_size=info.size,
                last_avail_idx=info.last_avail_idx if self._noted_idx is None else self._noted_idx,
                recover=int(recover or self.stage.position is not Position.KNOWN),
            )
            if why := check_ring_size(info.size, acked_features):
                return self._refuse(why)
            try:
                self._pages.reserve_log(self.index, info.size)
            except VdusefastError as error:
                return self._refuse(str(error))
            if not start.recover:
                # Nothing is in flight: every request that was popped has been completed. A worker that is killed
                # before it has written its own log must not leave the log of a previous one.
                self._pages.begin_log(self.index, start.last_avail_idx, log_format(acked_features), info.size)
            has_worker = self.stage is VqStage.LOST or await self._revive()
            if self.stage is VqStage.LOST:  # also since, by what a new worker says
                return self._refuse(f"{self._lost_reason}; reset the device")
            return has_worker and not self.stage.is_closing and await self._serve(start)

    async def fail_pending(self) -> None:
        """Answer everything that is pending, and all later requests, with IOERR, by a worker without a store.

        For a driver that cannot let go of the device because its requests do not end. The worker that waits for them
        is killed. If it hangs in the kernel, that is reported, and another one takes its place all the same.
        """
        self.slot.abort("held requests that did not end")  # first: the operation that holds the lock may wait for it
        async with self._lock:
            if error := await self.slot.kill_to_replace():
                self._callbacks.failed(error)
            self.slot.spec = self.slot.spec._replace(engine="fail", store_fd=-1, store="null")
            self._take_over.cancel()  # it may wait for the end of that worker, which nobody notices now
            if self._set_up is None:
                if self.stage.waits_for_worker:
                    self._take_over.begin()
            elif await self._revive():
                await self._serve(self._set_up._replace(recover=1))

    async def quiesce(self) -> int | None:
        """Stop the queue once it has finished what is in flight. Returns where it stands, None when that is lost."""
        async with self._voiding_starts():
            self.unwatch_kick()
            if self.stage.position is Position.LOST:
                return None
            if self.stage.position is Position.KNOWN:
                if self._noted_idx is None:
                    return self._transport.vq_info(self.index).last_avail_idx
                return self._noted_idx
            event = await self._settle(Command.QUIESCE) if self.slot.usable is not None else None
            if event is None and self._may_take_over() and await self._replace_worker():
                event = await self._settle(Command.QUIESCE)  # with the requests that the dead one had in flight
            if event is None or self._is_lost():  # a bad ring may be reported before the answer
                return None
            self._noted_idx = event.last_avail_idx
            self._apply(VqEvent.QUIESCED)
            return self._noted_idx

    async def invalidate(self, start: int, last: int) -> bool:
        """Drop the worker's mappings of IOVA [start, last]; a running queue stays so. Returns whether they are gone."""
        async with self._lock:
            if self.slot.usable is not None:
                await self._settle(Command.INVALIDATE, start, last)
                if self.stage is VqStage.QUIESCING:
                    self._apply(VqEvent.RESUMED)
            return not self.slot.hangs

    async def lock(self) -> None:
        """Keep every other operation waiting until `release`; for `hold`."""
        await self._lock.acquire()

    async def hold(self, last: int, timeout_s: float) -> bool:
        """Have the worker finish its requests, drop its mappings of IOVA [0, last] and pop nothing more.

        Returns whether nobody touches that memory until `release`. A worker that is too slow is not killed: it may
        obey later, and continues at the `release` that follows. The lock is held.
        """
        worker = self.slot.usable
        if worker is not None:
            try:
                await worker.request(ToWorker(Command.HOLD, 0, last=last), timeout_s)
            except (TimeoutError, RefusedError):
                return False
            except WorkerError as error:
                _log.debug("%s", error)  # its death has been reported; the next one waits for the lock
        return not self.slot.hangs

    async def release(self, user_memory_bytes: int) -> None:
        """Let the worker continue after `lock` and `hold`, with this much user memory in place of bounce pages."""
        message = ToWorker(Command.RELEASE, 0, last=user_memory_bytes)
        worker = self.slot.usable
        try:
            if worker is not None and user_memory_bytes:
                await self._request(message)  # it has nothing in flight, so it answers, or is replaced
            elif worker is not None:
                # A worker that has not yet obeyed `hold` must not be waited for: it carries out both commands then.
                with suppress(TimeoutError, WorkerError):
                    await worker.request(message, 0.0)
        finally:
            self._lock.release()

    async def reset(self) -> bool:
        """Stop the queue and drop every mapping, with a living worker at the end. Returns whether they are gone."""
        async with self._voiding_starts():
            self.unwatch_kick()
            await self.slot.reap_given_up()
            drained = self.stage.position is Position.KNOWN
            if self.slot.usable is not None:
                drained = await self._settle_reset() is not None or drained
            self._noted_idx = self._set_up = None
            self._apply(VqEvent.RESET)
            if self.slot.hangs:
                return False
            if drained:  # else the log is needed, should we end before the driver has our answer
                self._pages.void_log(self.index)
            if self.stage.is_closing or await self._revive():
                self._apply(VqEvent.READY, "")
            return True

    def begin_close(self) -> None:
        """Replace no worker any more, and start no queue: the device stops."""
        self._apply(VqEvent.CLOSE)

    async def stop(self, timeout_s: float) -> None:
        """End the worker once it has finished what is in flight; kill it after `timeout_s`. A failure is reported."""
        self.begin_close()
        self.unwatch_kick()
        self._take_over.cancel()
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with limit(deadline - asyncio.get_running_loop().time()), self._lock:
                pass  # the operation before this one has ended
        except TimeoutError:
            pass  # it waits for the same worker, which is killed below
        worker = self.slot.usable
        if worker is not None:
            try:
                await worker.stop(max(0.0, deadline - asyncio.get_running_loop().time()))
            except WorkerError as error:
                self._fail(error)
        self._apply(VqEvent.ENDED)

    def close(self) -> None:
        """Close every descriptor; a second call does nothing."""
        self.slot.close()
        self._kicks.close()

    def watch_kick(self, on_kick: Callable[[VqControl], object]) -> None:
        """Call `on_kick` at each kick while the queue is not served: the driver may have made it ready."""
        self._kicks.watch(lambda: on_kick(self), self.give_up)

    def unwatch_kick(self) -> None:
        """Leave the kicks to the worker."""
        self._kicks.unwatch()

    def give_up(self) -> None:
        """Serve the queue no more after an unexpected exception; a reset starts it again."""
        self.unwatch_kick()
        self.slot.give_up()
        self._apply(VqEvent.FAIL, "an internal failure, see the log")

    @asynccontextmanager
    async def _voiding_starts(self) -> AsyncIterator[None]:
        """Hold the lock, and make every start void that was asked for before or meanwhile.

        Until it has our answer the driver's side still shows the queue as ready.
        """
        self.stop_count += 1
        async with self._lock:
            try:
                yield
            finally:
                self.stop_count += 1

    # -- commands to the worker; the lock is held

    def _is_lost(self) -> bool:
        """Return whether nobody knows where the queue stands, which may come true during every wait."""
        return self.stage.position is Position.LOST

    async def _serve(self, start: ToWorker) -> bool:
        """Have the worker serve as `start` says. Returns whether it does; a failure is reported."""
        self._apply(VqEvent.SERVE)
        event = await self._request(start)
        # A ring found bad at once is reported before we get here, and so is the death of a worker with much to tell.
        if event is None or self._is_lost() or self.slot.usable is None:
            return False
        if event.text:
            _log.warning("%s: %s", self.slot.where, event.text)
        self._apply(VqEvent.STARTED, "")
        return True

    async def _settle(self, command: Command, start: int = 0, last: int = 0) -> FromWorker | None:
        """Send a command that waits for storage. Returns what `_request` does."""
        if self.stage is VqStage.RUNNING:
            self._apply(VqEvent.QUIESCE)
        return await self._request(ToWorker(command, 0, start=start, last=last))

    async def _settle_reset(self) -> FromWorker | None:
        """Have the worker leave its rings. Returns what `_request` does.

        A driver that resets its device waits for no request any more, and may have asked for gigabytes at once.
        """
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.limits.reset_s, self._abort_busy)
        try:
            return await self._settle(Command.RESET)
        finally:
            timer.cancel()

    def _abort_busy(self) -> None:
        """Kill a worker that still carries out requests. A worker that only waits for its CPU is not killed."""
        worker = self.slot.usable
        if worker is not None and self._pages.has_inflight(self.index):
            why = f"still had requests in flight {self.limits.reset_s:g} s after a reset"
            _log.warning("%s %s: it is killed and replaced", worker.title, why)
            self.restart_count += 1
            worker.abort(why)

    async def _request(self, message: ToWorker) -> FromWorker | None:
        """Send `message` and return the answer; None after a failure, which is reported.

        A worker that hangs, or does not answer as it should, is killed and replaced.
        """
        worker = self.worker
        assert worker is not None
        try:
            answer = await worker.request(message, self.limits.quiesce_s)
            acked_features = self._set_up.acked_features if self._set_up is not None else 0
            if is_position(answer.last_avail_idx, acked_features):
                return answer
            why = f"says that the queue stands at {answer.last_avail_idx:#x}, where none can"
        except RefusedError as error:
            if message.command == Command.START:
                if message.recover:
                    self._lost_reason = f"its worker died, and where it stood is not known: {error}"
                self._refuse(str(error), VqEvent.LOSE if message.recover else VqEvent.REFUSED)
                return None
            why = f"refused to {Command(message.command).name.lower()}: {error}"
        except TimeoutError:
            why = f"did not finish its requests within {self.limits.quiesce_s:g} s"
        except WorkerError as error:
            if not worker.alive:
                return None  # its death has been reported
            why = str(error).removeprefix(f"{worker.title} ")
        await self._kill_hung(worker, why)
        return None

    async def _kill_hung(self, worker: WorkerProcess, why: str) -> None:
        """Kill a worker that hangs or does not answer as it should, and have it replaced."""
        gone = await worker.kill(why)
        self._died(WorkerError(f"{worker.title} {worker.cause() if gone else f'{why}, and cannot be killed'}"))

    # -- a worker that died; the lock is held where there is an `await`

    def _died(self, error: WorkerError) -> None:
        """Have a worker that died replaced. The next one continues where it stood."""
        if self.stage.is_closing or self.stage is VqStage.LOST:
            self._fail(error)
            return
        _log.warning("%s; it is replaced", error)
        self.restart_count += 1
        self._apply(VqEvent.DIED, str(error))
        self._take_over.begin()

    async def _revive(self) -> bool:
        """Make sure that there is a worker to command: a fresh one, stopped, in place of a dead one."""
        error = await self._respawn()
        if error is not None:
            self._fail(error)
        return self.slot.usable is not None

    async def _respawn(self) -> WorkerError | None:
        """Start a worker unless there is one. Returns why it could not be started, if that was tried."""
        return None if self.stage.is_closing else await self.slot.ensure(self.limits.hello_s)

    async def _replace_worker(self) -> bool:
        """Replace the worker, and serve if the dead one did. Returns whether that is done."""
        error = await self._respawn()
        if isinstance(error, UpgradedError):
            if self.reason != str(error):
                self.reason = str(error)
                self._callbacks.failed(error)
        elif error is not None:
            _log.warning("%s; another one is tried", error)
            self.reason = str(error)
        if self.slot.usable is None:
            return False
        if not self.stage.is_logged or self._set_up is None:
            self._apply(VqEvent.READY, "")
            return True
        return await self._serve(self._set_up._replace(recover=1))

    def _may_take_over(self) -> bool:
        return self.stage.is_logged and not self.stage.is_closing and not self.slot.hangs

    async def _attempt_take_over(self) -> bool:
        """Replace the worker if that is still to be done. Returns whether nothing is left to do. Takes the lock."""
        if self.worker is not None and self.worker.hung:
            await self.worker.wait_gone()  # until then it may still write data that is to be written again
        async with self._lock:
            return not self.stage.waits_for_worker or await self._replace_worker()

    def _report_repeated_deaths(self) -> None:
        """Report that several workers in a row died without progress."""
        if not self.slot.upgraded:
            self._callbacks.failed(WorkerError(f"{self.reason}; so did those before it: tried again with pauses"))

    def _is_take_over_wanted_after_fault(self) -> bool:
        """Kill the worker in whatever state an unexpected exception has left it. Returns whether one is missing."""
        if not self.stage.waits_for_worker:
            return False
        self.slot.abort()
        return True

    # -- failures

    def _refuse(self, why: str, event: VqEvent = VqEvent.FAIL) -> bool:
        self._fail(WorkerError(f"{self.slot.where}: cannot start: {why}"), event)
        return False

    def _ring_failed(self, reason: str) -> None:
        pid = self.worker.pid if self.worker is not None else -1
        self._lost_reason = "its ring was found bad"  # where it stands may be what is wrong
        self._fail(WorkerError(f"{self.slot.where}: worker (pid {pid}) stopped serving: {reason}"), VqEvent.LOSE)

    def _fail(self, error: WorkerError, event: VqEvent = VqEvent.FAIL) -> None:
        self._apply(event, str(error))
        self._callbacks.failed(error)

    def _apply(self, event: VqEvent, reason: str | None = None) -> None:
        """Enter the state that follows from `event`. reason: the new one; None = it stays."""
        before, now = self._life.apply(event)
        if reason is not None:
            self.reason = reason
        if before.is_unwell and not now.is_unwell and not now.is_closing:  # what fails at the end stays
            self._callbacks.well()
