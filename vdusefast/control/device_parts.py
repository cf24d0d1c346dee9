"""What a served device consists of: how its parts are made, put together, resized and released.

`Device` is the door to it. A start makes the parts one after the other. Whatever happens on the way, `Release` knows
what there is by then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vdusefast.backends import Store
from vdusefast.base import time_limits
from vdusefast.base.guard import Guard
from vdusefast.base.guard import Part as GuardedPart
from vdusefast.base.start_mode import StartMode
from vdusefast.base.time_limits import MARGIN_S, RESIZE_TIMEOUT_S
from vdusefast.config import Config, check_cpus, override
from vdusefast.control.assembly import make_keeper, make_relay, make_transport, open_device_store, worker_specs
from vdusefast.control.device_loop import LoopThread
from vdusefast.control.device_model import BlockDevice, find_emulated
from vdusefast.control.limits import Limits
from vdusefast.control.placement import Placement, foresee, observe
from vdusefast.control.release import Part, Release
from vdusefast.control.resize import change_bytes, choose_bytes
from vdusefast.control.supervisor import Supervisor
from vdusefast.control.write_back import WriteBack
from vdusefast.errors import DeviceNotFoundError, TimedOutError, VdusefastError
from vdusefast.state import orphans, pages_upgrade, saved_state
from vdusefast.state.run_dir import RunDirectory
from vdusefast.state.saved_state import SavedState
from vdusefast.state.shared_pages import SharedPages
from vdusefast.transport import Transport, TransportError
from vdusefast.units import SECTOR_BYTES

if TYPE_CHECKING:
    from vdusefast.control.relay_control import RelayControl
    from vdusefast.state.keeper_control import KeeperControl

_log = logging.getLogger("vdusefast")
_T = TypeVar("_T")


class DeviceParts:
    """The parts of one device, from a start to its end. Each is None until it is there."""

    def __init__(
        self,
        config: Config,
        run_dir: Path | None,
        limits: Limits | None,
        worker_command: list[str] | None,
        transport: Transport | None,
    ) -> None:
        """Prepare; nothing is opened. Arguments as of `Device`; `config` is checked, and names its CPUs."""
        self.config = config
        self.name = config.device.name
        self._run_dir = run_dir
        self._limits = limits
        self._worker_command = worker_command
        self._release = Release()
        self._lock = threading.Lock()  # one start or stop at a time
        self._resizing = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport = transport
        self._kind = transport.kind if transport else config.device.transport.resolved
        self._directory: RunDirectory | None = None
        self._keep = False  # the run directory, for the next server
        self._state: SavedState | None = None  # that of an orphan, or of a device that was claimed
        self._starting: Supervisor | None = None
        self._supervisor: Supervisor | None = None
        self._pages: SharedPages | None = None
        self._model: BlockDevice | None = None
        self._placement: Placement | None = None
        self._store: Store | None = None
        self._emulated: list[str] = []  # what the driver was shown, and the store is not
        self._relay: RelayControl | None = None
        self._write_back: WriteBack | None = None

    def _start(self, timeout_s: float, mode: StartMode, forgive: bool) -> None:
        self._open_directory(mode)
        self._open_store(mode)
        model = self._make_model(mode)
        pages = self._open_pages(mode)
        placement = self._placement = foresee(self.config)
        placed = placement.apply(self.config)
        state = self._state
        self._transport = self._transport or make_transport(placed, state)
        self._open_store_notes()
        write_back = self._open_write_back(pages, forgive)
        keeper = relay = None
        if not mode.fails_requests:
            keeper = self._make_keeper(model)
            relay = self._make_relay(placed, model, keeper)
        assert self._store is not None
        specs = worker_specs(placed, model, self._store, pages, relay, write_back.queue_fds, keeper)
        supervisor = Supervisor(
            model,
            self._transport,
            pages,
            [spec._replace(engine="fail") for spec in specs] if mode.fails_requests else specs,
            command=self._worker_command,
            limits=self._limits,
            on_created=self._save_state,
            on_store_size=self._follow_store,
            write_back=write_back,
        )
        self._run(supervisor, keeper, relay)
        self._attach(supervisor, timeout_s, mode)
        self._place(supervisor, placement)
        if state is not None:
            self._settle(supervisor, state, mode)

    def _open_directory(self, mode: StartMode) -> None:
        """Take the run directory, and what it tells of a device to adopt. Raises DeviceNotFoundError and others."""
        directory = self._directory = RunDirectory(self.name, self._run_dir)
        self._keep = True  # until it is known that nobody needs what is in it
        self._release.add(Part.DIRECTORY, lambda: self._leave_directory(directory))
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

    def _open_store(self, mode: StartMode) -> None:
        state = self._state
        is_new = state is None and not mode.claims
        store = open_device_store(self.config, state, fail_requests=mode.fails_requests, is_new=is_new)
        self._store = store
        self._release.add(Part.STORE, store.close)
        for note in store.notes:
            _log.warning("device %s: %s", self.name, note)

    def _make_model(self, mode: StartMode) -> BlockDevice:
        """Return what the driver is shown; for an orphan, what it was shown already. Raises VdusefastError."""
        assert self._store is not None
        store, state = self._store, self._state
        model = self._model = BlockDevice(self.config, store, None if state is None else state.shown)
        if mode.claims:
            from vdusefast.state import claim

            self._state = claim.make_state(self.config, model, any_driver=mode.fails_requests)
        elif state is not None and not mode.fails_requests:
            saved_state.check_shown(state, store)
        self._note_emulated(model, store)
        return model

    def _open_pages(self, mode: StartMode) -> SharedPages:
        """Open the pages of the last server, or create them where there was none, or where they are lost."""
        assert self._directory is not None
        device = self.config.device
        opened = SharedPages.create if self._state is None or mode.claims else pages_upgrade.reopen
        pages = opened(self._directory.pages_path, self.name, device.queues, device.effective_queue_size)
        self._pages = pages
        self._release.add(Part.PAGES, pages.close)
        if mode is StartMode.CLAIM:
            for index in range(device.queues):
                pages.disown_log(index)
        return pages

    def _open_store_notes(self) -> None:
        """Open the notes of a plugin's store, which the next server reads."""
        assert self._directory is not None
        assert self._store is not None
        store = self._store
        if store.spec is not None:
            from vdusefast.backends.plugin import NOTES_BYTES

            fd = self._directory.open_store_notes(self.config.device.queues * NOTES_BYTES)
            store.spec = store.spec._replace(notes_fd=fd)
            self._release.add(Part.STORE_NOTES, lambda: os.close(fd))

    def _open_write_back(self, pages: SharedPages, forgive: bool) -> WriteBack:
        assert self._store is not None
        write_back = self._write_back = WriteBack(self.name, pages, self._store, self.config.device.queues)
        self._release.add(Part.WITNESS, write_back.close)
        write_back.begin(is_left=self._state is not None, forgive=forgive)
        return write_back

    def _make_keeper(self, model: BlockDevice) -> KeeperControl | None:
        assert self._directory is not None
        assert self._store is not None
        keeper = make_keeper(model, self._store, self._directory.path, self._report, adopt=self._state is not None)
        if keeper is not None:
            self._release.add(Part.KEEPER, lambda: keeper.close(keep=self._keep))
        return keeper

    def _make_relay(self, placed: Config, model: BlockDevice, keeper: KeeperControl | None) -> RelayControl | None:
        assert self._directory is not None
        assert self._store is not None
        callbacks = (self._follow_store, self._report)
        relay = make_relay(placed, model, self._store, self._directory.path, *callbacks, keeper)
        if relay is not None:
            self._release.add(Part.RELAY_SOCKETS, relay.close)
        return relay

    def _run(self, supervisor: Supervisor, keeper: KeeperControl | None, relay: RelayControl | None) -> None:
        """Start the loop, with what it watches."""
        loop = self._start_loop()
        self._starting = supervisor  # before anything runs in the loop: a part that fails there is its failure
        if keeper is not None:
            self._release.add(Part.KEEPER_WATCH, lambda: loop.call_soon_threadsafe(keeper.unwatch))
            loop.call_soon_threadsafe(keeper.watch)
        if relay is not None:
            self._relay = relay
            self._release.add(Part.RELAY, lambda: self._call(relay.stop(), MARGIN_S))
            loop.call_soon_threadsafe(relay.start)

    def _attach(self, supervisor: Supervisor, timeout_s: float, mode: StartMode) -> None:
        """Start the workers, and wait until the device has its driver. Raises VdusefastError."""
        device = self.config.device
        attach_s = device.attach_timeout_s if device.is_in_kernel else 0
        whole = mode is StartMode.CLAIM
        if whole:
            self._save_state()  # from now on, also if this server ends, the pages say what is in flight
        try:
            start = supervisor.start(timeout_s, reopen=self._state is not None, whole=whole)
            self._call(start, timeout_s + attach_s + MARGIN_S)
        except TransportError as error:
            if not whole:
                raise
            from vdusefast.state import claim

            raise TransportError(claim.unclean_text(self.name, str(error))) from None
        self._supervisor = supervisor

    def _settle(self, supervisor: Supervisor, state: SavedState, mode: StartMode) -> None:
        """Finish what the last server of an orphan has begun, and note the configuration, which may be a new one."""
        if state.resizing:
            self._call(supervisor.show_capacity(), MARGIN_S)
        if not mode.fails_requests:
            try:
                self._save_state()
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
        placement = self._placement = observe(self.config, self._transport.node if self._transport else "") or foreseen
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
        """Change the size in the saved state, for the next server. Raises VdusefastError."""
        if self._directory is not None:
            path = self._directory.state_path
            saved_state.note_size(path, size_bytes // SECTOR_BYTES, config, resizing=resizing)

    def _leave_directory(self, directory: RunDirectory) -> None:
        if self._keep:
            directory.release()
        else:
            directory.close()

    def _release_all(self) -> None:
        """Release everything, once the workers have ended."""
        with self._resizing:  # which ends with the workers, and needs the store until then
            self._release.close()

    def _resize(self, supervisor: Supervisor, store: Store, wanted_bytes: int | None, force: bool) -> None:
        """Change store and device in the order in which what the driver sees is always there."""
        model = supervisor.device
        before_bytes = model.capacity_sectors * SECTOR_BYTES
        size_bytes = choose_bytes(store, before_bytes, model.block_size_bytes, wanted_bytes, force=force)
        config = override(self.config, uri=f"null:{size_bytes}") if store.is_null else self.config
        change_bytes(
            store,
            before_bytes,
            size_bytes,
            note=lambda noted, resizing: self._note_size(
                noted, config if noted == size_bytes else self.config, resizing=resizing
            ),
            show=lambda: self._call(supervisor.resize(size_bytes // SECTOR_BYTES), RESIZE_TIMEOUT_S),
        )
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
                target=guard.call,
                args=(GuardedPart.RESIZE, self._follow),
                name=f"vdusefast-{self.name}-resize",
                daemon=True,
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
            self._release.close()

    def _start_loop(self) -> asyncio.AbstractEventLoop:
        """Run an event loop in a thread that lives until the device is released: the workers die with it."""
        thread = LoopThread(self.name, self._report, io_flusher=self.config.device.locks_memory)
        self._release.add(Part.LOOP, thread.end)
        self._loop = thread.loop
        return thread.loop

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
