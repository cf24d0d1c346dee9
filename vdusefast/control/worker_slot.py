"""The place of one queue's worker: the present process, those that were killed and hang, and the spec of the next."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence

from vdusefast.base import build
from vdusefast.base.guard import Guard
from vdusefast.control.worker_cpu import WorkerCpu, move
from vdusefast.control.worker_process import Pages, RefusedError, WorkerCallbacks, WorkerProcess
from vdusefast.errors import TimedOutError, UpgradedError, VdusefastError, WorkerError
from vdusefast.transport import Transport
from vdusefast.worker.protocol import Command, ToWorker, WorkerSpec

RESIZE_S = 5.0  # for a worker to confirm a new size: it polls for commands between two rounds of its loop
FAIL_REAP_S = 1.0  # for a worker that is killed to fail its requests; a longer wait is for the kernel's storage

_log = logging.getLogger("vdusefast")


class WorkerSlot:
    """The workers of one queue, one after another. `process`, `spec` and `upgraded` may be read in any thread."""

    def __init__(
        self,
        spec: WorkerSpec,
        transport: Transport,
        pages: Pages,
        command: Sequence[str],
        guard: Guard,
        callbacks: WorkerCallbacks,
        before_spawn: Callable[[], None],
    ):
        """Begin without a worker. The arguments are those of VqControl and of WorkerProcess.spawn."""
        self.spec = spec
        self.command = list(command)
        self.process: WorkerProcess | None = None
        self.upgraded = ""  # why no worker can be started, as build.upgraded() has it
        self.where = f"device {spec.device}: queue {spec.queue}"
        self._cpu = WorkerCpu(self.where, spec.cpu)
        self._hanging: list[WorkerProcess] = []  # killed, waiting in the kernel for their storage
        self._unreaped: WorkerProcess | None = None  # killed by `give_up`, and not waited for
        self._transport = transport
        self._pages = pages
        self._guard = guard
        self._callbacks = callbacks
        self._before_spawn = before_spawn

    @property
    def usable(self) -> WorkerProcess | None:
        """The worker, if it can be sent a command."""
        process = self.process
        return process if process is not None and process.usable else None

    @property
    def hangs(self) -> bool:
        """Whether a process that was killed may still touch the driver's memory."""
        return any(worker is not None and worker.hung for worker in (self.process, *self._hanging))

    @property
    def missing_cpu(self) -> int:
        """The CPU that the worker belongs on and cannot be on now, -1 when there is none."""
        return self._cpu.missing

    # -- the CPU

    def pin(self, cpu: int, allowed: Collection[int]) -> None:
        """Have this worker and those after it run on `cpu`, as long as that is allowed; -1 = on any that is."""
        self._cpu.wanted = cpu
        self._move(allowed)

    def follow(self, allowed: Collection[int]) -> None:
        """Have a worker that was pinned, and those after it, where they belong, now that these CPUs are allowed."""
        if self._cpu.wanted >= 0:
            self._move(allowed)

    def _move(self, allowed: Collection[int]) -> None:
        cpu = self._cpu.choose(allowed)
        self.spec = self.spec._replace(cpu=cpu)
        if self.process is not None and self.process.alive:
            move(self.process, cpu, allowed)

    # -- start and end

    async def spawn(self, timeout_s: float) -> None:
        """Start a worker and wait until it is ready.

        Raises what WorkerProcess.wait_hello does; there is no worker then.
        """
        self._before_spawn()
        port = self._transport.worker_port(self.spec.queue)
        spec = self.spec._replace(
            port=port.kind,
            port_fd=port.port_fd,
            port_api=port.api_version,
            irq_fd=port.irq_fd,
            user_memory_fd=port.user_memory_fd,
            user_memory_bytes=port.user_memory_bytes,
        )
        worker = WorkerProcess.spawn(self.command, spec, port, self._pages, self._guard, self._callbacks)
        self.process = worker
        try:
            await worker.wait_hello(timeout_s)
        except BaseException:
            if worker.alive:
                worker.abort()  # the wait was cut short; the end of the queue reaps it
            else:
                self.process = None
            raise
        if self.spec.cpu != spec.cpu:  # moved meanwhile, and its own start has pinned it last
            self._move(os.sched_getaffinity(0))

    async def ensure(self, timeout_s: float) -> WorkerError | None:
        """Start a worker unless there is one, or one that hangs. Returns why it could not be started."""
        if self.process is not None and self.process.alive:
            return None
        try:
            await self.spawn(timeout_s)
        except (VdusefastError, OSError) as error:
            if upgraded := build.upgraded():
                self.upgraded = upgraded
                device = self.spec.device
                return UpgradedError(f"{self.where}: no new worker: {upgraded}: vdusefast restart {device}")
            return error if isinstance(error, WorkerError) else WorkerError(f"{self.where}: no new worker: {error}")
        self.upgraded = ""
        return None

    def abort(self, why: str = "") -> None:
        """Kill the worker without waiting for its end, which is then not reported as a death."""
        if self.process is not None:
            self.process.abort(why)

    async def kill(self) -> None:
        """Kill and reap the worker if there still is one. One that hangs in the kernel has been waited for already."""
        if self.process is not None:
            await self.process.kill()

    def give_up(self) -> None:
        """Kill the worker after an unexpected exception; `reap_given_up` waits for its end."""
        self.abort()
        self._unreaped = self.process

    async def reap_given_up(self) -> None:
        """Wait for the end of the worker that `give_up` has killed: only one that hangs in its storage stays."""
        worker, self._unreaped = self._unreaped, None
        if worker is not None:
            await worker.kill()

    async def kill_to_replace(self) -> WorkerError | None:
        """Kill the worker, whose place is then free even if it hangs. Returns an error for one that hangs.

        A process that has ended may still have storage I/O in the kernel. That uses memory that the kernel keeps, and
        is no error.
        """
        worker, error = self.process, None
        if worker is not None and not await worker.kill(timeout_s=FAIL_REAP_S):
            if worker.reaped:
                _log.warning("%s was killed; the kernel still waits for storage that it has asked", worker.title)
                worker.close()
            else:
                self._hanging.append(worker)
                error = WorkerError(f"{worker.title} waits in the kernel for its storage and cannot be killed")
        self.process = None
        return error

    async def resize(self, capacity_sectors: int) -> None:
        """Have the worker, and every one after it, serve a device of that size. Returns when it does.

        This does not wait for other operations on the queue, which may wait for storage: the worker carries out
        commands in turn. Raises TimedOutError for a worker that does not answer; it serves that size when it continues.
        """
        shrinks = capacity_sectors < self.spec.capacity_sectors
        self.spec = self.spec._replace(capacity_sectors=capacity_sectors)
        worker = self.usable
        if shrinks and self.hangs:  # what it was writing may still arrive
            raise TimedOutError(f"{self.where}: a worker hangs in its storage")
        if worker is None:
            return
        try:
            await worker.request(ToWorker(Command.RESIZE, 0, start=capacity_sectors), RESIZE_S)
        except TimeoutError:
            raise TimedOutError(
                f"{self.where}: the worker (pid {worker.pid}) has not taken the new size within {RESIZE_S:g} s: "
                "it waits for its storage"
            ) from None
        except RefusedError as error:
            raise WorkerError(f"{worker.title} refused the new size: {error}") from None
        except WorkerError:
            if worker.alive:
                raise
            # The next worker learns the size at its start.

    def close(self) -> None:
        """Close every descriptor; a second call does nothing."""
        for worker in (self.process, *self._hanging):
            if worker is not None:
                worker.close()
