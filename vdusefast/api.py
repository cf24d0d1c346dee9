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

from vdusefast import left, saved_state
from vdusefast.assembly import make_relay, make_transport, open_device_store, worker_specs
from vdusefast.backends import SECTOR_BYTES, Store, look_again
from vdusefast.config import Config, override, resolve_cpus, validate
from vdusefast.device import BlockDevice
from vdusefast.errors import DeviceBusyError, DeviceNotFoundError, TimedOutError, VdusefastError
from vdusefast.placement import Placement, foresee, observe
from vdusefast.resize import choose_bytes, present_bytes, set_bytes
from vdusefast.run_dir import RunDirectory
from vdusefast.saved_state import SavedState
from vdusefast.shm import SharedPages
from vdusefast.stats import DeviceStats, read_stats
from vdusefast.supervisor import LETTING_GO_S, DeviceState, Limits, QueueInfo, Supervisor
from vdusefast.transport import Transport
from vdusefast.transport.loopback import LoopbackBus, LoopbackTransport

if TYPE_CHECKING:
    from vdusefast.driver import LoopbackDriver
    from vdusefast.relay_control import RelayControl

__all__ = ["Device", "DeviceState", "DeviceStats", "QueueInfo"]

START_TIMEOUT_S = 30.0  # a worker is there in milliseconds, but a busy machine may take its time
STOP_TIMEOUT_S = 30.0
RESIZE_TIMEOUT_S = 40.0  # the workers' own limit, there and back, and what a busy machine takes
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
        transport: Transport | None = None,
    ):
        """Check `config`; nothing is opened before `start`. The transport is loopback unless `kernel` is asked for.

        run_dir: where the directory of the device is made; None chooses as `run_dir.base_directory` does. limits: how
        long workers may take. worker_command: what to run in place of the real worker. transport: in place of the
        configured one; consumed. Raises ConfigError.
        """
        self._warnings = validate(config)
        self.config = resolve_cpus(config)
        self.name = config.device.name
        self._run_dir = Path(run_dir) if run_dir is not None else None
        self._limits = limits
        self._worker_command = worker_command
        self._resources = ExitStack()
        self._lock = threading.Lock()  # one start or stop at a time
        self._resizing = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport = transport
        self._kind = transport.kind if transport else "kernel" if config.device.transport == "kernel" else "loopback"
        self._directory: RunDirectory | None = None
        self._keep = False  # the run directory, for whoever goes on with the device
        self._state: SavedState | None = None  # that of a device that was left, while it is taken over
        self._starting: Supervisor | None = None
        self._supervisor: Supervisor | None = None
        self._pages: SharedPages | None = None
        self._model: BlockDevice | None = None
        self._placement: Placement | None = None
        self._store: Store | None = None
        self._relay: RelayControl | None = None

    def __enter__(self) -> Device:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(
        self, timeout_s: float = START_TIMEOUT_S, *, recover: bool | None = None, fail_requests: bool = False
    ) -> None:
        """Open the store, start the workers and show the device to its driver.

        timeout_s: for the workers to be ready; a kernel device also has `attach_timeout_s` for its driver. recover:
        whether to go on with the device that a server which has ended left; None: if there is one. fail_requests: such
        a device's store is not opened, and all requests are answered with IOERR, so that it can be removed.
        Raises VdusefastError: ConfigError, also for a device that was left and is another than the configured one,
        BackendError, DeviceBusyError for the name or the store, DeviceNotFoundError with nothing to go on with,
        TimedOutError, WorkerError, KernelSupportError, TransportError. Nothing is left behind then, and a device that
        was to be taken over is left as it was.
        """
        with self._lock:
            if self._supervisor is not None:
                raise VdusefastError(f"device {self.name} has been started already")
            for warning in self._warnings:
                _log.warning("%s", warning)
            try:
                self._start(timeout_s, recover, fail_requests)
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
                # A device that its driver does not let go of can still be taken over, and removed then.
                self._keep = self._kind == "kernel" and left.is_attached(self.name)
                self._release()

    def hand_over(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Let the workers finish what they have in flight, and leave the device to the next server.

        As `stop`, but the device stays in the kernel, where requests wait, and its run directory stays for the `start`
        of another object or process. What has not ended after `timeout_s` is left to that, too.
        """
        with self._lock:
            supervisor, loop = self._supervisor, self._loop
            if supervisor is None or loop is None or loop.is_closed():
                return
            self._keep = True
            try:
                self._call(supervisor.hand_over(timeout_s), timeout_s + MARGIN_S)
            finally:
                self._release()

    def resize(self, size_bytes: int | None = None, *, force: bool = False) -> int:
        """Change the size of the device while it is used; its driver is told. Returns the size in bytes.

        size_bytes: a file is made that long, by a hole at its end; None for what the store has now, as after
        lvextend. force: also when that is less, and what lies behind is lost. Raises VdusefastError: ConfigError for
        a size that cannot be, DeviceBusyError, BackendError, TimedOutError when a worker hangs in its storage.
        """
        if not self._resizing.acquire(blocking=False):
            raise DeviceBusyError(f"device {self.name} is being resized or stopped")
        try:
            supervisor, store, loop = self._supervisor, self._store, self._loop
            if supervisor is None or store is None or loop is None or loop.is_closed():
                raise VdusefastError(f"device {self.name} is not running: it cannot be resized")
            look_again(store)
            self._resize(supervisor, store, size_bytes, force)
            return store.size_bytes
        finally:
            self._resizing.release()

    @property
    def recovered(self) -> bool:
        """Whether the device was taken over from a server before, or is to be."""
        return self._state is not None

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
        assert self._placement is not None
        relay_pid = self._relay.pid if self._relay is not None else 0
        memory = self._supervisor.memory if self._supervisor is not None else self._transport.memory_text
        described = describe(
            self.config, self._model, self._transport, self.state, self.failure, stats, memory, self._placement
        )
        return described | {"relay_pid": relay_pid}  # of the one process that has the store for all queues, 0: none

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

    def _start(self, timeout_s: float, recover: bool | None, fail_requests: bool) -> None:
        device = self.config.device
        directory = self._directory = RunDirectory(self.name, self._run_dir)
        self._keep = True  # until it is known that nobody needs what is in it
        self._resources.callback(self._leave_directory, directory)
        try:
            state = self._state = left.choose(directory, self.config, self._kind, recover)
        except DeviceNotFoundError:
            self._keep = False
            raise
        self._keep = state is not None
        if state is None:
            directory.note_transport(self._kind)
        store = self._store = self._resources.enter_context(
            open_device_store(self.config, state, fail_requests=fail_requests)
        )
        model = self._model = BlockDevice(self.config, store)
        if state is not None:
            saved_state.adopt(state, model, checked=not fail_requests)
        pages = (SharedPages.create if state is None else SharedPages.reopen)(
            directory.pages_path, self.name, device.queues, device.effective_queue_size
        )
        self._pages = self._resources.enter_context(pages)
        placement = self._placement = foresee(self.config)
        placed = placement.apply(self.config)
        self._transport = self._transport or make_transport(placed, state)
        if store.spec is not None:
            store.spec = store.spec._replace(notes_fd=directory.open_store_notes())
            self._resources.callback(os.close, store.spec.notes_fd)
        relay = None if fail_requests else make_relay(placed, model, store, directory.path, self._follow_store)
        if relay is not None:
            self._resources.callback(relay.close)
        specs = worker_specs(placed, model, store, pages, relay)
        supervisor = Supervisor(
            model,
            self._transport,
            pages,
            [spec._replace(engine="fail") for spec in specs] if fail_requests else specs,
            command=self._worker_command,
            limits=self._limits,
            on_created=self._save_state,
            on_store_size=self._follow_store,
        )
        loop = self._start_loop()
        if relay is not None:
            self._relay = relay
            self._resources.callback(lambda: self._call(relay.stop(), MARGIN_S))  # behind the workers
            loop.call_soon_threadsafe(relay.start)
        self._starting = supervisor
        attach_s = device.attach_timeout_s if device.transport == "kernel" else 0
        self._call(supervisor.start(timeout_s, reopen=state is not None), timeout_s + attach_s + MARGIN_S)
        self._supervisor = supervisor
        self._place(supervisor, placement)
        if state is not None and state.resizing:
            self._call(supervisor.show_capacity(), MARGIN_S)
        if state is not None and not fail_requests:
            self._save_state()  # the configuration may be a new one

    def _place(self, supervisor: Supervisor, foreseen: Placement) -> None:
        """Look where the kernel's requests really come from, and move what was placed by another assumption."""
        placement = self._placement = observe(self.config, self.node) or foreseen
        if (placement.cpus, placement.irq_cpus) != (foreseen.cpus, foreseen.irq_cpus):
            self._call(supervisor.place(placement.cpus, placement.irq_cpus), MARGIN_S)

    def _save_state(self) -> None:
        """Write down what the next server needs to know. Raises VdusefastError."""
        assert self._directory is not None
        assert self._model is not None
        assert self._transport is not None
        described = self._store.described if self._store is not None else None
        state = saved_state.make_state(self.config, self._model.spec(), self._transport, described)
        saved_state.save(self._directory.state_path, state)

    def _note_size(self, size_bytes: int, config: Config, *, resizing: bool) -> None:
        """Change the size in what the next server is told. Raises VdusefastError."""
        if self._directory is not None:
            path = self._directory.state_path
            saved_state.note_size(path, size_bytes // SECTOR_BYTES, config, resizing=resizing)

    def _leave_directory(self, directory: RunDirectory) -> None:
        if self._keep:
            directory.release()
        else:
            directory.close()

    def _release(self) -> None:
        """Release everything, once the workers have ended."""
        with self._resizing:  # which ends with the workers, and needs the store until then
            self._resources.close()

    def _resize(self, supervisor: Supervisor, store: Store, wanted_bytes: int | None, force: bool) -> None:
        """Change store and device in the order in which what the driver sees is always there."""
        model = supervisor.device
        before_bytes, present = model.capacity_sectors * SECTOR_BYTES, present_bytes(store)
        size_bytes = choose_bytes(store, before_bytes, model.block_size_bytes, wanted_bytes, force=force)
        config = override(self.config, uri=f"null:{size_bytes}") if store.kind == "null" else self.config
        grows = size_bytes >= before_bytes
        # Whatever is interrupted here, the server that goes on finds a store at least as large as it is told, serves at
        # least what the driver has been shown, and then shows it just that.
        try:
            if size_bytes > present:
                set_bytes(store, size_bytes)
            self._note_size(*(size_bytes, config) if grows else (before_bytes, self.config), resizing=True)
            self._call(supervisor.resize(size_bytes // SECTOR_BYTES), RESIZE_TIMEOUT_S)
        except BaseException:
            if grows:
                self._note_size(before_bytes, self.config, resizing=False)
            if size_bytes > present:
                set_bytes(store, present)
            raise
        self._note_size(size_bytes, config, resizing=False)
        set_bytes(store, size_bytes)
        self.config = config
        _log.info("device %s: resized from %d to %d bytes", self.name, before_bytes, size_bytes)

    def _follow_store(self, size_bytes: int) -> None:
        """Give the device the size that its store has been given by its own means; in the loop, so in a thread."""
        store = self._store
        if store is not None and store.present_size_bytes != size_bytes:
            store.present_size_bytes = size_bytes
            threading.Thread(target=self._follow, name=f"vdusefast-{self.name}-resize", daemon=True).start()

    def _follow(self) -> None:
        with self._resizing:
            supervisor, store, loop = self._supervisor, self._store, self._loop
            if supervisor is None or store is None or loop is None or loop.is_closed():
                return
            if supervisor.device.capacity_sectors * SECTOR_BYTES == store.present_size_bytes:
                return  # another thread came first
            try:
                self._resize(supervisor, store, None, True)
            except VdusefastError as error:
                _log.warning(
                    "device %s: its store has %d bytes now, which it does not follow: %s; again: vdusefast resize %s",
                    *(self.name, store.present_size_bytes, error, self.name),
                )

    def _undo_start(self) -> None:
        """Release everything that a start which has failed, or was cut short at any point, has got."""
        try:
            if self._starting is not None:
                # Where the wait for its start was cut short, that cleans up by itself; this waits for it.
                undo = self._starting.stop() if self._state is None else self._starting.hand_over()
                self._call(undo, STOP_TIMEOUT_S + LETTING_GO_S + MARGIN_S)
        finally:
            self._starting = self._supervisor = None
            self._resources.close()

    def _start_loop(self) -> asyncio.AbstractEventLoop:
        """Run an event loop in a thread that lives until the resources are released: the workers die with it."""
        loop = self._loop = asyncio.new_event_loop()

        thread = threading.Thread(target=_run_loop, args=(loop,), name=f"vdusefast-{self.name}", daemon=True)
        thread.start()

        def end() -> None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

        self._resources.callback(end)
        return loop

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
