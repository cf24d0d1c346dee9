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
from pathlib import Path
from typing import Any, Protocol

import msgspec

import vdusefast
from vdusefast import left, run_dir, usage
from vdusefast.config import Config
from vdusefast.errors import DeviceBusyError, TimedOutError, VdusefastError
from vdusefast.rpc import Method, NoParams, RpcServer
from vdusefast.rpc_client import NoServerError, RpcClient
from vdusefast.sd_notify import Notifier, is_service
from vdusefast.signals import PatientStopSignals, StopRequestedError
from vdusefast.transport import DeviceBrokenError

STOP_TIMEOUT_S = 30.0
TICK_S = 5.0  # how often a service manager is told of failures
CLIENT_LOOK_S = 0.5
EXTEND_EVERY_S = 10.0
# What a service manager grants us anew each time: enough for the stop that follows, or for the start of the workers.
EXTEND_S = 90.0
DELETE_LOOK_S = 0.1
HAND_OVER_MARGIN_S = 45.0  # beyond the server's own limit: killing and reaping what does not end
HAND_OVER_LOOK_S = 0.002

Json = dict[str, Any]
_log = logging.getLogger("vdusefast")


class ServedDevice(Protocol):
    """What is needed of api.Device."""

    @property
    def node(self) -> str:
        """The node by which the device is used, "" while there is none."""

    @property
    def failure(self) -> VdusefastError | None:
        """The first failure."""

    @property
    def recovered(self) -> bool:
        """Whether it was taken over from a server before."""

    def start(self, *, recover: bool | None = ..., fail_requests: bool = ...) -> None:
        """Return once the node is usable."""

    def stop(self, timeout_s: float = ..., *, force: bool = ...) -> None:
        """Detach, drain and destroy."""

    def hand_over(self, timeout_s: float = ...) -> None:
        """Drain, and leave the device in the kernel for the next server."""

    def info(self) -> Json:
        """Return all that is to be shown."""

    def resize(self, size_bytes: int | None = ..., *, force: bool = ...) -> int:
        """Change the size and return it."""

    def stats(self) -> Any:
        """Return counters with a method to_dict."""

    def responds(self, timeout_s: float) -> bool:
        """Return whether its loop answers within `timeout_s`."""


class DeleteParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the method `delete`."""

    force: bool = False
    timeout_s: float = STOP_TIMEOUT_S


class HandOverParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the method `hand_over`."""

    timeout_s: float = STOP_TIMEOUT_S


class ResizeParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the method `resize`; without a size the store's present one is taken."""

    size_bytes: int | None = None
    force: bool = False


class Service:
    """One device with its commands' server, from `run` to its end."""

    def __init__(
        self,
        config: Config,
        base: Path,
        *,
        take_over: bool = False,
        fail_requests: bool = False,
        make_device: Callable[[Config, Path], ServedDevice] | None = None,
    ):
        """Prepare; see `run`. base: where run directories live.

        take_over: have the server that the device has now hand it over, once we are ready for it. fail_requests: go
        on with a device that was left, and answer its requests with errors. Raises ConfigError.
        """
        self.name = config.device.name
        self.path = base / self.name
        self._config = config
        self._take_over = take_over
        self._fail_requests = fail_requests
        self._make_device: Callable[[], ServedDevice] = lambda: (make_device or _make_device)(config, base)
        self._device = self._make_device()
        self.deleted = False  # by a command, in contrast to a signal
        self._ready = False
        self._systemd = is_service()
        self._notifier = Notifier()
        self._signals = PatientStopSignals()
        self._deleting = threading.Lock()  # held by whoever stops the device, or looks whether it may be
        self._stopping = False  # that is decided
        self._deleted_fd = -1
        self._since_s = 0.0
        self._last_info: Json = {}

    def run(self, on_ready: Callable[[Json], None]) -> None:
        """Start, call `on_ready` with the device's info, serve until a signal or a command, and clean up.

        A device of the kernel stays there when a signal comes, for the next server, but for SIGINT when nobody uses it.
        Runs in the main thread. A signal before the device is usable undoes what was begun, and `on_ready` is not
        called. Raises VdusefastError when the device cannot be started; nothing is left behind then, but what was
        found: a device that waits in the kernel for a server waits on.
        """
        with self._signals:
            self._notifier.send(STATUS="starting", **self._start_extension())
            try:
                with self._signals.interrupting():
                    self._start()
            except StopRequestedError as stop:
                _log.info("%s: %s before it was ready", self.name, stop)
                self._give_up()  # the signal may have come as it had just started
                return
            self._since_s = time.monotonic()
            self._deleted_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            try:
                self._serve(on_ready)
            finally:
                os.close(self._deleted_fd)

    def info(self) -> Json:
        """Return the device's info with what is known of this process."""
        if self._stopping:  # the device answers nobody while it is stopped
            return {**self._last_info, "state": "stopping"}
        self._last_info = {
            **self._device.info(),
            "run_dir": os.fspath(self.path),
            "uptime_s": round(time.monotonic() - self._since_s, 1),
            "version": vdusefast.__version__,
            "systemd": self._systemd,
        }
        return self._last_info

    # -- inside

    def _serve(self, on_ready: Callable[[Json], None]) -> None:
        server = RpcServer(self.path, self._methods())
        try:
            server.start()
            on_ready(self.info())
            self._notifier.send(READY=1, STATUS=self._status())
            self._ready = True
            self._wait()
        finally:
            self._notifier.send(STOPPING=1, STATUS="stopping")
            try:
                self._stop_for_signal()
            finally:
                server.close()

    def _methods(self) -> dict[str, Method[Any]]:
        return {
            "info": Method(NoParams, lambda _: self.info()),
            "stats": Method(NoParams, lambda _: self._stats()),
            "ping": Method(NoParams, lambda _: {"name": self.name, "pid": os.getpid()}),
            "delete": Method(DeleteParams, self._delete),
            "hand_over": Method(HandOverParams, self._hand_over),
            "resize": Method(ResizeParams, self._resize),
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

    def _delete(self, params: DeleteParams) -> Json:
        """Stop the device unless it is in use, and end this process. Called in a client's thread."""
        self._check_timeout("delete", params.timeout_s)
        if not self._deleting.acquire(blocking=False):
            raise DeviceBusyError(f"{self.name}: is being removed already")
        try:
            self._refuse_users(params.force)
        except BaseException:
            self._deleting.release()
            raise
        self._stopping = self.deleted = True
        try:
            self._device.stop(params.timeout_s, force=params.force)
        finally:
            os.eventfd_write(self._deleted_fd, 1)
        if self._config.device.transport == "kernel" and left.in_kernel(self.name):
            raise self._device.failure or VdusefastError(f"{self.name}: the kernel still has the device; see its log")
        return {"name": self.name, "pid": os.getpid()}

    def _hand_over(self, params: HandOverParams) -> Json:
        """Leave the device to the server that asks for it, and end this process. Called in a client's thread."""
        self._check_timeout("hand_over", params.timeout_s)
        if not self._can_leave():
            raise VdusefastError(f"{self.name}: cannot be handed over: it ends with its server")
        if not self._deleting.acquire(blocking=False):
            raise DeviceBusyError(f"{self.name}: is being removed already")
        self._stopping = True
        try:
            self._device.hand_over(params.timeout_s)
        finally:
            os.eventfd_write(self._deleted_fd, 1)
        return {"name": self.name, "pid": os.getpid()}

    def _check_timeout(self, method: str, timeout_s: float) -> None:
        if not 0 < timeout_s < 1e6:
            raise VdusefastError(f"{self.name}: {method}: a timeout of {timeout_s:g} s")

    def _refuse_users(self, force: bool) -> None:
        """Raise DeviceBusyError while somebody uses the device, unless `force`, which a vhost client overrules."""
        node = self._device.node
        is_vhost = _is_vhost(node)
        if force and not is_vhost:
            return
        users = usage.find_users(node)
        if not users:
            return
        found = f"{self.name}: {node} is in use: {usage.describe(users)}"
        if is_vhost:
            raise DeviceBusyError(f"{found}; removing it would wait for that without any limit: end it first")
        raise DeviceBusyError(f"{found}; end that first, or --force")

    def _start(self) -> None:
        """Start the device, or go on with the one that was left. One that the kernel has given up is made anew."""
        if self._take_over:
            take_over(self.path)
        recover = True if self._fail_requests else None
        try:
            self._device.start(recover=recover, fail_requests=self._fail_requests)
        except DeviceBrokenError as error:
            _log.warning("%s", error)
            left.remove_broken(self.path)
            self._device = self._make_device()
            self._device.start()

    def _wait(self) -> None:
        """Wait until a signal or `delete`; meanwhile tell the service manager how things are."""
        poll = select.poll()
        poll.register(self._signals.fileno(), select.POLLIN)
        poll.register(self._deleted_fd, select.POLLIN)
        watchdog_s = self._notifier.watchdog_s / 3
        tick_s = min(watchdog_s or TICK_S, TICK_S) if self._notifier.active else None
        told = self._status()
        while not poll.poll(None if tick_s is None else tick_s * 1000):
            if watchdog_s and self._device.responds(watchdog_s):
                self._notifier.send(WATCHDOG=1)
            if (status := self._status()) != told:
                told = status
                self._notifier.send(STATUS=status)

    def _status(self) -> str:
        failure = self._device.failure
        return f"failed: {failure}" if failure else f"serving {self._device.node or self.name}"

    def _can_leave(self) -> bool:
        """Return whether the device outlives this process: the kernel keeps it, and its bytes are not in our memory."""
        return self._config.device.transport == "kernel" and not self._config.backend.uri.startswith("memory:")

    def _stop_for_signal(self) -> None:
        """Leave the device to the next server, or remove it, unless a command has done so.

        A signal cannot be refused: where the device cannot be left, whoever still uses the disk loses it.
        """
        extended_s = 0.0
        while not self._deleting.acquire(timeout=DELETE_LOOK_S):
            if select.select([self._deleted_fd], [], [], 0)[0]:
                return  # the thread in `delete` or `hand_over` has done it
            extended_s = self._extend(extended_s)
        self._stopping = True
        if not self._ready:
            self._give_up()
        elif self._can_leave() and (self._signals.received != signal.SIGINT or usage.find_users(self._device.node)):
            self._leave()
        else:
            self._remove(extended_s)

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
            "%s: left in the kernel%s, where requests wait: `vdusefast recover %s` goes on with it, `vdusefast del %s` "
            "removes it",
            *(self.name, f" as {node}" if node else "", self.name, self.name),
        )

    def _remove(self, extended_s: float) -> None:
        """Stop the device. A client of vhost-vdpa is waited for, and served on meanwhile.

        The kernel would wait for it too, and neither its end nor a later one could be had then. extended_s: when the
        service manager was last told to wait.
        """
        node = self._device.node
        users = usage.find_users(node)
        if users:
            wait = "; waiting for that to end" if _is_vhost(node) else ""
            _log.warning("%s: %s is still in use: %s%s", self.name, node, usage.describe(users), wait)
        while users and _is_vhost(node):
            extended_s = self._extend(extended_s)
            time.sleep(CLIENT_LOOK_S)
            users = usage.find_users(node)
        self._device.stop(STOP_TIMEOUT_S)

    def _start_extension(self) -> dict[str, int]:
        """Return what lets the service manager wait for a driver as long as we do."""
        device = self._config.device
        if device.transport != "kernel":
            return {}
        return {"EXTEND_TIMEOUT_USEC": int((device.attach_timeout_s + EXTEND_S) * 1e6)}

    def _extend(self, last_s: float) -> float:
        """Have the service manager wait on, if `last_s`, the time of the last such message, is long ago."""
        now_s = time.monotonic()
        if last_s and now_s - last_s < EXTEND_EVERY_S:
            return last_s
        self._notifier.send(EXTEND_TIMEOUT_USEC=int(EXTEND_S * 1e6))
        return now_s


def take_over(path: Path) -> None:
    """Have the server of the run directory at `path`, if there is one, hand its device over, and wait for its end.

    All that this process needs later is there already, so that the device's driver waits as shortly as can be. Raises
    DeviceBusyError when its holder takes no commands, TimedOutError, what the server answers.
    """
    import vdusefast.backends.file
    import vdusefast.transport.kernel  # noqa: F401

    try:
        with RpcClient(path) as client:
            client.call("hand_over", {"timeout_s": STOP_TIMEOUT_S}, STOP_TIMEOUT_S + HAND_OVER_MARGIN_S)
    except NoServerError:
        if run_dir.is_held(path):
            raise DeviceBusyError(
                f"{path.name}: held by pid {run_dir.holder_pid(path)}, which takes no commands"
            ) from None
    deadline = time.monotonic() + HAND_OVER_MARGIN_S
    while run_dir.is_held(path):
        if time.monotonic() > deadline:
            raise TimedOutError(f"{path.name}: its old server (pid {run_dir.holder_pid(path)}) does not end")
        time.sleep(HAND_OVER_LOOK_S)


def _make_device(config: Config, base: Path) -> ServedDevice:
    from vdusefast.api import Device

    return Device(config, run_dir=base)


def _is_vhost(node: str) -> bool:
    return node.startswith("/dev/vhost-vdpa")
