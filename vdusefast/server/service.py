"""The process that serves one device: from its configuration to its end, under systemd, by hand or in the background.

The main thread waits for signals; the device's loop and the commands' server have threads of their own.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import vdusefast
from vdusefast.base import build, time_limits
from vdusefast.base.json_types import Json
from vdusefast.base.start_mode import StartMode
from vdusefast.base.time_limits import EXTEND_S, STOP_TIMEOUT_S, TAKE_BACK_LIMIT_S
from vdusefast.config import Config
from vdusefast.errors import EXIT_DELETED, DeviceBusyError, TimedOutError, VdusefastError
from vdusefast.host import final_kill, node_users, reclaim, run_dirs, shutdown
from vdusefast.server import hand_over, upgrade
from vdusefast.server.rpc import Method, NoParams, RpcServer, caller_pid
from vdusefast.server.sd_notify import Notifier, is_service
from vdusefast.server.served_device import DeleteParams, HandOverParams, ResizeParams, ServedDevice
from vdusefast.server.signals import PatientStopSignals, StopRequestedError
from vdusefast.server.systemd import manager as service_manager
from vdusefast.server.systemd import shutdown_unit
from vdusefast.state import orphans
from vdusefast.transport import DeviceBrokenError

TICK_S = 1.0  # how often failures are reported to a service manager, and an upgrade is checked for
CLIENT_LOOK_S = 0.5
DELETE_LOOK_S = 0.1
TAKE_BACK_PAUSE_S = 0.5

_log = logging.getLogger("vdusefast")


class Service:
    """One device with its commands' server, from `run` to its end."""

    def __init__(
        self,
        config: Config,
        base: Path,
        mode: StartMode = StartMode.ADD,
        *,
        before_take_over: Callable[[], None] | None = None,
        make_device: Callable[[Config, Path], ServedDevice] | None = None,
    ):
        """Prepare; see `run`. base: where run directories live.

        mode: what is done first. before_take_over: called between proof and hand-over; may raise. Raises ConfigError.
        """
        self.name = config.device.name
        self.path = base / self.name
        self._config = config
        self._mode = mode
        self._before_take_over = before_take_over or (lambda: None)
        self._make_device: Callable[[], ServedDevice] = lambda: (make_device or _make_device)(config, base)
        self._device = self._make_device()
        self.deleted = False  # by a command, in contrast to a signal
        self._ready = False
        self._final_stage = False  # everything else on the machine has been stopped
        self._systemd = is_service()
        self._unit = service_manager.own_unit() if self._systemd else ""
        self._notifier = Notifier()
        self._signals = PatientStopSignals()
        self._deleting = threading.Lock()  # held while the device is stopped, or while it is checked whether it may be
        self._stopping = False  # that is decided
        self._successor: hand_over.Successor | None = None  # who has asked for the device, and been given it
        self._deleted_fd = -1
        self._since_s = 0.0
        self._last_info: Json = {}
        self._refused: list[str] = []  # what prepares this process for memory reclaim

    @property
    def exit_status(self) -> int:
        """What this process ends with after `run`."""
        return EXIT_DELETED if self.deleted and self._systemd else 0

    def run(self, on_ready: Callable[[Json], None]) -> None:
        """Start, call `on_ready` with the device's info, serve until a signal or a command, and clean up.

        A device of the kernel stays there when a signal comes, for the next server, but for SIGINT when nobody uses it.
        Runs in the main thread. A signal before the device is usable undoes what was begun, and `on_ready` is not
        called. Raises VdusefastError when the device cannot be started; nothing is left behind then, but what was
        found: a device that waits in the kernel for a server waits on.
        """
        with self._signals:
            starting = (
                {} if self._mode.takes_over else {"STATUS": "starting"}
            )  # until then the old server is the service
            self._notifier.send(**starting, **self._start_extension())
            if self._device.outlives_server:
                final_kill.survive()
            if self._config.device.locks_memory:
                self._refused = reclaim.begin()
            try:
                with self._signals.interrupting():
                    self._start()
            except StopRequestedError as stop:
                _log.info("%s: %s before it was ready", self.name, stop)
                self._give_up()  # the signal may have come as it had just started
                return
            if self._config.device.locks_memory:
                self._refused += reclaim.complete()
            for sentence in self._refused:
                _log.warning("%s: %s: buffered writes may crawl; %s", self.name, sentence, reclaim.REMEDY)
            self._since_s = time.monotonic()
            self._deleted_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            try:
                self._serve(on_ready)
            finally:
                os.close(self._deleted_fd)
            if self._device.outlives_server and not orphans.in_kernel(self.name):
                shutdown_unit.forget(self.name)

    def info(self) -> Json:
        """Return the device's info with what is known of this process."""
        if self._stopping:  # the device answers nobody while it is stopped
            return {**self._last_info, "state": "stopping"}
        info = self._device.info()
        self._last_info = {
            **info,
            "reclaim": "; ".join([*self._refused, info["reclaim"]]) if info.get("reclaim") else "",
            "run_dir": os.fspath(self.path),
            "uptime_s": round(time.monotonic() - self._since_s, 1),
            "version": vdusefast.__version__,
            "build": build.BUILD_ID,
            "upgraded": build.upgraded(),
            "systemd": self._systemd,
            "unit": self._unit,
            "watchdog_s": self._notifier.watchdog_s,
        }
        return self._last_info

    # -- inside

    def _serve(self, on_ready: Callable[[Json], None]) -> None:
        """Serve to the end, and again where a server that has taken over does not come to serve."""
        self._serve_once(on_ready)
        while self._successor is not None:
            try:
                why = self._successor.wait(self._signals.fileno(), self._notifier.keep_alive)
            finally:
                self._successor.close()
                self._successor = None
            if why and self._take_back(why):
                self._serve_once(lambda info: None)

    def _serve_once(self, on_ready: Callable[[Json], None]) -> None:
        server = RpcServer(self.path, self._methods())
        try:
            if self._mode.takes_over or self._ready:
                # Before the other server can see that we serve, and ends: a service ends with its main process.
                self._notifier.send(MAINPID=os.getpid())
            server.start()
            on_ready(self.info())
            self._notifier.send(READY=1, STATUS=self._status())
            self._ready = True
            if self._device.outlives_server:
                shutdown_unit.ensure(self._config)
            self._wait()
        finally:
            if self._successor is None:  # else the service continues
                self._notifier.send(STOPPING=1, STATUS="stopping")
            try:
                self._stop_for_signal()
            finally:
                server.close()

    def _take_back(self, why: str) -> bool:
        """Serve the device again that was handed over. Returns whether it is: not if others have it, or a signal comes.

        Processes of a server that was killed may hold it for a while.
        """
        _log.error("%s: %s: taking the device back", self.name, why)
        deadline = time.monotonic() + TAKE_BACK_LIMIT_S
        while True:
            try:
                with self._signals.interrupting():
                    device = self._device = self._make_device()
                    device.start(mode=StartMode.ADOPT)
                break
            except StopRequestedError as stop:
                _log.warning("%s: %s: left in the kernel: vdusefast recover %s", self.name, stop, self.name)
                self._device.hand_over(STOP_TIMEOUT_S)  # the signal may have come as it had just started
                return False
            except VdusefastError as error:
                if run_dirs.is_held(self.path):
                    _log.warning("%s: another server has it now", self.name)
                    return False
                if time.monotonic() > deadline:
                    _log.error("%s: left in the kernel, where requests wait: vdusefast recover %s", error, self.name)
                    return False
                _log.error("%s; tried again", error)
                time.sleep(TAKE_BACK_PAUSE_S)
        os.eventfd_read(self._deleted_fd)
        self._stopping = False
        self._deleting.release()
        _log.warning("%s: serves the device again", self.name)
        return True

    def _methods(self) -> dict[str, Method[Any]]:
        return {
            "info": Method(NoParams, lambda _: self.info()),
            "stats": Method(NoParams, lambda _: self._stats()),
            "ping": Method(NoParams, lambda _: {"name": self.name, "pid": os.getpid()}),
            "delete": Method(DeleteParams, self._delete),
            "hand_over": Method(HandOverParams, self._hand_over),
            "resize": Method(ResizeParams, self._resize),
            "forgive": Method(NoParams, lambda _: self._forgive_store()),
        }

    def _stats(self) -> Json:
        if self._stopping:
            raise DeviceBusyError(f"{self.name}: is being removed")
        counted: Json = self._device.stats().to_dict()
        return counted

    def _resize(self, params: ResizeParams) -> Json:
        """Change the size of the device while it is used. Called in a client's thread."""
        if self._stopping:
            raise DeviceBusyError(f"{self.name}: is being removed")
        before_bytes = self.info()["size_bytes"]
        size_bytes = self._device.resize(params.size_bytes, force=params.force)
        return {"name": self.name, "size_bytes": size_bytes, "before_bytes": before_bytes}

    def _forgive_store(self) -> Json:
        """Have flushes be carried out again. Called in a client's thread."""
        if self._stopping:
            raise DeviceBusyError(f"{self.name}: is being removed")
        self._device.forgive_store()
        return self.info()

    def _delete(self, params: DeleteParams) -> Json:
        """Stop the device unless it is in use, and end this process. Called in a client's thread."""
        self._check_timeout("delete", params.timeout_s)
        if not self._deleting.acquire(blocking=False):
            return self._join_delete(params)
        try:
            self._refuse_users(params)
        except BaseException:
            self._deleting.release()
            raise
        self._stopping = self.deleted = True
        try:
            self._device.stop(params.timeout_s, force=params.force)
        finally:
            os.eventfd_write(self._deleted_fd, 1)
        return self._deleted_answer()

    def _join_delete(self, params: DeleteParams) -> Json:
        """Wait for the removal that another client has asked for; with `force`, make it one by force."""
        deadline = time.monotonic() + time_limits.stop_s(params.timeout_s)
        while not self._is_deleted():
            if self._successor is not None:
                raise DeviceBusyError(f"{self.name}: is being handed over to another server; try again")
            if self._stopping and params.force:
                self._device.force(params.timeout_s)
            if self._stopping and not self.deleted:
                raise DeviceBusyError(f"{self.name}: its server ends, as it was told by a signal; try again")
            if not self.deleted and self._deleting.acquire(timeout=DELETE_LOOK_S):  # it was refused meanwhile
                self._deleting.release()
                return self._delete(params)
            if time.monotonic() > deadline:
                raise TimedOutError(
                    f"{self.name}: is being removed, which takes longer than {params.timeout_s:g} s; try again"
                )
            time.sleep(DELETE_LOOK_S)
        return self._deleted_answer()

    def _is_deleted(self) -> bool:
        return bool(select.select([self._deleted_fd], [], [], 0)[0])

    def _deleted_answer(self) -> Json:
        if self._config.device.is_in_kernel and orphans.in_kernel(self.name):
            raise self._device.failure or VdusefastError(f"{self.name}: the kernel still has the device; see its log")
        return {"name": self.name, "pid": os.getpid()}

    def _hand_over(self, params: HandOverParams) -> Json:
        """Leave the device to the server that asks for it, and end once that serves. Called in a client's thread."""
        self._check_timeout("hand_over", params.timeout_s)
        if not self._device.outlives_server:
            raise VdusefastError(f"{self.name}: cannot be handed over: it ends with its server")
        if not self._deleting.acquire(blocking=False):
            raise DeviceBusyError(f"{self.name}: is already being removed or handed over")
        try:
            limit_s = time_limits.start_s(self._config.device.attach_timeout_s)
            successor = hand_over.Successor(self.path, caller_pid(), limit_s)
        except BaseException:
            self._deleting.release()
            raise
        self._stopping, self._successor = True, successor
        try:
            self._device.hand_over(params.timeout_s)
        finally:
            os.eventfd_write(self._deleted_fd, 1)
        return {"name": self.name, "pid": os.getpid()}

    def _check_timeout(self, method: str, timeout_s: float) -> None:
        if not 0 < timeout_s < 1e6:
            raise VdusefastError(f"{self.name}: {method}: a timeout of {timeout_s:g} s")

    def _refuse_users(self, params: DeleteParams) -> None:
        """Raise DeviceBusyError while somebody uses the device, or may; `force` overrules all but a vhost client."""
        node = self._device.node
        if params.force and not node_users.is_vhost(node):
            return
        users = node_users.find_users(node)
        if users:
            raise DeviceBusyError(node_users.refusal(self.name, node, users))
        unseen = "" if params.force or params.is_unused else node_users.unseen_text(node)
        if unseen:
            raise DeviceBusyError(f"{self.name}: {unseen}; remove it from the host, or --force if nobody uses it")

    def _start(self) -> None:
        """Start the device, or adopt the orphan. A device that the kernel has given up is created again."""
        if self._mode.takes_over:
            self._device.prove(look=self._mode.proves_store)
            self._before_take_over()
            hand_over.ask(self.path)
        try:
            self._device.start(mode=self._mode)
        except DeviceBrokenError as error:
            if self._mode.claims:
                raise
            _log.warning("%s", error)
            orphans.remove_broken(self.path)
            self._device = self._make_device()
            self._device.start()

    def _wait(self) -> None:
        """Wait until a signal or `delete`; meanwhile tell the service manager how things are."""
        poll = select.poll()
        poll.register(self._signals.fileno(), select.POLLIN)
        poll.register(self._deleted_fd, select.POLLIN)
        watchdog_s = self._notifier.watchdog_s / 3
        tick_s = min(watchdog_s or TICK_S, TICK_S)
        told = self._status()
        with closing(upgrade.Upgrader(self.name, self.path.parent)) as upgrader:
            while not poll.poll(tick_s * 1000):
                if self._device.outlives_server:
                    upgrader.look(self._device.upgraded)
                if self._device.outlives_server and shutdown.in_final_stage() and not self._users():
                    self._final_stage = True
                    return
                told = self._notify_manager(told, watchdog_s)

    def _notify_manager(self, told: str, watchdog_s: float) -> str:
        """Tell the service manager how things are. Returns the status that it has been told."""
        if self._notifier.active:
            if watchdog_s and self._device.responds(watchdog_s):
                self._notifier.send(WATCHDOG=1)
            if (status := self._status()) != told:
                told = status
                self._notifier.send(STATUS=status)
        return told

    def _status(self) -> str:
        failure = self._device.failure
        return f"failed: {failure}" if failure else f"serving {self._device.node or self.name}"

    def _stop_for_signal(self) -> None:
        """Leave the device to the next server, or remove it, unless a command has done so.

        A signal cannot be refused: where the device cannot be left, its users lose the disk. While the
        machine goes down nobody comes to serve the device after us: it is served as long as it is used.
        """
        while not self._deleting.acquire(timeout=DELETE_LOOK_S):
            if self._is_deleted():
                return  # the thread in `delete` or `hand_over` has done it
            self._notifier.extend()
        self._stopping = True
        if not self._ready:
            self._give_up()
        elif self._device.outlives_server and self._signals.requested and shutdown.is_going_down():
            self._see_out()
        elif (
            self._device.outlives_server
            and not self._final_stage
            and (self._signals.received != signal.SIGINT or self._is_perhaps_used())
        ):
            self._leave()
        else:
            self._remove()

    def _is_perhaps_used(self) -> bool:
        node = self._device.node
        return bool(node_users.unseen_text(node) or node_users.find_users(node))

    def _users(self) -> list[str]:
        return node_users.find_users(self._device.node)

    def _see_out(self) -> None:
        """Serve until nobody uses the device, and remove it then; to the very end where nothing else ends that.

        A broken device stays in the kernel, which waits for no answers then.
        """
        if self._device.info()["state"] == "broken":
            self._leave()
            return

        is_said = False

        def wait_on(users: list[str]) -> None:
            nonlocal is_said
            if not is_said:
                _log.info("%s: the machine goes down: served while in use: %s", self.name, node_users.describe(users))
                is_said = True
            self._notifier.extend()

        if shutdown.wait_until_unused(self._users, wait_on, give_up=self._systemd):
            self._remove()
        else:
            self._serve_to_the_end()

    def _serve_to_the_end(self) -> None:
        """Let systemd have the end of this process, which it waits for, and another one serve on.

        A file system that is unmounted only after all processes were killed needs a server until then.
        """
        from vdusefast.server import launch

        _log.info("%s: still in use: another process serves it to the machine's end", self.name)
        self._stopping = False
        self._deleting.release()
        try:
            launch.start(self._config, mode=StartMode.TAKE_OVER_UNSEEN)
        except VdusefastError as error:
            _log.error("%s", error)
            if self._deleting.acquire(blocking=False):  # it still has the device
                self._stopping = True
                self._leave()

    def _give_up(self) -> None:
        """Undo a start: nobody has heard of the device yet, unless there was one before."""
        if self._device.recovered:
            self._device.hand_over(STOP_TIMEOUT_S)
        else:
            self._device.stop(STOP_TIMEOUT_S)

    def _leave(self) -> None:
        node = self._device.node
        self._device.hand_over(STOP_TIMEOUT_S)
        _log.warning(
            "%s: left in the kernel%s, where requests wait: `vdusefast recover %s` adopts it, `vdusefast del %s` "
            "removes it",
            *(self.name, f" as {node}" if node else "", self.name, self.name),
        )

    def _remove(self) -> None:
        """Stop the device. A client of vhost-vdpa is waited for, and served on meanwhile.

        The kernel would wait for it too, and neither its end nor a later one could be had then.
        """
        node = self._device.node
        users = node_users.find_users(node)
        if users:
            wait = "; waiting for that to end" if node_users.is_vhost(node) else ""
            _log.warning("%s: %s is still in use: %s%s", self.name, node, node_users.describe(users), wait)
        while users and node_users.is_vhost(node):
            self._notifier.extend()
            time.sleep(CLIENT_LOOK_S)
            users = node_users.find_users(node)
        self._device.stop(STOP_TIMEOUT_S)

    def _start_extension(self) -> dict[str, int]:
        """Return what lets the service manager wait for a driver as long as we do."""
        device = self._config.device
        if not device.is_in_kernel:
            return {}
        return {"EXTEND_TIMEOUT_USEC": int((device.attach_timeout_s + EXTEND_S) * 1e6)}


def _make_device(config: Config, base: Path) -> ServedDevice:
    # With all that is imported late elsewhere: by then the files may be of another build.
    import vdusefast.backends.probe
    import vdusefast.control.device_info
    import vdusefast.host.vdpa  # noqa: F401
    from vdusefast.api import Device

    return Device(config, run_dir=base)
