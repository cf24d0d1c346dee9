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
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from vdusefast.backends import Store, look_again
from vdusefast.base import logs, start_mode, time_limits
from vdusefast.base.guard import Guard, Part
from vdusefast.base.start_mode import StartMode
from vdusefast.base.time_limits import MARGIN_S, RESIZE_TIMEOUT_S, START_TIMEOUT_S, STOP_TIMEOUT_S
from vdusefast.config import Config, check_cpus, override, resolve_cpus, validate
from vdusefast.control.assembly import make_keeper, make_relay, make_transport, open_device_store, worker_specs
from vdusefast.control.device_model import BlockDevice, find_emulated
from vdusefast.control.failures import PastFailure
from vdusefast.control.placement import Placement, foresee, observe
from vdusefast.control.resize import choose_bytes, present_bytes, refuse_other, set_bytes
from vdusefast.control.stats import DeviceStats, read_stats
from vdusefast.control.supervisor import DeviceState, Limits, QueueInfo, Supervisor
from vdusefast.control.write_back import WriteBack
from vdusefast.errors import DeviceBusyError, DeviceNotFoundError, TimedOutError, VdusefastError
from vdusefast.host import reclaim, run_dirs
from vdusefast.state import orphans, pages_upgrade, saved_state
from vdusefast.state.run_dir import RunDirectory
from vdusefast.state.saved_state import SavedState
from vdusefast.state.shared_pages import SharedPages
from vdusefast.transport import Transport, TransportError
from vdusefast.transport.loopback import LoopbackBus, LoopbackTransport
from vdusefast.units import SECTOR_BYTES

if TYPE_CHECKING:
    from vdusefast.control.relay_control import RelayControl
    from vdusefast.driver.loopback_driver import LoopbackDriver

__all__ = ["Device", "DeviceState", "DeviceStats", "QueueInfo"]

_log = logging.getLogger("vdusefast")
logs.make_safe()
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

        run_dir: where the directory of the device is made; None chooses as `run_dirs.base_directory` does. limits: how
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
        self._kind = transport.kind if transport else config.device.transport.resolved
        self._directory: RunDirectory | None = None
        self._keep = False  # the run directory, for whoever goes on with the device
        self._state: SavedState | None = None  # that of a device that was left, while it is taken over
        self._starting: Supervisor | None = None
        self._supervisor: Supervisor | None = None
        self._pages: SharedPages | None = None
        self._model: BlockDevice | None = None
        self._placement: Placement | None = None
        self._store: Store | None = None
        self._emulated: list[str] = []  # what the driver was shown, and the store is not
        self._relay: RelayControl | None = None
        self._write_back: WriteBack | None = None

    def __enter__(self) -> Device:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(
        self,
        timeout_s: float = START_TIMEOUT_S,
        *,
        mode: StartMode | None = None,
        recover: bool | None = None,
        fail_requests: bool = False,
        claim: bool = False,
        forgive: bool = False,
    ) -> None:
        """Open the store, start the workers and show the device to its driver.

        timeout_s: for the workers to be ready; a kernel device also has `attach_timeout_s` for its driver. mode: a new
        device, or which one that was there before; None: as the keywords after it say. recover: True adopts an orphan,
        False creates a device, None does what there is. fail_requests: an orphan's store is not opened, and all
        requests are answered with IOERR, so that it can be removed. claim: adopt a device of the kernel whose run
        directory is lost, if it is as configured and nothing is in flight. forgive: as `forgive_store`, for an orphan.
        Raises VdusefastError: ConfigError, also for a device that was left and is another than the configured one,
        BackendError, DeviceBusyError for the name or the store, DeviceNotFoundError with nothing to go on with,
        TimedOutError, WorkerError, KernelSupportError, TransportError. Nothing is left behind then, and a device that
        was to be taken over is left as it was.
        """
        mode = mode or start_mode.of_flags(recover=recover, fail_requests=fail_requests, claim=claim)
        with self._lock:
            if self._supervisor is not None:
                raise VdusefastError(f"device {self.name} has been started already")
            for warning in self._warnings:
                _log.warning("%s", warning)
            try:
                self._start(timeout_s, mode, forgive or mode.forgives)
            except OSError as error:
                self._undo_start()
                raise VdusefastError(f"device {self.name}: cannot start: {error.strerror or error}") from error
            except BaseException:
                self._undo_start()
                raise

    def prove(self, timeout_s: float = START_TIMEOUT_S, *, look: bool = True) -> None:
        """Show that `start` could take the device over from the server that it has now, which serves on undisturbed.

        look: also ask a plugin's store, which may take one client only, or be away. Raises as `start` does.
        """
        from vdusefast.control.proof import prove

        try:
            prove(
                self.config,
                (self._run_dir or run_dirs.required_base()) / self.name,
                self._transport,
                timeout_s=timeout_s,
                look=look,
                command=self._worker_command,
                limits=self._limits,
            )
        except OSError as error:
            raise VdusefastError(f"device {self.name}: could not start: {error.strerror or error}") from error

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
                self._call(supervisor.stop(timeout_s, force=force), time_limits.stop_s(timeout_s))
            finally:
                # A device that its driver does not let go of can still be taken over, and removed then.
                self._keep = self._kind == "kernel" and orphans.is_attached(self.name)
                self._release()

    def force(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Make a `stop` that another thread waits in one with `force`, and let it take `timeout_s` at most from now."""
        supervisor, loop = self._supervisor, self._loop
        if supervisor is not None and loop is not None and not loop.is_closed():
            with suppress(RuntimeError):  # it has just been closed: the stop is over
                loop.call_soon_threadsafe(supervisor.force, timeout_s)

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
                self._call(supervisor.hand_over(timeout_s), time_limits.hand_over_s(timeout_s))
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
            refuse_other(store)
            self._resize(supervisor, store, size_bytes, force)
            return store.size_bytes
        finally:
            self._resizing.release()

    def forgive_store(self) -> None:
        """Have flushes be carried out again that fail since the store has lost data, as nobody else will ask.

        What was lost stays lost: whoever uses the device has to check it. Raises VdusefastError unless it is running.
        """
        with self._lock:
            if self._write_back is None or self._pages is None or self._pages.fd < 0:
                raise VdusefastError(f"device {self.name} is not running")
            if self._pages.flush_failure() is None:
                raise VdusefastError(f"device {self.name}: its store has not failed")
            self._write_back.forgive()
            _log.warning("device %s: an operator says that its store is well: it is flushed again", self.name)

    @property
    def recovered(self) -> bool:
        """Whether the device was taken over from a server before, or is to be."""
        return self._state is not None

    @property
    def outlives_server(self) -> bool:
        """Whether another server can go on with the device when this one ends. Known once it has been started."""
        transport_keeps = self._kind == "kernel" if self._transport is None else self._transport.keeps
        return transport_keeps and (self._store is None or self._store.persistent)

    @property
    def supervisor(self) -> Supervisor | None:
        """The control plane in this process, None while the device is not served. For tests and tools."""
        return self._supervisor

    @property
    def state(self) -> DeviceState:
        """Where the device stands."""
        return self._supervisor.state if self._supervisor is not None else DeviceState.CREATED

    @property
    def failure(self) -> VdusefastError | None:
        """What is wrong now, None when all is well; its message names device, queue, pid and cause, and what to do."""
        return self._supervisor.failure if self._supervisor is not None else None

    @property
    def upgraded(self) -> str:
        """Why only a new server can serve all of the device: files of another build; "" where this one can."""
        relay = self._relay.upgraded if self._relay is not None else ""
        return relay or (self._supervisor.upgraded if self._supervisor is not None else "")

    @property
    def last_failure(self) -> PastFailure | None:
        """The failure that has ended last, with its times; None when there was none."""
        return self._supervisor.last_failure if self._supervisor is not None else None

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
        from vdusefast.driver.loopback_driver import LoopbackDriver

        return LoopbackDriver(self.bus)

    def info(self) -> dict[str, Any]:
        """Return all that is to be shown of the device, as plain values. Raises as `stats`."""
        from vdusefast.control.device_info import describe

        stats = self.stats()
        assert self._model is not None
        assert self._transport is not None
        assert self._placement is not None
        relay_pid = self._relay.pid if self._relay is not None else 0
        memory = self._supervisor.memory if self._supervisor is not None else self._transport.memory_text
        described = describe(
            self.config,
            self._model,
            self._transport,
            self.state,
            self.failure,
            self.last_failure,
            stats,
            memory,
            self._placement,
        )
        pids = [*(queue.pid for queue in self.queues()), relay_pid]
        return described | {
            "emulated": self._emulated,
            "notes": self._store.notes if self._store is not None else [],
            "missing_cpus": self._supervisor.missing_cpus if self._supervisor is not None else "",
            "relay_pid": relay_pid,  # of the one process that has the store for all queues, 0: none
            "reclaim": reclaim.describe(pids) if self.config.device.locks_memory else "",
        }

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

    def _start(self, timeout_s: float, mode: StartMode, forgive: bool) -> None:
        fail_requests, claim = mode.fails_requests, mode.claims
        directory = self._directory = RunDirectory(self.name, self._run_dir)
        self._keep = True  # until it is known that nobody needs what is in it
        self._resources.callback(self._leave_directory, directory)
        try:
            state = self._state = self._choose(directory, mode)
        except DeviceNotFoundError:
            self._keep = False
            raise
        self._keep = state is not None
        if state is None:
            check_cpus(self.config)
            directory.note_transport(self._kind)
        else:
            self.config = saved_state.as_made(state, self.config)
        device = self.config.device
        store = self._store = self._resources.enter_context(
            open_device_store(self.config, state, fail_requests=fail_requests, is_new=state is None and not claim)
        )
        for note in store.notes:
            _log.warning("device %s: %s", self.name, note)
        model = self._model = BlockDevice(self.config, store, None if state is None else state.shown)
        if claim:
            from vdusefast.state import claim as claiming

            state = self._state = claiming.make_state(self.config, model, any_driver=fail_requests)
        elif state is not None and not fail_requests:
            saved_state.check_shown(state, store)
        self._note_emulated(model, store)
        pages = (SharedPages.create if state is None or claim else pages_upgrade.reopen)(
            directory.pages_path, self.name, device.queues, device.effective_queue_size
        )
        self._pages = self._resources.enter_context(pages)
        if claim and not fail_requests:
            for index in range(device.queues):
                pages.disown_log(index)
        placement = self._placement = foresee(self.config)
        placed = placement.apply(self.config)
        self._transport = self._transport or make_transport(placed, state)
        if store.spec is not None:
            from vdusefast.backends.plugin import NOTES_BYTES

            store.spec = store.spec._replace(notes_fd=directory.open_store_notes(device.queues * NOTES_BYTES))
            self._resources.callback(os.close, store.spec.notes_fd)
        write_back = self._write_back = WriteBack(self.name, pages, store, device.queues)
        self._resources.callback(write_back.close)
        write_back.begin(is_left=state is not None, forgive=forgive)
        keeper = None
        if not fail_requests:
            keeper = make_keeper(model, store, directory.path, self._report, adopt=state is not None)
        if keeper is not None:
            self._resources.callback(lambda: keeper.close(keep=self._keep))
        relay = None
        if not fail_requests:
            callbacks = (self._follow_store, self._report)
            relay = make_relay(placed, model, store, directory.path, *callbacks, keeper)
        if relay is not None:
            self._resources.callback(relay.close)
        specs = worker_specs(placed, model, store, pages, relay, write_back.queue_fds, keeper)
        supervisor = Supervisor(
            model,
            self._transport,
            pages,
            [spec._replace(engine="fail") for spec in specs] if fail_requests else specs,
            command=self._worker_command,
            limits=self._limits,
            on_created=self._save_state,
            on_store_size=self._follow_store,
            write_back=write_back,
        )
        loop = self._start_loop()
        if keeper is not None:
            self._resources.callback(loop.call_soon_threadsafe, keeper.unwatch)
            loop.call_soon_threadsafe(keeper.watch)
        if relay is not None:
            self._relay = relay
            self._resources.callback(lambda: self._call(relay.stop(), MARGIN_S))  # behind the workers
            loop.call_soon_threadsafe(relay.start)
        self._starting = supervisor
        attach_s = device.attach_timeout_s if device.is_in_kernel else 0
        whole = claim and not fail_requests
        if whole:
            self._save_state()  # whatever becomes of us: from now on the pages say what is in flight
        try:
            start = supervisor.start(timeout_s, reopen=state is not None, whole=whole)
            self._call(start, timeout_s + attach_s + MARGIN_S)
        except TransportError as error:
            if not whole:
                raise
            from vdusefast.state import claim as claiming

            raise TransportError(claiming.unclean_text(self.name, str(error))) from None
        self._supervisor = supervisor
        self._place(supervisor, placement)
        if state is not None and state.resizing:
            self._call(supervisor.show_capacity(), MARGIN_S)
        if state is not None and not fail_requests:
            try:
                self._save_state()  # the configuration may be a new one
            except VdusefastError as error:
                # What is written there still tells how the device was made.
                _log.warning("%s; the next server takes the configuration of the last one", error)

    def _note_emulated(self, model: BlockDevice, store: Store) -> None:
        """Say once what is made up for."""
        self._emulated = find_emulated(model.config_space, store, self.config.backend)
        for text in self._emulated:
            _log.warning("device %s: emulates %s", self.name, text)

    def _choose(self, directory: RunDirectory, mode: StartMode) -> SavedState | None:
        """Return the state of the device that is to be taken over, None for a new one, or one that is claimed."""
        if not mode.claims:
            return orphans.choose(directory, self.config, self._kind, mode)
        from vdusefast.state import claim as claiming

        self._keep = directory.state_path.exists()
        claiming.check(directory, any_driver=mode.fails_requests)
        return None

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
        assert self._store is not None
        described, identity = self._store.described, self._store.identity
        state = saved_state.make_state(self.config, self._model.spec(), self._transport, described, identity)
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
        config = override(self.config, uri=f"null:{size_bytes}") if store.is_null else self.config
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

    def _report(self, error: VdusefastError) -> None:
        """Make a failure beside the supervisor's own visible. May be called in any thread."""
        supervisor = self._supervisor or self._starting
        if supervisor is not None:
            supervisor.report(error)
        else:
            _log.error("%s", error)

    def _follow_store(self, size_bytes: int) -> None:
        """Give the device the size that its store has been given by its own means; in the loop, so in a thread."""
        store = self._store
        if store is not None and store.present_size_bytes != size_bytes:
            store.present_size_bytes = size_bytes
            guard = Guard(self.name, self._report)
            thread = threading.Thread(
                target=guard.call, args=(Part.RESIZE, self._follow), name=f"vdusefast-{self.name}-resize", daemon=True
            )
            thread.start()

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
                self._call(undo, time_limits.undo_s())
        finally:
            self._starting = self._supervisor = None
            self._resources.close()

    def _start_loop(self) -> asyncio.AbstractEventLoop:
        """Run an event loop in a thread that lives until the resources are released: the workers die with it."""
        loop = self._loop = asyncio.new_event_loop()

        guard, ending = Guard(self.name, self._report), threading.Event()
        thread = threading.Thread(
            target=_run_loop, args=(loop, guard, ending), name=f"vdusefast-{self.name}", daemon=True
        )
        if self.config.device.locks_memory:
            loop.call_soon(_mark_io_flusher)  # first of all: workers inherit it
        thread.start()

        def end() -> None:
            ending.set()
            loop.call_soon_threadsafe(loop.stop)
            thread.join(MARGIN_S)
            if thread.is_alive():
                _log.error("device %s: its loop does not end: something in it waits for the kernel", self.name)

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


def _mark_io_flusher() -> None:
    """Mark this thread, which answers the kernel: it must not wait for memory that is free only once it has."""
    with suppress(OSError):  # `info` says which processes could not be marked
        reclaim.mark_io_flusher()


def _run_loop(loop: asyncio.AbstractEventLoop, guard: Guard, ending: threading.Event) -> None:
    """Run `loop` until it is stopped, let what is left in it clean up, and close it.

    Workers die with this thread, so that nothing that comes out of the loop may end it.
    """
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(lambda _, context: guard.failed(Part.LOOP, _exception_of(context)))
    try:
        while not ending.is_set():
            try:
                loop.run_forever()
            except BaseException as error:  # SystemExit and the like are not kept in the loop
                guard.failed(Part.LOOP, error)
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _exception_of(context: dict[str, Any]) -> BaseException:
    """Return what an event loop complains of, where nobody else has taken it."""
    error = context.get("exception")
    return error if isinstance(error, BaseException) else RuntimeError(context.get("message", "unknown"))
