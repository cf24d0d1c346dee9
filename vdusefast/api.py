"""Serve a block device from Python.

    config = make_config(name="vd0", uri="file:/srv/vd0.img", queues=2)
    with Device(config) as device, device.driver() as driver:
        driver.write(0, b"x" * 4096)
        print(device.stats().requests)

The commands use nothing else. The supervisor runs in a thread of its own, so that the caller is free to drive the
device.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vdusefast.backends import look_again
from vdusefast.base import logs, start_mode, time_limits
from vdusefast.base.kinds import TransportKind
from vdusefast.base.start_mode import StartMode
from vdusefast.base.time_limits import START_TIMEOUT_S, STOP_TIMEOUT_S
from vdusefast.config import Config, resolve_cpus, validate
from vdusefast.control.device_parts import DeviceParts
from vdusefast.control.failures import PastFailure
from vdusefast.control.limits import Limits
from vdusefast.control.resize import refuse_other
from vdusefast.control.states import DeviceState, QueueInfo
from vdusefast.control.stats import DeviceStats, read_stats
from vdusefast.errors import DeviceBusyError, VdusefastError
from vdusefast.host import reclaim, run_dirs
from vdusefast.state import orphans
from vdusefast.transport import Transport
from vdusefast.transport.loopback import LoopbackBus, LoopbackTransport

if TYPE_CHECKING:
    from vdusefast.control.supervisor import Supervisor
    from vdusefast.driver.loopback_driver import LoopbackDriver

__all__ = ["Device", "DeviceState", "DeviceStats", "QueueInfo"]

_log = logging.getLogger("vdusefast")
logs.make_safe()


class Device(DeviceParts):
    """One device: its store, its workers and its event loop, from `start` to `stop`. A context manager.

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
        directory = Path(run_dir) if run_dir is not None else None
        super().__init__(resolve_cpus(config), directory, limits, worker_command, transport)

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
        Raises VdusefastError: ConfigError, also for an orphan that is another device than the configured one,
        BackendError, DeviceBusyError for the name or the store, DeviceNotFoundError with nothing to adopt,
        TimedOutError, WorkerError, KernelSupportError, TransportError. Nothing is left behind then, and an orphan
        stays as it was.
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
                self._keep = self._kind == TransportKind.KERNEL and orphans.is_attached(self.name)
                self._release_all()

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
                self._release_all()

    def resize(self, size_bytes: int | None = None, *, force: bool = False) -> int:
        """Change the size of the device while it is in use; its driver sees it. Returns the size in bytes.

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

        What was lost stays lost: the users of the device have to check it. Raises VdusefastError unless it is running.
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
        """Whether another server had the device before."""
        return self._state is not None

    @property
    def outlives_server(self) -> bool:
        """Whether another server can adopt the device when this one ends. Known once it has been started."""
        transport_keeps = self._kind == TransportKind.KERNEL if self._transport is None else self._transport.keeps
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
        """Return everything that `show` prints about the device, as plain values. Raises as `stats`."""
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
        """Return whether the event loop of the device answers within `timeout_s`; for watchdogs."""
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
