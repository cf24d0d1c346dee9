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
from typing import Any

from vdusefast.control import WorkerSpec
from vdusefast.device import BlockDevice, StatusChange, StatusRefusedError
from vdusefast.errors import DeviceBusyError, TimedOutError, VdusefastError
from vdusefast.memory_control import MemoryControl
from vdusefast.queue_watch import LOOK_S, QueueWatch
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
from vdusefast.vq_control import Limits, VqControl, VqState
from vdusefast.worker_process import Pages, WorkerProcess, default_command

__all__ = ["DeviceState", "Limits", "QueueInfo", "Supervisor", "VqState"]

MESSAGES_A_TURN_MAX = 64
READY_LOOK_S = 0.001
READY_LOOK_COUNT = 1000
CONFIG_LOOK_S = 0.01
CONFIG_LOOK_COUNT = 1000
UNDO_TIMEOUT_S = 2.0  # for idle workers to end when the start fails
FORCE_GRACE_S = 2.0  # a forced stop lets requests end by themselves for so long before they are failed
LETTING_GO_S = 10.0  # for the driver's side to let go of the device once nothing of it is pending any more

_log = logging.getLogger("vdusefast")


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
    cpu: int
    engine: str
    state: VqState
    reason: str  # why it failed, "" otherwise
    waiting_s: float = 0.0  # for how long its storage has kept it waiting, 0.0 when it does not
    restarts: int = 0  # workers that had to be replaced
    irq_cpu: int = -1
    poll: str = ""  # how an idle worker waits: "adaptive, 50 us", "always", "never"
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
    ):
        """Prepare; see `start`.

        device: the model, whose status is kept there. transport: not yet created; consumed. pages: the shared pages
        (borrowed). specs: one a queue, complete but for `ctl_fd`, `kick_fd` and the port. command: what to run as a
        worker in place of the real one. on_created: called between the creation of the device and its attachment, for
        what has to be there should we die from then on. on_store_size: called in the loop when a worker has seen that
        the store has another size, in bytes. Raises ValueError when the limits do not leave room below the
        transport's msg_timeout.
        """
        limits = limits or Limits()
        if 0 < transport.msg_timeout_s <= limits.message_s:
            raise ValueError(f"a message may take {limits.message_s:g} s of the {transport.msg_timeout_s:g} s it has")
        self.device = device
        self.transport = transport
        self.state = DeviceState.CREATED
        self.failure: VdusefastError | None = None
        self._limits = limits
        self._on_created = on_created
        self._memory: MemoryControl | None = None
        self._watch = QueueWatch(device.name, pages, len(specs))
        self._tasks: set[asyncio.Task[Any]] = set()
        self._status_lock = asyncio.Lock()
        self._message_fd = -1
        self._stopping = False
        self._features_asked = False  # FEATURES_OK may have been asked for, and not been answered
        self._ended = asyncio.Event()
        self._refusal = ""  # why the driver and we could not agree, last time it tried
        self._refused = asyncio.Event()
        command = list(command) if command is not None else default_command()
        self._vqs: list[VqControl] = []
        resized = on_store_size or (lambda size_bytes: None)
        try:
            for spec in specs:
                self._vqs.append(VqControl(spec, transport, pages, command, limits, self._record, resized))
        except OSError:
            for vq in self._vqs:
                vq.close()
            raise

    async def start(self, timeout_s: float = 10.0, *, reopen: bool = False) -> None:
        """Create the device, start its workers side by side, and show it to drivers.

        reopen: take over a device that a supervisor before us has left, with its shared pages, and serve on.
        Raises VdusefastError: what a worker reported, TimedOutError when one is not ready after `timeout_s`,
        TransportError. Nothing is left behind then; a device that was to be taken over is left as it was found.
        """
        try:
            if reopen:
                self.transport.reopen(self.device.spec())
            else:
                self.transport.create(self.device.spec())
                if self._on_created is not None:
                    self._on_created()
            await self._spawn_all(timeout_s)
            if reopen:
                await self._go_on()
            self._message_fd = self.transport.message_fd()
            asyncio.get_running_loop().add_reader(self._message_fd, self._on_messages)
            self._run(self._watch_queues())
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
                vq.closing = True
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
        deadline = loop.time() + timeout_s
        try:
            await self._detach(min(timeout_s, FORCE_GRACE_S) if force else timeout_s)
            for vq in self._vqs:
                vq.closing = True
            left_s = max(deadline - loop.time(), min(timeout_s, UNDO_TIMEOUT_S))
            await asyncio.gather(*(vq.stop(left_s) for vq in self._vqs))
        finally:
            await self._end(keep=False)

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
            vq.pin(cpu)
        self.transport.irq_cpus = tuple(irq_cpus)
        self._place_irqs()

    @property
    def memory(self) -> str:
        """What requests' data lies in, for people."""
        return self._memory.text if self._memory is not None else self.transport.memory_text

    def queues(self) -> list[QueueInfo]:
        """Return one line for each queue."""
        now_s = time.monotonic()
        irq_cpus = dict(enumerate(self.transport.irq_cpus))
        return [
            _describe(vq, vq.worker, self._watch.waiting_s(vq.index, now_s), irq_cpus.get(vq.index)) for vq in self._vqs
        ]

    # -- inside

    async def _end(self, *, keep: bool) -> None:
        """Release everything; the device itself unless `keep`."""
        self._unwatch_messages()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(vq.kill() for vq in self._vqs))
        for vq in self._vqs:
            vq.close()
        try:
            self.transport.close(keep=keep)
        except VdusefastError as error:
            self._record(error)
        self.state = DeviceState.STOPPED
        self._ended.set()

    async def _go_on(self) -> None:
        """Serve the queues of a device that was taken over, from where their logs say. Raises VdusefastError."""
        self.device.status = self.transport.driver_status()
        if not self.device.status & VIRTIO_CONFIG_S_DRIVER_OK:
            # Its driver has yet to come, or has sent a message that waits for us: perhaps about these very features.
            self._features_asked = bool(self.device.status)
            return
        try:
            await self._driver_ok(recover=True)
        except StatusRefusedError as error:
            raise TransportError(f"device {self.device.name}: cannot go on with its driver: {error}") from None
        self.state = DeviceState.RUNNING

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
        detach = asyncio.create_task(self.transport.detach())
        done, _ = await asyncio.wait({detach}, timeout=grace_s)
        if not done:
            _log.warning("device %s: requests are still pending after %g s: failing them", self.device.name, grace_s)
            await asyncio.gather(*(vq.fail_pending() for vq in self._vqs))
            done, _ = await asyncio.wait({detach}, timeout=LETTING_GO_S)
        if not done:
            detach.cancel()
        try:
            await detach
        except asyncio.CancelledError:
            if done:
                raise
            why = f"its driver did not let go of it within {grace_s + LETTING_GO_S:g} s"
            self._record(TimedOutError(f"device {self.device.name}: {why}; the kernel keeps it until then"))
        except VdusefastError as error:
            self._record(error)

    async def _watch_queues(self) -> None:
        """Look every second which queues wait for their storage."""
        while True:
            await asyncio.sleep(LOOK_S)
            for vq in self._vqs:
                serves = vq.state not in (VqState.STOPPED, VqState.FAILED)
                self._watch.look(vq.index, time.monotonic(), serves=serves)

    def _use_memory(self) -> None:
        """Begin to put memory of ours in place of the kernel's, where the transport has any for it."""
        memory = self.transport.user_memory()
        if memory is not None:
            self._memory = MemoryControl(self.device.name, memory, self._vqs, self.transport.memory_text)
            self._run(self._memory.run())

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
        self._run(self._tell_config())

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

    def _record(self, error: VdusefastError) -> None:
        """Log a failure, and keep the first one."""
        _log.error("%s", error)
        if self.failure is None:
            self.failure = error

    def _run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
            if request is None:
                return
            self._run(self._handle(request))

    def _break(self, error: Exception) -> None:
        """The transport has given the device up: stop serving, so that nobody writes into memory taken back."""
        self._unwatch_messages()
        self.state = DeviceState.BROKEN
        self._record(error if isinstance(error, VdusefastError) else TransportError(f"{self.device.name}: {error}"))
        for vq in self._vqs:
            self._run(vq.reset())

    async def _handle(self, request: Request) -> None:
        """Answer one message."""
        try:
            response = await self._answer(request)
        except StatusRefusedError as error:
            _log.warning("device %s: %s: answered FAILED", self.device.name, error)
            self._refuse(str(error))
            response = Response(request.request_id, False)
        except Exception:
            _log.exception("device %s: %s: answered FAILED", self.device.name, request)
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

    async def _driver_ok(self, *, recover: bool = False) -> None:
        """Set every queue's kick eventfd and start the ready ones; those that are not yet are looked at with each kick.

        Waits shortly for the starts, which are quick unless a worker has to be replaced first: a worker starts late
        rather than the message is answered late. A queue that does not start has failed, and the others serve: the
        kernel's driver goes on whatever we answer, but would never be interrupted by a device that refused it.
        recover: the queues go on by their logs. Raises StatusRefusedError for features that were changed since they
        were accepted.
        """
        acked_features = self.transport.acked_features()
        self.device.judge_features(acked_features)
        self._place_irqs()
        starts = []
        for vq in self._vqs:
            info = self.transport.vq_info(vq.index)
            self.transport.set_kickfd(vq.index, vq.kick_fd)
            if info.ready:
                starts.append(self._run(vq.start(acked_features, info, recover=recover)))
            else:
                vq.watch_kick(self._start_if_ready)
        if starts:
            done, _late = await asyncio.wait(starts, timeout=self._limits.start_grace_s)
            if not all(start.result() for start in done):
                self._refuse("; ".join(vq.reason for vq in self._vqs if vq.state == VqState.FAILED))

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
            self._run(self._start_when_ready(vq))
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
        if info.ready:
            vq.unwatch_kick()
            self._run(vq.start(acked_features, info))
        return info.ready


def _describe(vq: VqControl, worker: WorkerProcess | None, waiting_s: float, irq_cpu: int | None) -> QueueInfo:
    """Return what is to be shown of a queue; the caller has read its worker once, as another thread may replace it."""
    pid, engine = (worker.pid, worker.engine) if worker is not None else (-1, "")
    spec = vq.spec
    return QueueInfo(
        vq.index,
        pid,
        spec.cpu,
        engine,
        vq.state,
        vq.reason,
        waiting_s=round(waiting_s, 1),
        restarts=vq.restart_count,
        irq_cpu=-1 if irq_cpu is None else irq_cpu,
        poll="never" if spec.poll_us == 0 else f"adaptive, {spec.poll_us} us" if spec.poll_us > 0 else "always",
        irq_hold=f"up to {spec.irq_delay_us} us" if spec.irq_delay_us else "none",
    )
