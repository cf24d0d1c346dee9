"""One virtqueue and its worker: start, quiesce, reset, and the replacement of a worker that dies or hangs.

The states of a queue and their transitions are in vq_states.py. A worker that dies is replaced at once. The next one
continues by the in-flight log of the dead one. Operations on one queue exclude each other; those on different queues
run side by side. Ring memory is never read here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from vdusefast.base import build
from vdusefast.base.deadline import limit
from vdusefast.base.guard import PAUSE_S, Guard, Part
from vdusefast.control.vq_states import Position, VqEvent, VqLife, VqStage, VqState
from vdusefast.control.worker_process import REAP_TIMEOUT_S, Pages, RefusedError, WorkerProcess
from vdusefast.errors import TimedOutError, UpgradedError, VdusefastError, WorkerError
from vdusefast.host import cpu_topology
from vdusefast.state import shared_pages
from vdusefast.transport import Transport
from vdusefast.transport.uapi import VIRTIO_F_IN_ORDER, VqInfo, is_packed
from vdusefast.worker.protocol import Command, FromWorker, ToWorker, WorkerSpec

_log = logging.getLogger("vdusefast")

TAKE_OVER_TRIES_AT_ONCE = 3  # without progress; then with pauses that grow
TAKE_OVER_WINDOW_S = 60.0  # a death so long after the one before has nothing to do with it
TAKE_OVER_PAUSE_S = 0.05
TAKE_OVER_PAUSE_MAX_S = 5.0

FAIL_REAP_S = 1.0  # for a worker that is killed to fail its requests; a longer wait is for the kernel's storage
RESIZE_S = 5.0  # for a worker to take a new size: it looks between two rounds of its loop


def _log_format(acked_features: int) -> int:
    """Return which in-flight log goes with the rings of these features."""
    if is_packed(acked_features):
        return shared_pages.INFLIGHT_PACKED
    return shared_pages.INFLIGHT_SPLIT_IN_ORDER if acked_features & VIRTIO_F_IN_ORDER else shared_pages.INFLIGHT_SPLIT


def _check_ring_size(size: int, acked_features: int) -> str:
    """Return what is wrong with the size of a ring, "" for one that VIRTIO 1.3, 2.7 and 2.8.10.1, allows.

    It may be larger than the device has offered: over vhost the kernel passes on whatever a driver sets up.
    """
    if 0 < size <= shared_pages.RING_SIZE_MAX and (is_packed(acked_features) or size & (size - 1) == 0):
        return ""
    kind = "size" if is_packed(acked_features) else "power of two"
    return f"its driver has set up a ring of {size} entries, which is no {kind} from 1 to {shared_pages.RING_SIZE_MAX}"


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds. Together they stay below the transport's msg_timeout."""

    hello_s: float = 10.0  # a replaced worker to be ready
    quiesce_s: float = 10.0  # storage to finish what is in flight; then the worker is killed
    reset_s: float = 0.75  # the same after a reset, for which no request has to be finished
    start_grace_s: float = 0.25  # DRIVER_OK waits so long for queues to start, then is answered all the same

    @property
    def message_s(self) -> float:
        """The longest that the answer to a message can take."""
        return self.hello_s + self.quiesce_s + REAP_TIMEOUT_S


class VqControl:
    """One queue and its worker. `state` and `reason` may be read from any thread."""

    def __init__(
        self,
        spec: WorkerSpec,
        transport: Transport,
        pages: Pages,
        command: Sequence[str],
        limits: Limits,
        guard: Guard,
        on_failure: Callable[[WorkerError], None],
        on_well: Callable[[], None],
        on_store_size: Callable[[int], None],
        before_spawn: Callable[[], None] = lambda: None,
    ):
        """Make a stopped queue without a worker; see `spawn`.

        `spec` is complete but for `ctl_fd`, `kick_fd` and the port, which are filled in here. `guard` runs what goes
        on beside the operations. `on_failure` is called once for each failure, `on_well` when the queue has come out of
        them, `on_store_size` when the worker has seen that the store has another size (bytes). `before_spawn` is called
        before each worker is started.
        """
        self.index = spec.queue
        self.reason = ""
        self.worker: WorkerProcess | None = None
        self.restart_count = 0  # workers that had to be replaced
        self.upgraded = ""  # why none can be, as build.upgraded() has it
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._spec = spec._replace(kick_fd=self.kick_fd)
        self._transport = transport
        self._pages = pages
        self._command = command
        self._limits = limits
        self._guard = guard
        self._on_failure = on_failure
        self._on_well = on_well
        self._on_store_size = on_store_size
        self._before_spawn = before_spawn
        self.stop_count = 0  # changes with resets and quiesces; a start asked for before does not count
        self._life = VqLife()
        # Where a queue of known position stands, as VqInfo.last_avail_idx; None = as the driver has set it up.
        self._noted_idx: int | None = None
        self._lost_reason = ""  # why nobody knows where the queue stands, in VqStage.LOST
        self._set_up: ToWorker | None = None  # START for the rings that the driver has set up since its last reset
        self._hanging: list[WorkerProcess] = []  # killed, waiting in the kernel for their storage
        self._lock = asyncio.Lock()
        self._watching = False
        self._unreaped: WorkerProcess | None = None  # killed by `give_up`, and not waited for
        self._take_over_task: asyncio.Task[None] | None = None
        self._tries = 0  # take-overs since a request was last completed, or none was needed for long
        self._tried_at = -1  # how many had been completed then
        self._tried_s = 0.0  # when the last one was
        self._cpu = spec.cpu  # where the worker belongs; `spec` has where it can be
        self._is_missing = False

    @property
    def state(self) -> VqState:
        """The state of the queue, for people."""
        return self.stage.shown

    @property
    def stage(self) -> VqStage:
        """The state of the queue."""
        return self._life.state

    @property
    def ring_size(self) -> int:
        """The entries of the ring that the driver has set up since its last reset, 0 when it has not."""
        set_up = self._set_up  # another thread may ask
        return 0 if set_up is None else set_up.queue_size

    @property
    def spec(self) -> WorkerSpec:
        """What the next worker is told."""
        return self._spec

    @property
    def missing_cpu(self) -> int:
        """The CPU that the worker belongs on and cannot be on now, -1 where there is no such."""
        return self._cpu if self._is_missing else -1

    def pin(self, cpu: int, allowed: Collection[int]) -> None:
        """Have this worker and those after it run on `cpu`, as long as that is allowed; -1 = on any that is."""
        self._cpu = cpu
        self._move(allowed)

    def follow(self, allowed: Collection[int]) -> None:
        """Have a worker that was pinned, and those after it, where they belong, now that these CPUs are allowed."""
        if self._cpu >= 0:
            self._move(allowed)

    def _move(self, allowed: Collection[int]) -> None:
        was_missing, cpu = self._is_missing, self._cpu if self._cpu in allowed else -1
        self._spec = self._spec._replace(cpu=cpu)
        self._is_missing = cpu != self._cpu
        where = f"device {self._spec.device}: queue {self.index}"
        if self._is_missing and not was_missing:
            left = cpu_topology.format_cpu_list(allowed)
            _log.warning("%s: CPU %d is gone: its worker is not pinned, and runs on %s", where, self._cpu, left)
        elif was_missing and cpu >= 0:
            _log.warning("%s: CPU %d is back: its worker is pinned again", where, cpu)
        worker = self.worker
        if worker is None or not worker.alive:
            return
        try:
            os.sched_setaffinity(worker.pid, {cpu} if cpu >= 0 else allowed)
        except ProcessLookupError:
            return  # it has just died: the next one is told at its start
        except OSError as error:
            _log.warning("%s: stays on its CPU, as CPU %d is refused: %s", worker.title, cpu, error.strerror)

    async def spawn(self, timeout_s: float) -> None:
        """Start a worker and wait until it is ready. Raises what WorkerProcess.wait_hello does; none is left then."""
        self._before_spawn()
        port = self._transport.worker_port(self.index)
        spec = self._spec._replace(
            port=port.kind,
            port_fd=port.port_fd,
            port_api=port.api_version,
            irq_fd=port.irq_fd,
            user_memory_fd=port.user_memory_fd,
            user_memory_bytes=port.user_memory_bytes,
        )
        callbacks = (self._ring_failed, self._died, self._on_store_size)
        worker = WorkerProcess.spawn(self._command, spec, port, self._pages, self._guard, *callbacks)
        self.worker = worker
        try:
            await worker.wait_hello(timeout_s)
        except BaseException:
            if worker.alive:
                worker.abort()  # the wait was cut short; whoever ends the queue reaps it
            else:
                self.worker = None
            raise
        if self._spec.cpu != spec.cpu:  # moved meanwhile, and its own start has had the last word
            self._move(os.sched_getaffinity(0))

    async def prepare(self) -> bool:
        """Be ready for a driver that is about to start. Returns whether there is a worker; a failure is reported."""
        async with self._lock:
            if self.stage.position is Position.KNOWN:
                self._pages.void_log(self.index)  # the rings will be new ones
            return self.stage.is_closing or await self._revive()

    async def kill(self) -> None:
        """Kill and reap the worker if there still is one. One that hangs in the kernel has been waited for already."""
        if self.worker is not None:
            await self.worker.kill()

    def abort(self) -> None:
        """Kill the worker that `spawn` waits for."""
        if self.worker is not None:
            self.worker.abort()

    def start(self, acked_features: int, info: VqInfo, *, recover: bool = False) -> Coroutine[Any, Any, bool]:
        """Serve the queue that `info` describes, from where it was quiesced if it was. Returns whether it runs.

        recover: by the in-flight log that a supervisor before us has left. A failure is reported through `on_failure`.
        A worker that has died is replaced first. A reset or quiesce that is going on, or comes before this has its
        turn, leaves the queue stopped.
        """
        return self._start(acked_features, info, self.stop_count, recover)

    async def _start(self, acked_features: int, info: VqInfo, stop_count: int, recover: bool) -> bool:
        async with self._lock:
            self.unwatch_kick()
            await self._reap_given_up()
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
            if why := _check_ring_size(info.size, acked_features):
                return self._refuse(why)
            try:
                self._pages.reserve_log(self.index, info.size)
            except VdusefastError as error:
                return self._refuse(str(error))
            if not start.recover:
                # Nothing is in flight: all that was taken has been given back. A worker that is killed before it has
                # written its own log must not leave that of an earlier one.
                log_format = _log_format(acked_features)
                self._pages.begin_log(self.index, start.last_avail_idx, log_format, info.size)
            has_worker = self.stage is VqStage.LOST or await self._revive()
            if self.stage is VqStage.LOST:  # also since, by what a new worker says
                return self._refuse(f"{self._lost_reason}; reset the device")
            return has_worker and await self._serve(start)

    async def fail_pending(self) -> None:
        """Have everything that is pending and that comes answered with IOERR, by a worker without a store.

        For a driver that cannot let go of the device because its requests do not end. The worker that waits for them
        is killed; should it hang in the kernel, that is reported, and the queue is taken over all the same.
        """
        if self.worker is not None:
            self.worker.abort("held requests that did not end")  # first, as whoever has the lock may wait for it
        async with self._lock:
            worker = self.worker
            if worker is not None and not await worker.kill(timeout_s=FAIL_REAP_S):
                why = f"{worker.title} waits in the kernel for its storage and cannot be killed"
                if worker.reaped:  # what it has begun goes on by itself, on memory that the kernel keeps for it
                    _log.warning("%s was killed; the kernel still waits for storage that it has asked", worker.title)
                    worker.close()
                else:
                    self._hanging.append(worker)
                    self._on_failure(WorkerError(why))
            self.worker = None
            self._spec = self._spec._replace(engine="fail", store_fd=-1, store="null")
            if self._set_up is None or not await self._revive():
                return
            await self._serve(self._set_up._replace(recover=1))

    async def quiesce(self) -> int | None:
        """Stop the queue once it has finished what is in flight. Returns where it stands, None when that is lost."""
        async with self._stopping():
            self.unwatch_kick()
            if self.stage.position is Position.LOST:
                return None
            if self.stage.position is Position.KNOWN:
                if self._noted_idx is None:
                    return self._transport.vq_info(self.index).last_avail_idx
                return self._noted_idx
            event = await self._settle(Command.QUIESCE) if self._usable_worker() is not None else None
            if event is None and self._may_take_over() and await self._take_over():
                event = await self._settle(Command.QUIESCE)  # with what the dead one had in flight
            if event is None or self._is_lost():  # a bad ring may be reported before the answer
                return None
            self._noted_idx = event.last_avail_idx
            self._apply(VqEvent.QUIESCED)
            return self._noted_idx

    async def invalidate(self, start: int, last: int) -> bool:
        """Have mappings of IOVA [start, last] dropped; a running queue goes on. Returns whether they are gone."""
        async with self._lock:
            if self._usable_worker() is not None:
                await self._settle(Command.INVALIDATE, start, last)
                if self.stage is VqStage.QUIESCING:
                    self._apply(VqEvent.RESUMED)
            return not self._hangs()

    async def lock(self) -> None:
        """Keep every other operation waiting until `release`; for `hold`."""
        await self._lock.acquire()

    async def hold(self, last: int, timeout_s: float) -> bool:
        """Have the worker give back what it has taken, drop mappings of IOVA [0, last] and take nothing more.

        Returns whether nobody touches that memory until `release`. A worker that is too slow is let be: it may come to
        rest later, and goes on by the `release` that follows. The lock is held.
        """
        worker = self._usable_worker()
        if worker is not None:
            try:
                await worker.request(ToWorker(Command.HOLD, 0, last=last), timeout_s)
            except (TimeoutError, RefusedError):
                return False
            except WorkerError as error:
                _log.debug("%s", error)  # its death has been reported; the next one waits for the lock
        return not self._hangs()

    async def release(self, user_memory_bytes: int) -> None:
        """Let the worker go on after `lock` and `hold`, with so much user memory in place of bounce pages."""
        message = ToWorker(Command.RELEASE, 0, last=user_memory_bytes)
        worker = self._usable_worker()
        try:
            if worker is not None and user_memory_bytes:
                await self._request(message)  # it rests, so that it answers, or is replaced
            elif worker is not None:
                # One that has not come to rest must not be waited for: it carries out both commands when it does.
                with suppress(TimeoutError, WorkerError):
                    await worker.request(message, 0.0)
        finally:
            self._lock.release()

    async def reset(self) -> bool:
        """Stop the queue and drop every mapping, with a living worker at the end. Returns whether they are gone."""
        async with self._stopping():
            self.unwatch_kick()
            await self._reap_given_up()
            drained = self.stage.position is Position.KNOWN
            if self._usable_worker() is not None:
                drained = await self._settle_reset() is not None or drained
            self._noted_idx = self._set_up = None
            self._apply(VqEvent.RESET)
            if self._hangs():
                return False
            if drained:  # else the log is needed, should we end before the driver has our answer
                self._pages.void_log(self.index)
            if self.stage.is_closing or await self._revive():
                self._apply(VqEvent.READY, "")
            return True

    async def resize(self, capacity_sectors: int) -> None:
        """Have the worker, and every one after it, serve a device of that size. Returns when it does.

        Without the lock: a quiesce that waits for storage must not be waited for, and the worker takes commands in
        turn. Raises TimedOutError for a worker that does not answer; it takes the size when it goes on.
        """
        shrinks = capacity_sectors < self._spec.capacity_sectors
        self._spec = self._spec._replace(capacity_sectors=capacity_sectors)
        worker = self._usable_worker()
        if shrinks and self._hangs():  # what it was writing may still arrive
            raise TimedOutError(f"device {self._spec.device}: queue {self.index}: a worker hangs in its storage")
        if worker is None:
            return
        try:
            await worker.request(ToWorker(Command.RESIZE, 0, start=capacity_sectors), RESIZE_S)
        except TimeoutError:
            raise TimedOutError(
                f"device {self._spec.device}: queue {self.index}: the worker (pid {worker.pid}) has not taken the new "
                f"size within {RESIZE_S:g} s: it waits for its storage"
            ) from None
        except RefusedError as error:
            raise WorkerError(f"{worker.title} refused the new size: {error}") from None
        except WorkerError:
            if worker.alive:
                raise
            # The one that takes its place is told at its start.

    def begin_close(self) -> None:
        """Replace no worker any more, and start no queue: the device stops."""
        self._apply(VqEvent.CLOSE)

    async def stop(self, timeout_s: float) -> None:
        """End the worker once it has finished what is in flight; kill it after `timeout_s`. A failure is reported."""
        self.begin_close()
        self.unwatch_kick()
        if self._take_over_task is not None:
            self._take_over_task.cancel()
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with limit(deadline - asyncio.get_running_loop().time()), self._lock:
                pass  # the operation before this one has ended
        except TimeoutError:
            pass  # it waits for the same worker, which is killed below
        worker = self._usable_worker()
        if worker is not None:
            try:
                await worker.stop(max(0.0, deadline - asyncio.get_running_loop().time()))
            except WorkerError as error:
                self._fail(error)
        self._apply(VqEvent.ENDED)

    def close(self) -> None:
        """Close every descriptor; a second call does nothing."""
        self.unwatch_kick()
        for worker in (self.worker, *self._hanging):
            if worker is not None:
                worker.close()
        if self.kick_fd >= 0:
            os.close(self.kick_fd)
            self.kick_fd = -1

    def watch_kick(self, on_kick: Callable[[VqControl], object]) -> None:
        """Call `on_kick` at each kick while the queue is not served: the driver may have made it ready."""

        def kicked() -> None:
            try:
                os.eventfd_read(self.kick_fd)
            except BlockingIOError:
                return
            on_kick(self)

        self._watching = True
        self._guard.reader(self.kick_fd, Part.KICK, kicked, self.give_up)

    def unwatch_kick(self) -> None:
        """Leave the kicks to the worker."""
        if self._watching:
            self._watching = False
            asyncio.get_running_loop().remove_reader(self.kick_fd)

    @asynccontextmanager
    async def _stopping(self) -> AsyncIterator[None]:
        """Hold the lock, and make every start void that was asked for before or meanwhile.

        Until it has our answer the driver's side still shows the queue as ready.
        """
        self.stop_count += 1
        async with self._lock:
            try:
                yield
            finally:
                self.stop_count += 1

    # -- inside; the lock is held

    def _is_lost(self) -> bool:
        """Tell whether nobody knows where the queue stands, which may come true during every wait."""
        return self.stage.position is Position.LOST

    def _hangs(self) -> bool:
        """Tell whether a process that was killed may still touch the driver's memory."""
        return any(worker is not None and worker.hung for worker in (self.worker, *self._hanging))

    async def _serve(self, start: ToWorker) -> bool:
        """Have the worker serve as `start` says. Returns whether it does; a failure is reported."""
        self._apply(VqEvent.SERVE)
        event = await self._request(start)
        # A ring found bad at once is reported before we get here, and so is the death of a worker with much to tell.
        if event is None or self._is_lost() or self._usable_worker() is None:
            return False
        if event.text:
            _log.warning("device %s: queue %d: %s", self._spec.device, self.index, event.text)
        self._apply(VqEvent.STARTED, "")
        return True

    def _can_stand_at(self, last_avail_idx: int) -> bool:
        """Return whether a worker may say this: a position of a split ring has 16 bits."""
        return last_avail_idx <= 0xFFFF or (self._set_up is not None and is_packed(self._set_up.acked_features))

    def _usable_worker(self) -> WorkerProcess | None:
        worker = self.worker
        return worker if worker is not None and worker.usable else None

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
        timer = loop.call_later(self._limits.reset_s, self._abort_busy)
        try:
            return await self._settle(Command.RESET)
        finally:
            timer.cancel()

    def _abort_busy(self) -> None:
        """Kill a worker that still carries out requests. One that only waits for its CPU is let be."""
        worker = self._usable_worker()
        if worker is not None and self._pages.has_inflight(self.index):
            why = f"still had requests in flight {self._limits.reset_s:g} s after a reset"
            _log.warning("%s %s: it is killed and replaced", worker.title, why)
            self.restart_count += 1
            worker.abort(why)

    async def _request(self, message: ToWorker) -> FromWorker | None:
        """Send `message` and return the answer; None after a failure, which is reported.

        A worker that does not answer in time, or not as it should, is killed and replaced.
        """
        worker = self.worker
        assert worker is not None
        try:
            answer = await worker.request(message, self._limits.quiesce_s)
            if self._can_stand_at(answer.last_avail_idx):
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
            why = f"did not finish its requests within {self._limits.quiesce_s:g} s"
        except WorkerError as error:
            if not worker.alive:
                return None  # its death has been reported
            why = str(error).removeprefix(f"{worker.title} ")
        gone = await worker.kill(why)
        self._died(WorkerError(f"{worker.title} {worker.cause() if gone else f'{why}, and cannot be killed'}"))
        return None

    async def _revive(self) -> bool:
        """Make sure that there is a worker to command: a fresh one, stopped, in place of a dead one."""
        error = await self._respawn()
        if error is not None:
            self._fail(error)
        return self._usable_worker() is not None

    async def _respawn(self) -> WorkerError | None:
        """Start a worker unless there is one. Returns why that could not be done, where it was tried."""
        if self._usable_worker() is not None or self.stage.is_closing or (self.worker is not None and self.worker.hung):
            return None
        try:
            await self.spawn(self._limits.hello_s)
        except (VdusefastError, OSError) as error:
            where = f"device {self._spec.device}: queue {self.index}"
            if upgraded := build.upgraded():
                self.upgraded = upgraded
                return UpgradedError(f"{where}: no new worker: {upgraded}: vdusefast restart {self._spec.device}")
            return error if isinstance(error, WorkerError) else WorkerError(f"{where}: no new worker: {error}")
        self.upgraded = ""
        return None

    def _refuse(self, why: str, event: VqEvent = VqEvent.FAIL) -> bool:
        self._fail(WorkerError(f"device {self._spec.device}: queue {self.index}: cannot start: {why}"), event)
        return False

    def _died(self, error: WorkerError) -> None:
        """Have a worker that died replaced, by one that goes on where it stood."""
        if self.stage.is_closing or self.stage is VqStage.LOST:
            self._fail(error)
            return
        _log.warning("%s; it is replaced", error)
        self.restart_count += 1
        self._apply(VqEvent.DIED, str(error))
        if self._take_over_task is None:
            self._begin_take_over(0.0)

    def _begin_take_over(self, pause_s: float) -> None:
        work = self._take_over_until_done(pause_s)
        self._take_over_task = self._guard.task(Part.TAKE_OVER, work, self._take_over_again)

    def _take_over_again(self) -> None:
        """Go on replacing the worker after what nobody expected."""
        self._take_over_task = None
        if self.stage.waits_for_worker:
            self.abort()  # whatever has become of it
            self._begin_take_over(PAUSE_S)

    def give_up(self) -> None:
        """Serve the queue no more after what nobody expected; a reset starts it again."""
        self.unwatch_kick()
        self.abort()
        self._unreaped = self.worker
        self._apply(VqEvent.FAIL, "an internal failure, see the log")

    async def _reap_given_up(self) -> None:
        """Wait for the end of the worker that `give_up` has killed: only one that hangs in its storage stays."""
        worker, self._unreaped = self._unreaped, None
        if worker is not None:
            await worker.kill()

    def _may_take_over(self) -> bool:
        return self.stage.is_logged and not self.stage.is_closing and not self._hangs()

    async def _take_over_until_done(self, pause_s: float) -> None:
        """Try until the queue is served again, or is to be served no more. Others may do the same meanwhile."""
        try:
            await asyncio.sleep(pause_s)
            while True:
                pause_s = self._pause_s()
                if self._tries == TAKE_OVER_TRIES_AT_ONCE + 1 and not self.upgraded:
                    self._on_failure(WorkerError(f"{self.reason}; so did those before it: tried again with pauses"))
                await asyncio.sleep(pause_s)
                if self.worker is not None and self.worker.hung:
                    await self.worker.wait_gone()  # until then it may still write what is to be written again
                async with self._lock:
                    if not self.stage.waits_for_worker or await self._take_over():
                        return
        finally:
            self._take_over_task = None

    async def _take_over(self) -> bool:
        """Replace the worker, and serve on if the dead one did. Returns whether that is done. The lock is held."""
        error = await self._respawn()
        if isinstance(error, UpgradedError):
            if self.reason != str(error):
                self.reason = str(error)
                self._on_failure(error)
        elif error is not None:
            _log.warning("%s; another one is tried", error)
            self.reason = str(error)
        if self._usable_worker() is None:
            return False
        if not self.stage.is_logged or self._set_up is None:
            self._apply(VqEvent.READY, "")
            return True
        return await self._serve(self._set_up._replace(recover=1))

    def _pause_s(self) -> float:
        """Return how long to wait before the next worker: nothing if requests were completed since, or time went by."""
        done, now_s = self._pages.requests_done(self.index), asyncio.get_running_loop().time()
        if done != self._tried_at or now_s - self._tried_s > TAKE_OVER_WINDOW_S:
            self._tried_at, self._tries = done, 0
        self._tried_s = now_s
        self._tries += 1
        if self._tries <= TAKE_OVER_TRIES_AT_ONCE:
            return 0.0
        return min(TAKE_OVER_PAUSE_MAX_S, TAKE_OVER_PAUSE_S * 2.0 ** (self._tries - TAKE_OVER_TRIES_AT_ONCE))

    def _ring_failed(self, reason: str) -> None:
        pid = self.worker.pid if self.worker is not None else -1
        where = f"device {self._spec.device}: queue {self.index}: worker (pid {pid})"
        self._lost_reason = "its ring was found bad"  # where it stands may be what is wrong
        self._fail(WorkerError(f"{where} stopped serving: {reason}"), VqEvent.LOSE)

    def _fail(self, error: WorkerError, event: VqEvent = VqEvent.FAIL) -> None:
        self._apply(event, str(error))
        self._on_failure(error)

    def _apply(self, event: VqEvent, reason: str | None = None) -> None:
        """Enter the state that follows from `event`. reason: the new one; None = it stays."""
        before, now = self._life.apply(event)
        if reason is not None:
            self.reason = reason
        if before.is_unwell and not now.is_unwell and not now.is_closing:  # what fails at the end stays
            self._on_well()
