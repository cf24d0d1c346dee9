"""The control plane of one device: answers its messages and looks after its workers.

Nothing here waits for storage but the workers' answers, which are awaited with a limit, never touches a ring, and
does no storage I/O, so that nothing slow can keep a message from being answered.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

from vdusefast.base.deadline import limit
from vdusefast.base.guard import PAUSE_S, Guard, Part
from vdusefast.base.time_limits import LETTING_GO_S
from vdusefast.control.cpu_watch import CpuWatch
from vdusefast.control.device_model import BlockDevice, StatusChange, StatusRefusedError
from vdusefast.control.failures import Failures, PastFailure
from vdusefast.control.stall_watch import LOOK_S, QueueWatch
from vdusefast.control.user_memory_switch import MemoryControl
from vdusefast.control.virtqueue import Limits, VqControl
from vdusefast.control.vq_states import VqState
from vdusefast.control.worker_process import Pages, WorkerProcess, default_command
from vdusefast.control.write_back import WriteBack
from vdusefast.errors import DeviceBusyError, TimedOutError, VdusefastError
from vdusefast.transport import Transport, TransportError
from vdusefast.transport.uapi import (
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
    GetVqState,
    Request,
    Response,
    SetStatus,
    SetVqGroupAsid,
    SetVqReady,
    Suspend,
    UnknownRequest,
    UpdateIotlb,
    is_packed,
)
from vdusefast.worker.protocol import WorkerSpec

__all__ = ["DeviceState", "Limits", "QueueInfo", "Supervisor", "VqState"]

MESSAGES_A_TURN_MAX = 64
DEAF_COUNT_MAX = 3
READY_LOOK_S = 0.001
READY_LOOK_COUNT = 1000
CONFIG_LOOK_S = 0.01
CONFIG_LOOK_COUNT = 1000
UNDO_TIMEOUT_S = 2.0  # for idle workers to end when the start fails
FORCE_GRACE_S = 2.0  # a forced stop lets requests end by themselves for so long before they are failed

RECENT_S = 600.0  # a failure that was recovered from at once is shown for so long
_STORE = "store"  # what has failed

_log = logging.getLogger("vdusefast")
_T = TypeVar("_T")


class DeviceState(StrEnum):
    """Where a device stands."""

    CREATED = "created"
    ATTACHED = "attached"
    RUNNING = "running"
    SUSPENDED = "suspended"
    BROKEN = "broken"
    STOPPED = "stopped"


@dataclass(frozen=True)
class QueueInfo:
    """One queue, as shown to people. `pid` is -1 where there is no worker, `cpu` where it is not pinned, `irq_cpu`
    where its interrupts go as the kernel has them.
    """

    index: int
    pid: int
    size: int  # of the ring that the driver has set up, 0 when it has not
    cpu: int
    engine: str
    state: VqState
    reason: str  # why it failed, "" otherwise
    waiting_s: float = 0.0  # for how long its storage has kept it waiting, 0.0 when it does not
    restarts: int = 0  # workers that had to be replaced
    irq_cpu: int = -1
    poll: str = ""  # how an idle worker waits: "adaptive, 200 us", "always", "never"
    irq_hold: str = ""  # how long an interrupt may wait for more completions: "up to 200 us", "none"


class Supervisor:
    """One device and its workers.

    The coroutines run in one event loop; `failure`, `state` and `queues` may be used from any thread.
    """

    def __init__(
        self,
        device: BlockDevice,
        transport: Transport,
        pages: Pages,
        specs: Sequence[WorkerSpec],
        *,
        command: Sequence[str] | None = None,
        limits: Limits | None = None,
        on_created: Callable[[], None] | None = None,
        on_store_size: Callable[[int], None] | None = None,
        write_back: WriteBack | None = None,
    ):
        """Prepare; see `start`.

        device: the model, whose status is kept there. transport: not yet created; consumed. pages: the shared pages
        (borrowed). specs: one a queue, complete but for `ctl_fd`, `kick_fd` and the port. command: what to run as a
        worker in place of the real one. on_created: called between the creation of the device and its attachment, for
        what has to be there should we die from then on. on_store_size: called in the loop when a worker has seen that
        the store has another size, in bytes. write_back: whether the store's data is lost (borrowed). Raises ValueError
        when the limits do not leave room below the transport's msg_timeout.
        """
        limits = limits or Limits()
        if 0 < transport.msg_timeout_s <= limits.message_s:
            raise ValueError(f"a message may take {limits.message_s:g} s of the {transport.msg_timeout_s:g} s it has")
        self.device = device
        self.transport = transport
        self.state = DeviceState.CREATED
        self._failures = Failures()
        self._write_back = write_back
        self._store_failed = False
        self._limits = limits
        self._on_created = on_created
        self._memory: MemoryControl | None = None
        self._cpus = CpuWatch()
        self._watch = QueueWatch(device.name, pages, len(specs))
        self._guard = Guard(device.name, self.report)
        self._deaf_count = 0  # failures in a row to read a message
        self._status_lock = asyncio.Lock()
        self._message_fd = -1
        self._stopping = False
        self._features_asked = False  # FEATURES_OK may have been asked for, and not been answered
        self._ended = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None  # since `start`
        self._forced = asyncio.Event()
        self._deadline = 0.0  # of a stop
        self._refusal = ""  # why the driver and we could not agree, last time it tried
        self._refused = asyncio.Event()
        command = list(command) if command is not None else default_command()
        self._vqs: list[VqControl] = []
        resized = on_store_size or (lambda size_bytes: None)
        try:
            for spec in specs:
                self._vqs.append(self._make_vq(spec, pages, command, resized))
        except OSError:
            for vq in self._vqs:
                vq.close()
            raise

    async def start(self, timeout_s: float = 10.0, *, reopen: bool = False, whole: bool = False) -> None:
        """Create the device, start its workers side by side, and show it to drivers.

        reopen: take over a device that a supervisor before us has left, with its shared pages, and serve on. whole: not
        unless every queue can be served.
        Raises VdusefastError: what a worker reported, TimedOutError when one is not ready after `timeout_s`,
        TransportError. Nothing is left behind then; a device that was to be taken over is left as it was found.
        """
        self.loop = asyncio.get_running_loop()
        for vq in self._vqs:
            vq.follow(self._cpus.cpus.allowed)
        try:
            if reopen:
                self.transport.reopen(self.device.spec())
            else:
                self.transport.create(self.device.spec())
                if self._on_created is not None:
                    self._on_created()
            await self._spawn_all(timeout_s)
            if reopen:
                await self._go_on(whole)
            self._message_fd = self.transport.message_fd()
            self._guard.reader(self._message_fd, Part.MESSAGES, self._on_messages, self._hear_on)
            self._begin_watch(0.0)
            self._use_memory()
            await self._attach()
        except BaseException:
            undo = self.hand_over(UNDO_TIMEOUT_S) if reopen else self.stop(UNDO_TIMEOUT_S)
            await asyncio.shield(undo)  # whoever cuts this short again finds it going on
            raise
        if self.state == DeviceState.CREATED:
            self.state = DeviceState.ATTACHED

    async def hand_over(self, timeout_s: float = 30.0) -> None:
        """Stop serving and leave the device as it is, for the next supervisor: its driver waits meanwhile.

        Messages that come stay unanswered until then. Workers finish what they have in flight; what one does not
        finish within `timeout_s` is in its log. A second call, or one after `stop`, does nothing.
        """
        if self._stopping:
            await self._ended.wait()
            return
        self._stopping = True
        self._unwatch_messages()
        try:
            for vq in self._vqs:
                vq.begin_close()
            await asyncio.gather(*(vq.stop(timeout_s) for vq in self._vqs))
        finally:
            await self._end(keep=True)

    async def stop(self, timeout_s: float = 30.0, *, force: bool = False) -> None:
        """Drain: take the device from its driver, let every worker finish what it has in flight, and release
        everything.

        A driver that has not let go after `timeout_s` (FORCE_GRACE_S with `force`) gets errors for all that it still
        has pending, and a worker that is not done after `timeout_s` is killed; both are recorded as failures. A second
        call does nothing.
        """
        if self._stopping:
            await self._ended.wait()
            return
        self._stopping = True
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + timeout_s
        if force:
            self.force(timeout_s)
        try:
            await self._detach(timeout_s)
            for vq in self._vqs:
                vq.begin_close()
            left_s = max(self._deadline - loop.time(), min(timeout_s, UNDO_TIMEOUT_S))
            await asyncio.gather(*(vq.stop(left_s) for vq in self._vqs))
        finally:
            await self._end(keep=False)

    def force(self, timeout_s: float) -> None:
        """Make a `stop` that is under way one with `force`, which ends `timeout_s` from now at the latest."""
        self._deadline = min(self._deadline, asyncio.get_running_loop().time() + timeout_s)
        self._forced.set()

    async def resize(self, capacity_sectors: int) -> None:
        """Give the device another size while it runs.

        A driver never sees more than the workers serve: they learn of a larger size before it, and of a smaller one
        after it. Nothing is in flight behind a smaller size when this returns. Raises TimedOutError for a worker that
        does not answer: a device that was to grow is what it was then; one that was to shrink has told its driver,
        and its worker follows when it goes on. Raises VdusefastError when the device is not served.
        """
        if self._stopping or self.state in (DeviceState.CREATED, DeviceState.BROKEN):
            raise DeviceBusyError(f"device {self.device.name} is {self.state}: it cannot be resized now")
        before_sectors = self.device.capacity_sectors
        if capacity_sectors < before_sectors:
            self._show_capacity(capacity_sectors)
        try:
            await self._resize_workers(capacity_sectors)
            if capacity_sectors > before_sectors:
                self._show_capacity(capacity_sectors)
        except VdusefastError:
            if capacity_sectors > before_sectors and not self._stopping:
                with suppress(VdusefastError):  # whoever hangs takes both sizes, one after the other
                    await self._resize_workers(before_sectors)
            raise

    async def show_capacity(self) -> None:
        """Show the driver the size that is served: a server before us may have ended amid a resize.

        Raises TransportError.
        """
        self._show_capacity(self.device.capacity_sectors)

    async def place(self, cpus: Sequence[int], irq_cpus: Sequence[int | None]) -> None:
        """Move the workers and the interrupts to other CPUs, one a queue; -1 and None are none of their own."""
        for vq, cpu in zip(self._vqs, cpus, strict=True):
            vq.pin(cpu, self._cpus.cpus.allowed)
        self.transport.irq_cpus = tuple(irq_cpus)
        self._place_irqs()

    @property
    def failure(self) -> VdusefastError | None:
        """What is wrong now: the failure that has lasted longest, None when all is well."""
        return self._failures.first or (self._write_back.failure() if self._write_back is not None else None)

    @property
    def last_failure(self) -> PastFailure | None:
        """The failure that has ended last."""
        return self._failures.last

    @property
    def missing_cpus(self) -> str:
        """Which workers and interrupts are not on the CPU that they belong on, for people."""
        lost = [
            f"queue {vq.index} is not pinned: CPU {vq.missing_cpu} is gone" for vq in self._vqs if vq.missing_cpu >= 0
        ]
        lost += [
            f"interrupts of queue {index} go to any CPU: CPU {cpu} is not online"
            for index, cpu in enumerate(self.transport.irq_cpus)
            if cpu is not None and cpu not in self._cpus.cpus.online
        ]
        return "; ".join(lost)

    @property
    def memory(self) -> str:
        """What requests' data lies in, for people."""
        return self._memory.text if self._memory is not None else self.transport.memory_text

    @property
    def upgraded(self) -> str:
        """Why a queue has no worker and can get none, where that is because the files are of another build by now."""
        return next((vq.upgraded for vq in self._vqs if vq.upgraded), "")

    @property
    def vqs(self) -> tuple[VqControl, ...]:
        """The queues, for the loop's thread."""
        return tuple(self._vqs)

    def queues(self) -> list[QueueInfo]:
        """Return one line for each queue."""
        now_s = time.monotonic()
        irq_cpus = dict(enumerate(self.transport.irq_cpus))
        runs = bool(self.device.status & VIRTIO_CONFIG_S_DRIVER_OK)
        return [
            _describe(vq, vq.worker, self._watch.waiting_s(vq.index, now_s), irq_cpus.get(vq.index), runs=runs)
            for vq in self._vqs
        ]

    # -- inside

    def _make_vq(
        self, spec: WorkerSpec, pages: Pages, command: Sequence[str], resized: Callable[[int], None]
    ) -> VqControl:
        what = f"queue {spec.queue}"
        return VqControl(
            spec,
            self.transport,
            pages,
            command,
            self._limits,
            self._guard,
            lambda error: self._failures.begin(error, what),
            lambda: self._failures.end(what),
            resized,
            self._look_at_store,
        )

    def _look_at_store(self) -> None:
        """Have flushes fail if a worker has died that was told of a failed write-back."""
        if self._write_back is not None:
            self._write_back.look()

    async def _end(self, *, keep: bool) -> None:
        """Release everything; the device itself unless `keep`."""
        self._unwatch_messages()
        await self._guard.close()
        await asyncio.gather(*(vq.kill() for vq in self._vqs))
        self._look_at_store()  # for the server that goes on
        for vq in self._vqs:
            vq.close()
        try:
            self.transport.close(keep=keep)
        except VdusefastError as error:
            self._failures.begin(error)
        self.state = DeviceState.STOPPED
        self._ended.set()

    async def _go_on(self, whole: bool) -> None:
        """Serve the queues of a device that was taken over, from where their logs say. Raises VdusefastError.

        whole: also when one of them cannot be served.
        """
        self.device.status = self.transport.driver_status()
        if not self.device.status & VIRTIO_CONFIG_S_DRIVER_OK:
            # Its driver has yet to come, or has sent a message that waits for us: perhaps about these very features.
            self._features_asked = bool(self.device.status)
            return
        try:
            await self._driver_ok(recover=True, wait_all=whole)
        except StatusRefusedError as error:
            raise TransportError(f"device {self.device.name}: cannot go on with its driver: {error}") from None
        self.state = DeviceState.RUNNING
        failed = [vq.reason for vq in self._vqs if vq.state == VqState.FAILED]
        if whole and failed:
            raise TransportError("; ".join(failed))

    async def _attach(self) -> None:
        """Show the device to drivers, and stop waiting soon after one has refused it. Raises what `attach` does."""
        attach = asyncio.create_task(self.transport.attach())
        refused = asyncio.create_task(self._refused.wait())
        try:
            await asyncio.wait({attach, refused}, return_when=asyncio.FIRST_COMPLETED)
            if not attach.done():
                await asyncio.wait({attach}, timeout=UNDO_TIMEOUT_S)  # it may try again, with other features
            if not attach.done():
                raise TransportError(f"device {self.device.name}: its driver gave up: {self._refusal}")
            attach.result()
        finally:
            for task in (attach, refused):
                task.cancel()
            await asyncio.gather(attach, refused, return_exceptions=True)

    async def _detach(self, grace_s: float) -> None:
        """Take the device from its driver, serving on meanwhile. What is pending after `grace_s` is failed."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        detach = asyncio.create_task(self.transport.detach())
        done = await self._wait_for_requests(detach, grace_s)
        if not done:
            took_s = loop.time() - began
            _log.warning("device %s: requests are still pending after %.3g s: failing them", self.device.name, took_s)
            await asyncio.gather(*(vq.fail_pending() for vq in self._vqs))
            done = bool((await asyncio.wait({detach}, timeout=LETTING_GO_S))[0])
        if not done:
            detach.cancel()
        try:
            await detach
        except asyncio.CancelledError:
            if done:
                raise
            why = f"its driver did not let go of it within {loop.time() - began:.3g} s"
            self._failures.begin(TimedOutError(f"device {self.device.name}: {why}; the kernel keeps it until then"))
        except VdusefastError as error:
            self._failures.begin(error)

    async def _wait_for_requests(self, detach: asyncio.Task[None], grace_s: float) -> bool:
        """Wait for `detach`, for `grace_s`, and FORCE_GRACE_S once `force` is called. Returns whether it is done."""
        forced = asyncio.create_task(self._forced.wait())
        try:
            async with limit(grace_s):
                await asyncio.wait({detach, forced}, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait({detach}, timeout=FORCE_GRACE_S)
        except TimeoutError:
            pass  # which is what `detach` tells
        finally:
            forced.cancel()
        return detach.done()

    def _begin_watch(self, pause_s: float) -> None:
        self._guard.task(Part.QUEUE_WATCH, self._watch_queues(pause_s), lambda: self._begin_watch(PAUSE_S))

    async def _watch_queues(self, pause_s: float) -> None:
        """Look every second which queues wait for their storage, and whether CPUs have gone or come."""
        await asyncio.sleep(pause_s)
        while True:
            await asyncio.sleep(LOOK_S)
            self._failures.settle()
            self._tell_store_failure()
            for vq in self._vqs:
                serves = vq.state not in (VqState.STOPPED, VqState.FAILED)
                self._watch.look(vq.index, time.monotonic(), serves=serves)
            if self._cpus.look():
                self._follow_cpus()

    def _follow_cpus(self) -> None:
        """Have workers and interrupts where they belong, as far as those CPUs are there."""
        for vq in self._vqs:
            vq.follow(self._cpus.cpus.allowed)
        if self.device.status & VIRTIO_CONFIG_S_DRIVER_OK:
            self._place_irqs()

    def _tell_store_failure(self) -> None:
        error = self._write_back.failure() if self._write_back is not None else None
        if error is None:
            self._failures.end(_STORE)
        elif not self._store_failed:
            self._failures.begin(error, _STORE)
        self._store_failed = error is not None

    def _use_memory(self) -> None:
        """Begin to put memory of ours in place of the kernel's, where the transport has any for it."""
        memory = self.transport.user_memory()
        if memory is not None:
            self._memory = MemoryControl(self.device.name, memory, self._vqs, self.transport.memory_text)
            self._guard.task(Part.MEMORY, self._memory.run(), self._memory.give_up)

    async def _resize_workers(self, capacity_sectors: int) -> None:
        """Have all workers, side by side, serve that size. Raises the first one's VdusefastError, after all."""
        results = await asyncio.gather(*(vq.resize(capacity_sectors) for vq in self._vqs), return_exceptions=True)
        for result in results:
            if result is not None:
                raise result

    def _show_capacity(self, capacity_sectors: int) -> None:
        """Change the configuration space, and tell the driver. Raises TransportError."""
        before_sectors = self.device.capacity_sectors
        try:
            self.transport.set_config(0, self.device.set_capacity(capacity_sectors))
        except OSError as error:
            self.device.set_capacity(before_sectors)
            raise TransportError(f"device {self.device.name}: cannot be resized: {error.strerror}") from error
        self._guard.task(Part.CONFIG_IRQ, self._tell_config())

    async def _tell_config(self) -> None:
        """Interrupt the driver for its configuration. One that is still starting is told when it is done."""
        for _ in range(CONFIG_LOOK_COUNT):
            try:
                self.transport.inject_config_irq()
                return
            except OSError as error:  # there is none yet, or no device any more, which is reported by its messages
                if error.errno != errno.EINVAL or not self.device.status:
                    return
            await asyncio.sleep(CONFIG_LOOK_S)

    def _refuse(self, why: str) -> None:
        """Note why the driver could not take the device; a start that waits for it is told."""
        self._refusal = why
        self._refused.set()

    async def _spawn_all(self, timeout_s: float) -> None:
        """Start all workers; when one fails, take the others down and raise its error."""
        tasks = {asyncio.create_task(vq.spawn(timeout_s)): vq for vq in self._vqs}
        try:
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError:
            done, waiting = set(), set(tasks)
            raise
        finally:
            # Not cancelled but killed: each task then sees to it that its process is reaped.
            for task in waiting:
                tasks[task].abort()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    def report(self, error: VdusefastError) -> None:
        """Log a failure that has been recovered from, and show it for a while. May be called in any thread."""
        self._failures.begin(error, type(error).__name__, RECENT_S)

    def _unwatch_messages(self) -> None:
        if self._message_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._message_fd)
            self._message_fd = -1

    def _on_messages(self) -> None:
        for _ in range(MESSAGES_A_TURN_MAX):
            try:
                request = self.transport.receive()
            except (TransportError, OSError) as error:
                self._break(error)
                return
            self._deaf_count = 0
            if request is None:
                return
            self._guard.task(Part.ANSWER, self._handle(request), partial(self._refuse_message, request))

    def _hear_on(self) -> None:
        """Read the next message after one that could not be read, unless that is always so."""
        self._deaf_count += 1
        if self._deaf_count >= DEAF_COUNT_MAX:
            self._break(TransportError(f"device {self.device.name}: its messages cannot be read"))

    def _refuse_message(self, request: Request) -> None:
        self.transport.respond(Response(request.request_id, False))

    def _break(self, error: Exception) -> None:
        """The transport has given the device up: stop serving, so that nobody writes into memory taken back."""
        self._unwatch_messages()
        self.state = DeviceState.BROKEN
        self._failures.begin(
            error if isinstance(error, VdusefastError) else TransportError(f"{self.device.name}: {error}")
        )
        for vq in self._vqs:
            self._guard.task(Part.QUEUE_RESET, vq.reset(), vq.give_up)

    async def _handle(self, request: Request) -> None:
        """Answer one message."""
        try:
            response = await self._answer(request)
        except StatusRefusedError as error:
            _log.warning("device %s: %s: answered FAILED", self.device.name, error)
            self._refuse(str(error))
            response = Response(request.request_id, False)
        try:
            self.transport.respond(response)
        except OSError as error:
            _log.error("device %s: %s could not be answered: %s", self.device.name, request, error.strerror)

    async def _answer(self, request: Request) -> Response:
        match request:
            case SetStatus(request_id, status):
                async with self._status_lock:
                    return Response(request_id, await self._set_status(status))
            case GetVqState(request_id, vq_index):
                if vq_index >= len(self._vqs):
                    return Response(request_id, False)
                last_avail_idx = await self._vqs[vq_index].quiesce()
                self._go_on_when_kicked(self._vqs[vq_index])
                packed = is_packed(self.transport.acked_features())
                return Response(request_id, last_avail_idx is not None, vq_index, last_avail_idx or 0, packed)
            case UpdateIotlb(request_id, start, last):
                gone = await asyncio.gather(*(vq.invalidate(start, last) for vq in self._vqs))
                return Response(request_id, all(gone))
            case SetVqReady(request_id, vq_index, ready):
                return Response(request_id, await self._set_vq_ready(vq_index, ready))
            case SetVqGroupAsid(request_id, group, asid):
                return Response(request_id, group == 0 and asid == 0)  # the only ones that the device was created with
            case Suspend(request_id):
                async with self._status_lock:
                    return Response(request_id, await self._suspend())
            case UnknownRequest(request_id, kind):
                _log.error("device %s: message of unknown type %d: answered FAILED", self.device.name, kind)
                return Response(request_id, False)

    async def _set_status(self, status: int) -> bool:
        """Carry a new device status out. Returns whether to answer OK. Raises StatusRefusedError."""
        change = self.device.judge_status(status)
        if change == StatusChange.NOTHING and self._features_asked and status & VIRTIO_CONFIG_S_FEATURES_OK:
            change = StatusChange.FEATURES_OK  # asked of the supervisor before us, which has not answered
        self._features_asked = False
        if change == StatusChange.RESET:
            # Whatever comes of it, the driver starts again from nothing.
            self.device.status = 0
            self.state = DeviceState.ATTACHED
            return all(await asyncio.gather(*(vq.reset() for vq in self._vqs)))
        if change == StatusChange.FEATURES_OK:
            self.device.judge_features(self.transport.acked_features())
            # The last step that a driver can be refused: it takes no notice of how DRIVER_OK is answered.
            if not all(await asyncio.gather(*(vq.prepare() for vq in self._vqs))):
                reasons = "; ".join(vq.reason for vq in self._vqs if vq.reason)
                raise StatusRefusedError(f"FEATURES_OK: {reasons}")
        elif change == StatusChange.DRIVER_OK:
            await self._driver_ok()
            self.state = DeviceState.RUNNING
        elif change == StatusChange.GAVE_UP:
            _log.warning("device %s: the driver gave the device up (status %#x)", self.device.name, status)
            self._refuse(f"it set FAILED (status {status:#x})")
        self.device.status = status
        return True

    async def _driver_ok(self, *, recover: bool = False, wait_all: bool = False) -> None:
        """Set every queue's kick eventfd and start those that the driver has set up; the others are looked at with each
        kick.

        Waits shortly for the starts, which are quick unless a worker has to be replaced first: a worker starts late
        rather than the message is answered late. A queue that does not start has failed, and the others serve: the
        kernel's driver goes on whatever we answer, but would never be interrupted by a device that refused it.
        recover: the queues go on by their logs. wait_all: wait until each has started or failed. Raises
        StatusRefusedError for features that were changed since they were accepted.
        """
        acked_features = self.transport.acked_features()
        self.device.judge_features(acked_features)
        self._place_irqs()
        starts = []
        for vq in self._vqs:
            info = self.transport.vq_info(vq.index)
            self.transport.set_kickfd(vq.index, vq.kick_fd)
            if info.in_use:
                starts.append(self._start_vq(vq, vq.start(acked_features, info, recover=recover)))
            else:
                vq.watch_kick(self._start_if_ready)
        if starts:
            done, _late = await asyncio.wait(starts, timeout=None if wait_all else self._limits.start_grace_s)
            if not all(start.result() for start in done):
                self._refuse("; ".join(vq.reason for vq in self._vqs if vq.state == VqState.FAILED))

    def _start_vq(self, vq: VqControl, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T | None]:
        return self._guard.task(Part.QUEUE_START, work, vq.give_up)

    def _place_irqs(self) -> None:
        try:
            self.transport.place_irqs()
        except OSError as error:
            _log.warning("device %s: interrupts go to any CPU: %s", self.device.name, error.strerror)

    async def _suspend(self) -> bool:
        """Stop every queue where it stands. Returns whether that is known of all; the device goes on otherwise."""
        before, self.state = self.state, DeviceState.SUSPENDED
        stands = await asyncio.gather(*(vq.quiesce() for vq in self._vqs))
        if None not in stands:
            return True
        self.state = before
        for vq in self._vqs:
            self._go_on_when_kicked(vq)
        return False

    def _go_on_when_kicked(self, vq: VqControl) -> None:
        """Let a queue that was stopped by a question go on, should its driver do so."""
        if vq.state == VqState.STOPPED and self.device.status & VIRTIO_CONFIG_S_DRIVER_OK:
            vq.watch_kick(self._start_if_ready)

    async def _set_vq_ready(self, vq_index: int, ready: bool) -> bool:
        """Start or quiesce one queue. Returns whether there is such a queue: a refusal breaks the device for good, so
        that a queue that does not start is reported as failed instead.
        """
        if vq_index >= len(self._vqs):
            return False
        vq = self._vqs[vq_index]
        if not ready:
            await vq.quiesce()
        elif self.device.status & VIRTIO_CONFIG_S_DRIVER_OK and self.state != DeviceState.SUSPENDED:
            self._start_vq(vq, self._start_when_ready(vq))
        return True

    async def _start_when_ready(self, vq: VqControl) -> None:
        """Start a queue once the kernel has taken our answer: until then it drops the queue's interrupts."""
        asked = vq.stop_count
        for _ in range(READY_LOOK_COUNT):
            if vq.stop_count != asked or self._start_if_ready(vq):
                return
            await asyncio.sleep(READY_LOOK_S)
        vq.watch_kick(self._start_if_ready)

    def _start_if_ready(self, vq: VqControl) -> bool:
        """Start a queue that became ready after DRIVER_OK. Returns whether there is nothing (more) to wait for."""
        if vq.state == VqState.RUNNING or self.device.status == 0 or self.state == DeviceState.SUSPENDED:
            return True
        try:
            info = self.transport.vq_info(vq.index)
            acked_features = self.transport.acked_features()
        except OSError as error:  # the device is broken, which is reported through its messages
            _log.debug("device %s: queue %d: %s", self.device.name, vq.index, error.strerror)
            return True
        if info.in_use:
            vq.unwatch_kick()
            self._start_vq(vq, vq.start(acked_features, info))
        elif info.ready:  # it has no size yet: a kick tells when it has
            vq.watch_kick(self._start_if_ready)
        return info.ready


def _describe(
    vq: VqControl, worker: WorkerProcess | None, waiting_s: float, irq_cpu: int | None, *, runs: bool
) -> QueueInfo:
    """Return what is to be shown of a queue; the caller has read its worker once, as another thread may replace it.

    runs: whether the driver does.
    """
    unused = runs and vq.state == VqState.STOPPED and not vq.ring_size
    pid, engine = (worker.pid, worker.engine) if worker is not None else (-1, "")
    spec = vq.spec
    return QueueInfo(
        vq.index,
        pid,
        vq.ring_size,
        spec.cpu,
        engine,
        VqState.UNUSED if unused else vq.state,
        vq.reason,
        waiting_s=round(waiting_s, 1),
        restarts=vq.restart_count,
        irq_cpu=-1 if irq_cpu is None else irq_cpu,
        poll="never" if spec.poll_us == 0 else f"adaptive, {spec.poll_us} us" if spec.poll_us > 0 else "always",
        irq_hold=f"up to {spec.irq_delay_us} us" if spec.irq_delay_us else "none",
    )
