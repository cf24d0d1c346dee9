"""Serve a block device from Python.

    config = make_config(name="vd0", uri="file:/srv/vd0.img", queues=2)
    with Device(config) as device, device.driver() as driver:
        driver.write(0, b"x" * 4096)
        print(device.stats().requests)

The commands use nothing else. The supervisor runs in a thread of its own, so that the caller is free to drive the
device.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from vdusefast.backends import Store, open_store
from vdusefast.config import Config, resolve_cpus, validate
from vdusefast.control import WorkerSpec
from vdusefast.device import BlockDevice
from vdusefast.errors import TimedOutError, VdusefastError
from vdusefast.run_dir import RunDirectory
from vdusefast.shm import SharedPages
from vdusefast.stats import DeviceStats, read_stats
from vdusefast.supervisor import LETTING_GO_S, DeviceState, Limits, QueueInfo, Supervisor
from vdusefast.transport import Transport
from vdusefast.transport.loopback import LoopbackBus, LoopbackTransport

if TYPE_CHECKING:
    from vdusefast.driver import LoopbackDriver

__all__ = ["Device", "DeviceState", "DeviceStats", "QueueInfo"]

START_TIMEOUT_S = 30.0  # a worker is there in milliseconds, but a busy machine may take its time
STOP_TIMEOUT_S = 30.0
# Beyond what the supervisor bounds by itself: killing, reaping and closing.
MARGIN_S = 30.0

_log = logging.getLogger("vdusefast")
_T = TypeVar("_T")


class Device:
    """One device: store, workers and the loop that looks after them, from `start` to `stop`. A context manager.

    A device is started once; another start needs another object. All methods may be called from any thread.
    """

    def __init__(
        self,
        config: Config,
        *,
        run_dir: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        worker_command: list[str] | None = None,
    ):
        """Check `config`; nothing is opened before `start`. The transport is loopback unless `kernel` is asked for.

        run_dir: where the directory of the device is made; None chooses as `run_dir.base_directory` does. limits: how
        long workers may take. worker_command: what to run in place of the real worker. Raises ConfigError.
        """
        self._warnings = validate(config)
        self.config = resolve_cpus(config)
        self.name = config.device.name
        self._run_dir = Path(run_dir) if run_dir is not None else None
        self._limits = limits
        self._worker_command = worker_command
        self._resources = ExitStack()
        self._lock = threading.Lock()  # one start or stop at a time
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport: Transport | None = None
        self._starting: Supervisor | None = None
        self._supervisor: Supervisor | None = None
        self._pages: SharedPages | None = None
        self._model: BlockDevice | None = None

    def __enter__(self) -> Device:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Open the store, start the workers and show the device to its driver.

        timeout_s: for the workers to be ready; a kernel device also has `attach_timeout_s` for its driver.
        Raises VdusefastError: ConfigError, BackendError, DeviceBusyError for the name or the store, TimedOutError,
        WorkerError, KernelSupportError, TransportError. Nothing is left behind then.
        """
        with self._lock:
            if self._supervisor is not None:
                raise VdusefastError(f"device {self.name} has been started already")
            for warning in self._warnings:
                _log.warning("%s", warning)
            try:
                self._start(timeout_s)
            except OSError as error:
                self._undo_start()
                raise VdusefastError(f"device {self.name}: cannot start: {error.strerror or error}") from error
            except BaseException:
                self._undo_start()
                raise

    def stop(self, timeout_s: float = STOP_TIMEOUT_S, *, force: bool = False) -> None:
        """Let the workers finish what they have in flight, then release everything. A second call does nothing.

        Requests that have not ended after `timeout_s` are failed, or soon with `force`; a worker that is not done by
        then is killed. `failure` names what did not go well.
        """
        with self._lock:
            supervisor, loop = self._supervisor, self._loop
            if supervisor is None or loop is None or loop.is_closed():
                return
            try:
                self._call(supervisor.stop(timeout_s, force=force), timeout_s + LETTING_GO_S + MARGIN_S)
            finally:
                self._resources.close()

    @property
    def state(self) -> DeviceState:
        """Where the device stands."""
        return self._supervisor.state if self._supervisor is not None else DeviceState.CREATED

    @property
    def failure(self) -> VdusefastError | None:
        """The first failure of a worker or of a ring; its message names device, queue, pid and cause."""
        return self._supervisor.failure if self._supervisor is not None else None

    @property
    def node(self) -> str:
        """The file by which the device is used, such as "/dev/vdb"; "" while no driver has it, and for loopback."""
        return self._transport.node if self._transport is not None else ""

    @property
    def bus(self) -> LoopbackBus:
        """The driver's way to the device. Raises VdusefastError unless the device runs on the loopback transport."""
        if not isinstance(self._transport, LoopbackTransport):
            raise VdusefastError(f"device {self.name} has no loopback bus: it has not been started")
        return self._transport.bus

    def driver(self) -> LoopbackDriver:
        """Return a new driver for this device: a context manager that negotiates and resets. Raises VdusefastError."""
        from vdusefast.driver import LoopbackDriver

        return LoopbackDriver(self.bus)

    def info(self) -> dict[str, Any]:
        """Return all that is to be shown of the device, as plain values. Raises as `stats`."""
        from vdusefast.describe import describe

        stats = self.stats()
        assert self._model is not None
        assert self._transport is not None
        return describe(self.config, self._model, self._transport, self.state, self.failure, stats)

    def responds(self, timeout_s: float) -> bool:
        """Return whether the loop that looks after the device answers within `timeout_s`; for watchdogs."""
        if self._loop is None:
            return False
        answered = threading.Event()
        try:
            self._loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # it has been closed
            return False
        return answered.wait(timeout_s)

    def queues(self) -> list[QueueInfo]:
        """Return one line for each queue; none before `start`."""
        return self._supervisor.queues() if self._supervisor is not None else []

    def stats(self) -> DeviceStats:
        """Return a copy of all counters and histograms. Raises VdusefastError unless the device has been started."""
        with self._lock:
            if self._pages is None or self._pages.fd < 0:
                raise VdusefastError(f"device {self.name} is not running: it has no counters")
            return read_stats(self.name, self._pages, self.queues())

    # -- inside

    def _start(self, timeout_s: float) -> None:
        device = self.config.device
        kind = "kernel" if device.transport == "kernel" else "loopback"
        directory = RunDirectory(self.name, self._run_dir, kind)
        self._resources.callback(directory.close)
        store = self._resources.enter_context(open_store(self.config.backend, read_only=device.read_only))
        model = self._model = BlockDevice(self.config, store)
        pages = SharedPages.create(directory.pages_path, self.name, device.queues, device.queue_size)
        self._pages = self._resources.enter_context(pages)
        self._transport = _make_transport(self.config)
        supervisor = Supervisor(
            model,
            self._transport,
            pages,
            worker_specs(self.config, model, store, pages),
            command=self._worker_command,
            limits=self._limits,
        )
        self._start_loop()
        self._starting = supervisor
        attach_s = device.attach_timeout_s if device.transport == "kernel" else 0
        self._call(supervisor.start(timeout_s), timeout_s + attach_s + MARGIN_S)
        self._supervisor = supervisor

    def _undo_start(self) -> None:
        """Release everything that a start which has failed, or was cut short at any point, has got."""
        try:
            if self._starting is not None:
                # Where the wait for its start was cut short, that cleans up by itself; this waits for it.
                self._call(self._starting.stop(), STOP_TIMEOUT_S + LETTING_GO_S + MARGIN_S)
        finally:
            self._starting = self._supervisor = None
            self._resources.close()

    def _start_loop(self) -> None:
        """Run an event loop in a thread that lives until the resources are released: the workers die with it."""
        loop = self._loop = asyncio.new_event_loop()

        thread = threading.Thread(target=_run_loop, args=(loop,), name=f"vdusefast-{self.name}", daemon=True)
        thread.start()

        def end() -> None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

        self._resources.callback(end)

    def _call(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Run a coroutine in the supervisor's loop and return its result. Raises TimedOutError, which means a bug."""
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            raise TimedOutError(f"device {self.name}: the supervisor did not answer within {timeout_s:g} s") from None
        finally:
            future.cancel()


def worker_specs(config: Config, device: BlockDevice, store: Store, pages: SharedPages) -> list[WorkerSpec]:
    """Return what each queue's worker is told; the supervisor fills in its own descriptors. Borrows store and pages."""
    return [
        WorkerSpec(
            device=device.name,
            queue=index,
            queue_size=device.queue_size,
            supervisor_pid=os.getpid(),
            ctl_fd=-1,
            shm_fd=pages.fd,
            kick_fd=-1,
            cpu=-1 if queue.cpu is None else queue.cpu,
            poll_us=queue.poll_us,
            irq_delay_us=queue.irq_delay_us,
            store=store.kind,
            store_fd=store.fd,
            engine=config.backend.engine,
            cache=config.backend.cache,
            direct_align=store.direct_align,
            capacity_sectors=device.capacity_sectors,
            block_size=device.block_size_bytes,
            read_only=int(device.read_only),
            seg_max=device.seg_max,
            discard_max_sectors=device.discard_max_sectors,
            discard_max_seg=device.discard_max_seg,
            write_zeroes_max_sectors=device.write_zeroes_max_sectors,
            write_zeroes_max_seg=device.write_zeroes_max_seg,
            serial=device.serial,
        )
        for index, queue in enumerate(config.queue)
    ]


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run `loop` until it is stopped, let what is left in it clean up, and close it."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _make_transport(config: Config) -> Transport:
    device = config.device
    if device.transport != "kernel":
        return LoopbackTransport()
    from vdusefast.transport.kernel import KernelOptions, KernelTransport

    return KernelTransport(
        KernelOptions(
            bus=device.bus,
            msg_timeout_s=device.msg_timeout_s,
            bounce_size_bytes=device.bounce_size_bytes,
            attach_timeout_s=device.attach_timeout_s,
            irq_cpus=tuple(queue.irq_cpu for queue in config.queue),
        )
    )
