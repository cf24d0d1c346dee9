"""The process that serves one device: from its configuration to its end, under systemd, by hand or in the background.

The main thread waits for signals; the device's loop and the commands' server have threads of their own.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

import vdusefast
from vdusefast import registry, usage
from vdusefast.config import Config
from vdusefast.errors import DeviceBusyError, VdusefastError
from vdusefast.rpc import Method, NoParams, RpcServer
from vdusefast.sd_notify import Notifier
from vdusefast.signals import PatientStopSignals, StopRequestedError

STOP_TIMEOUT_S = 30.0
TICK_S = 5.0  # how often a service manager is told of failures
CLIENT_LOOK_S = 0.5
EXTEND_EVERY_S = 10.0
# What a service manager grants us anew each time: enough for the stop that follows, or for the start of the workers.
EXTEND_S = 90.0
DELETE_LOOK_S = 0.1

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

    def start(self) -> None:
        """Return once the node is usable."""

    def stop(self, timeout_s: float = ..., *, force: bool = ...) -> None:
        """Detach, drain and destroy."""

    def info(self) -> Json:
        """Return all that is to be shown."""

    def stats(self) -> Any:
        """Return counters with a method to_dict."""

    def responds(self, timeout_s: float) -> bool:
        """Return whether its loop answers within `timeout_s`."""


class DeleteParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the method `delete`."""

    force: bool = False
    timeout_s: float = STOP_TIMEOUT_S


class Service:
    """One device with its commands' server, from `run` to its end."""

    def __init__(
        self, config: Config, base: Path, *, make_device: Callable[[Config, Path], ServedDevice] | None = None
    ):
        """Prepare; see `run`. base: where run directories live. Raises ConfigError."""
        self.name = config.device.name
        self.path = base / self.name
        self._config = config
        self._device = (make_device or _make_device)(config, base)
        self._notifier = Notifier()
        self._signals = PatientStopSignals()
        self._deleting = threading.Lock()  # held by whoever stops the device, or looks whether it may be
        self._stopping = False  # that is decided
        self._deleted_fd = -1
        self._since_s = 0.0
        self._last_info: Json = {}

    def run(self, on_ready: Callable[[Json], None]) -> None:
        """Start, call `on_ready` with the device's info, serve until a signal or `delete`, and clean up.

        Runs in the main thread. A signal before the device is usable undoes what was begun, and `on_ready` is not
        called. Raises VdusefastError when the device cannot be started; nothing is left behind then.
        """
        with self._signals:
            self._notifier.send(STATUS="starting", **self._start_extension())
            try:
                with self._signals.interrupting():
                    self._refuse_left_over()
                    self._device.start()
            except StopRequestedError as stop:
                _log.info("%s: %s before it was ready", self.name, stop)
                self._device.stop(STOP_TIMEOUT_S)  # the signal may have come as it had just started
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
        }
        return self._last_info

    # -- inside

    def _serve(self, on_ready: Callable[[Json], None]) -> None:
        server = RpcServer(self.path, self._methods())
        try:
            server.start()
            on_ready(self.info())
            self._notifier.send(READY=1, STATUS=self._status())
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
        }

    def _stats(self) -> Json:
        if self._stopping:
            raise DeviceBusyError(f"{self.name}: is being removed")
        counted: Json = self._device.stats().to_dict()
        return counted

    def _delete(self, params: DeleteParams) -> Json:
        """Stop the device unless it is in use, and end this process. Called in a client's thread."""
        if not 0 < params.timeout_s < 1e6:
            raise VdusefastError(f"{self.name}: delete: a timeout of {params.timeout_s:g} s")
        if not self._deleting.acquire(blocking=False):
            raise DeviceBusyError(f"{self.name}: is being removed already")
        try:
            self._refuse_users(params.force)
        except BaseException:
            self._deleting.release()
            raise
        self._stopping = True
        try:
            self._device.stop(params.timeout_s, force=params.force)
        finally:
            os.eventfd_write(self._deleted_fd, 1)
        if self._config.device.transport == "kernel" and registry.kernel_device_left(self.name):
            raise self._device.failure or VdusefastError(f"{self.name}: the kernel still has the device; see its log")
        return {"name": self.name, "pid": os.getpid()}

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

    def _refuse_left_over(self) -> None:
        """Refuse a name whose last server died with the device in the kernel: its run directory tells so."""
        if self.path.is_dir() and self._config.device.transport == "kernel":
            from vdusefast import run_dir

            ours = run_dir.holder_transport(self.path) == "kernel"
            if ours and not run_dir.is_held(self.path) and registry.kernel_device_left(self.name):
                raise DeviceBusyError(registry.left_text(self.name))

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

    def _stop_for_signal(self) -> None:
        """Stop the device unless `delete` has done so.

        A signal cannot be refused: whoever still uses the disk loses it. A client of vhost-vdpa is waited for, and
        served on meanwhile: the kernel would wait for it too, and neither its end nor a later one could be had then.
        """
        extended_s = 0.0
        while not self._deleting.acquire(timeout=DELETE_LOOK_S):
            if select.select([self._deleted_fd], [], [], 0)[0]:
                return  # the thread in `delete` has done it
            extended_s = self._extend(extended_s)
        self._stopping = True
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


def _make_device(config: Config, base: Path) -> ServedDevice:
    from vdusefast.api import Device

    return Device(config, run_dir=base)


def _is_vhost(node: str) -> bool:
    return node.startswith("/dev/vhost-vdpa")
