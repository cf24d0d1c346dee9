"""The control plane of one device: its start, its stop, its hand-over, and the parts that run in between.

messages.py answers the kernel, driver_control.py carries out the driver's steps, virtqueue.py looks after a worker.
Nothing here touches a ring or does storage I/O. The supervisor waits only for workers' replies, with a deadline, so
that messages are answered in time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from vdusefast.base.deadline import limit
from vdusefast.base.guard import Guard, Part
from vdusefast.base.time_limits import LETTING_GO_S
from vdusefast.control.device_model import BlockDevice
from vdusefast.control.device_resize import DeviceResize
from vdusefast.control.device_watch import DeviceWatch
from vdusefast.control.driver_control import DriverControl
from vdusefast.control.failures import Failures, PastFailure
from vdusefast.control.limits import Limits
from vdusefast.control.messages import Messages
from vdusefast.control.states import DeviceState, QueueInfo, queue_info
from vdusefast.control.user_memory_switch import MemoryControl
from vdusefast.control.virtqueue import VqCallbacks, VqControl
from vdusefast.control.worker_process import Pages, default_command
from vdusefast.control.write_back import WriteBack
from vdusefast.errors import DeviceBusyError, TimedOutError, VdusefastError
from vdusefast.transport import Transport, TransportError
from vdusefast.worker.protocol import WorkerSpec

UNDO_TIMEOUT_S = 2.0  # for idle workers to end when the start fails
FORCE_GRACE_S = 2.0  # a forced stop lets requests end by themselves for so long before they are failed

RECENT_S = 600.0  # a failure that was recovered from at once is shown for so long

_log = logging.getLogger("vdusefast")


class Supervisor:
    """One device and its workers.

    The coroutines run in one event loop; `failure`, `state` and `queues` may be used in any thread.
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
        files that must exist should we die from then on. on_store_size: called in the loop when a worker has seen that
        the store has another size, in bytes. write_back: whether the store's data is lost (borrowed). Raises ValueError
        when the limits do not leave room below the transport's msg_timeout.
        """
        self.device = device
        self.transport = transport
        self.loop: asyncio.AbstractEventLoop | None = None  # since `start`
        self._limits = limits or Limits()
        self._limits.check(transport.msg_timeout_s)
        self._failures = Failures()
        self._on_created = on_created
        self._memory: MemoryControl | None = None
        self._stopping = False
        self._ended = asyncio.Event()
        self._forced = asyncio.Event()
        self._deadline = 0.0  # of a stop
        self._guard = Guard(device.name, self.report)
        self._vqs: list[VqControl] = []
        self._driver = DriverControl(device, transport, self._vqs, self._limits, self._guard)
        self._make_vqs(pages, specs, command, on_store_size)
        self._messages = Messages(device, transport, self._vqs, self._driver, self._guard, self._failures)
        self._resize = DeviceResize(device, transport, self._vqs, self._guard, lambda: self._stopping)
        self._watch = DeviceWatch(
            device.name, pages, self._vqs, transport, self._guard, self._failures, write_back, self._place_irqs
        )

    async def start(self, timeout_s: float = 10.0, *, reopen: bool = False, whole: bool = False) -> None:
        """Create the device, start its workers side by side, and show it to drivers.

        reopen: adopt the device of a previous supervisor, with its shared pages. whole: not unless every queue can be
        served.
        Raises VdusefastError: what a worker reported, TimedOutError when one is not ready after `timeout_s`,
        TransportError. The device is removed then; a device that was to be adopted is left as it was found.
        """
        self.loop = asyncio.get_running_loop()
        for vq in self._vqs:
            vq.slot.follow(self._watch.allowed_cpus)
        try:
            if reopen:
                self.transport.reopen(self.device.spec())
            else:
                self.transport.create(self.device.spec())
                if self._on_created is not None:
                    self._on_created()
            await self._spawn_all(timeout_s)
            if reopen:
                await self._driver.adopt(whole)
            self._messages.watch()
            self._watch.begin()
            self._use_memory()
            await self._attach()
        except BaseException:
            undo = self.hand_over(UNDO_TIMEOUT_S) if reopen else self.stop(UNDO_TIMEOUT_S)
            await asyncio.shield(undo)  # if this is cut short again, the undoing continues
            raise
        if self.state == DeviceState.CREATED:
            self._driver.state = DeviceState.ATTACHED

    async def hand_over(self, timeout_s: float = 30.0) -> None:
        """Stop serving and leave the device as it is, for the next supervisor: its driver waits meanwhile.

        Messages that come stay unanswered until then. Workers finish what they have in flight; requests that one does
        not finish within `timeout_s` are in its log. A second call, or one after `stop`, does nothing.
        """
        if self._stopping:
            await self._ended.wait()
            return
        self._stopping = True
        self._messages.unwatch()
        try:
            await self._stop_queues(timeout_s)
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
            await self._stop_queues(max(self._deadline - loop.time(), min(timeout_s, UNDO_TIMEOUT_S)))
        finally:
            await self._end(keep=False)

    def force(self, timeout_s: float) -> None:
        """Make a `stop` that is under way one with `force`, which ends `timeout_s` from now at the latest."""
        self._deadline = min(self._deadline, asyncio.get_running_loop().time() + timeout_s)
        self._forced.set()

    async def resize(self, capacity_sectors: int) -> None:
        """Give the device another size while it runs: see `DeviceResize.resize`, which also says what it raises.

        Raises DeviceBusyError when the device is not served.
        """
        if self._stopping or self.state in (DeviceState.CREATED, DeviceState.BROKEN):
            raise DeviceBusyError(f"device {self.device.name} is {self.state}: it cannot be resized now")
        await self._resize.resize(capacity_sectors)

    async def show_capacity(self) -> None:
        """Show the driver the size that is served: a previous server may have ended amid a resize.

        Raises TransportError.
        """
        self._resize.show_capacity(self.device.capacity_sectors)

    async def place(self, cpus: Sequence[int], irq_cpus: Sequence[int | None]) -> None:
        """Move the workers and the interrupts to other CPUs, one a queue; -1 and None are none of their own."""
        for vq, cpu in zip(self._vqs, cpus, strict=True):
            vq.slot.pin(cpu, self._watch.allowed_cpus)
        self.transport.irq_cpus = tuple(irq_cpus)
        self._driver.place_irqs()

    @property
    def state(self) -> DeviceState:
        """The state of the device."""
        return self._driver.state

    @property
    def failure(self) -> VdusefastError | None:
        """What is wrong now: the failure that has lasted longest, None when all is well."""
        return self._failures.first or self._watch.store_failure

    @property
    def last_failure(self) -> PastFailure | None:
        """The failure that has ended last."""
        return self._failures.last

    @property
    def missing_cpus(self) -> str:
        """Which workers and interrupts are not on the CPU that they belong on, for people."""
        return self._watch.missing_cpus

    @property
    def memory(self) -> str:
        """The kind of memory that requests' data lies in, for people."""
        return self._memory.text if self._memory is not None else self.transport.memory_text

    @property
    def upgraded(self) -> str:
        """Why a queue has no worker and can get none, where the files are those of another build by now."""
        return next((vq.slot.upgraded for vq in self._vqs if vq.slot.upgraded), "")

    @property
    def vqs(self) -> tuple[VqControl, ...]:
        """The queues, for the loop's thread."""
        return tuple(self._vqs)

    def queues(self) -> list[QueueInfo]:
        """Return one line for each queue."""
        now_s = time.monotonic()
        irq_cpus = dict(enumerate(self.transport.irq_cpus))
        runs = self._driver.is_running
        return [
            queue_info(vq, vq.worker, self._watch.waiting_s(vq.index, now_s), irq_cpus.get(vq.index), driver_runs=runs)
            for vq in self._vqs
        ]

    def report(self, error: VdusefastError) -> None:
        """Log a failure that has been recovered from, and show it for a while. May be called in any thread."""
        self._failures.begin(error, type(error).__name__, RECENT_S)

    # -- inside

    def _make_vqs(
        self,
        pages: Pages,
        specs: Sequence[WorkerSpec],
        command: Sequence[str] | None,
        on_store_size: Callable[[int], None] | None,
    ) -> None:
        command = list(command) if command is not None else default_command()
        try:
            for spec in specs:
                self._vqs.append(self._make_vq(spec, pages, command, on_store_size or (lambda size_bytes: None)))
        except OSError:
            for vq in self._vqs:
                vq.close()
            raise

    def _make_vq(
        self, spec: WorkerSpec, pages: Pages, command: Sequence[str], on_store_size: Callable[[int], None]
    ) -> VqControl:
        key = f"queue {spec.queue}"
        callbacks = VqCallbacks(
            failed=lambda error: self._failures.begin(error, key),
            well=lambda: self._failures.end(key),
            store_size=on_store_size,
            before_spawn=lambda: self._watch.check_store(),
        )
        return VqControl(spec, self.transport, pages, command, self._limits, self._guard, callbacks)

    async def _spawn_all(self, timeout_s: float) -> None:
        """Start all workers; when one fails, take the others down and raise its error."""
        tasks = {asyncio.create_task(vq.slot.spawn(timeout_s)): vq for vq in self._vqs}
        try:
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError:
            done, waiting = set(), set(tasks)
            raise
        finally:
            # Not cancelled but killed: each task then sees to it that its process is reaped.
            for task in waiting:
                tasks[task].slot.abort()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    def _use_memory(self) -> None:
        """Begin to put user memory in place of the kernel's, where the transport has any for it."""
        memory = self.transport.user_memory()
        if memory is not None:
            self._memory = MemoryControl(self.device.name, memory, self._vqs, self.transport.memory_text)
            self._guard.task(Part.MEMORY, self._memory.run(), self._memory.give_up)

    def _place_irqs(self) -> None:
        """Send the interrupts of a driver that runs where they belong."""
        if self._driver.is_running:
            self._driver.place_irqs()

    async def _attach(self) -> None:
        """Show the device to drivers, and stop waiting soon after one has refused it. Raises what `attach` does."""
        attach = asyncio.create_task(self.transport.attach())
        refused = asyncio.create_task(self._driver.refused.wait())
        try:
            await asyncio.wait({attach, refused}, return_when=asyncio.FIRST_COMPLETED)
            if not attach.done():
                await asyncio.wait({attach}, timeout=UNDO_TIMEOUT_S)  # it may try again, with other features
            if not attach.done():
                raise TransportError(f"device {self.device.name}: its driver gave up: {self._driver.refusal}")
            attach.result()
        finally:
            for task in (attach, refused):
                task.cancel()
            await asyncio.gather(attach, refused, return_exceptions=True)

    async def _detach(self, grace_s: float) -> None:
        """Take the device from its driver, serving on meanwhile. Requests pending after `grace_s` are failed."""
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
            with suppress(TimeoutError):  # `detach` tells
                async with limit(grace_s):
                    await asyncio.wait({detach, forced}, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.wait({detach}, timeout=FORCE_GRACE_S)
        finally:
            forced.cancel()
        return detach.done()

    async def _stop_queues(self, timeout_s: float) -> None:
        """End all workers, side by side. From now on none is replaced."""
        for vq in self._vqs:
            vq.begin_close()
        await asyncio.gather(*(vq.stop(timeout_s) for vq in self._vqs))

    async def _end(self, *, keep: bool) -> None:
        """Release everything, in this order; the device itself unless `keep`."""
        self._messages.unwatch()
        await self._guard.close()
        await asyncio.gather(*(vq.slot.kill() for vq in self._vqs))
        self._watch.check_store()  # for the next server
        for vq in self._vqs:
            vq.close()
        try:
            self.transport.close(keep=keep)
        except VdusefastError as error:
            self._failures.begin(error)
        self._driver.state = DeviceState.STOPPED
        self._ended.set()
