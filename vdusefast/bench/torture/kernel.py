"""The torture suite on a real disk of the kernel's.

The device is added as `vdusefast add` does, and adopted as `vdusefast recover` does. One thread for each slice of
/dev/vdX writes to it, with O_DIRECT and a journal of its own. The kernel chooses the queue of a request, so the pause
that is reported is the longest that any thread has seen.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from vdusefast.backends.image_format import path_of
from vdusefast.base.start_mode import StartMode
from vdusefast.bench.torture.disk import DiskLoad
from vdusefast.bench.torture.plan import RINGS, TortureOptions
from vdusefast.bench.torture.report import Findings
from vdusefast.bench.torture.scene import Scene
from vdusefast.bench.torture.server import LOG_TAIL_LINES, ServerError, TorturedServer
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.errors import VdusefastError
from vdusefast.host import run_dirs
from vdusefast.server.signals import StopSignals

STOP_TIMEOUT_S = 60.0
START_LOOK_S = 0.005


def torture_kernel(options: TortureOptions, uri: str, findings: Findings, signals: StopSignals, log: TextIO) -> None:
    """Torture a disk of the kernel's. Raises VdusefastError."""
    config = make_config(
        name=f"torture-{os.getpid()}",
        uri=f"file:{Path(uri.removeprefix('file:')).absolute()}",
        transport="kernel",
        queues=options.queues,
        queue_size=options.queue_size,
        engine=options.engine,
        cache=options.cache,
        **RINGS[options.ring],
    )
    with ExitStack() as opened:
        server = opened.enter_context(KernelServer(resolve_cpus(config)))
        server.start(recover=False)
        run_s = options.load_s("kernel")
        load = DiskLoad(server.node, options, run_s)
        opened.callback(load.close)
        # First of all at the end: without their disk, writers that still wait for it end.
        opened.callback(server.close)
        Scene(options, server, load, path_of(config.backend.uri), run_s).torture(findings, signals, log)


class KernelServer(TorturedServer):
    """The server of a kernel device, in the background."""

    def __init__(self, config: Config):
        """Prepare; see `start`."""
        from vdusefast.server import registry

        self._path = registry.base_directory() / config.device.name
        super().__init__(self._path / "pages")
        self.node = ""
        self._config = config
        self._pid = 0

    @property
    def pid(self) -> int:
        """The supervisor's process."""
        return self._pid

    def start(self, *, recover: bool) -> None:
        """Start a server, as `add` or `recover` does. Raises ServerError when it does not serve."""
        from vdusefast.server import launch
        from vdusefast.server.lifecycle import recover_dead

        self.start_count += 1
        try:
            info = recover_dead(self._path) if recover else launch.start(self._config)
        except VdusefastError as error:
            raise ServerError(str(error)) from error
        self._pid, self.node = int(info["pid"]), str(info["node"])

    def wait_ready(self) -> None:
        """Do nothing: `start` has waited."""

    def resize(self, size_bytes: int) -> None:
        """Ask it to, as `vdusefast resize` does."""
        from vdusefast.base import time_limits
        from vdusefast.server.rpc_client import RpcClient

        try:
            with RpcClient(self._path) as client:
                params = {"size_bytes": size_bytes, "force": True}
                client.call("resize", params, time_limits.client_s(time_limits.resize_s()))
        except VdusefastError as error:
            raise ServerError(str(error)) from error

    def hand_over(self) -> None:
        """Start the next one, which asks it to, as `vdusefast restart` does."""
        from vdusefast.server import launch

        self.start_count += 1
        try:
            info = launch.start(self._config, mode=StartMode.TAKE_OVER)
        except VdusefastError as error:
            raise ServerError(str(error)) from error
        self.reap()
        self._pid, self.node = int(info["pid"]), str(info["node"])

    def start_again(self, again_s: float, *, with_workers: bool) -> None:
        """Start the next server; when that one is to be killed, too, do it from a thread while it is waited for."""
        if again_s < 0:
            self.start(recover=True)
            return
        killed = threading.Event()
        killer = threading.Thread(target=self._kill_starting, args=(again_s, with_workers, killed))
        killer.start()
        try:
            self.start(recover=True)
        except ServerError:
            killer.join()
            if not killed.is_set():
                raise
            self.start(recover=True)
        else:
            killer.join()
            if killed.is_set():  # it had just begun to serve
                self.reap()
                self.start(recover=True)

    def stop(self) -> None:
        """Remove the device. Raises ServerError."""
        from vdusefast.server.rpc_client import RpcClient

        try:
            with RpcClient(self._path) as client:
                client.call("delete")
            self.reap()
        except VdusefastError as error:
            raise ServerError(str(error)) from error

    def close(self) -> None:
        """Remove the device by force if it is still there."""
        if not self._path.is_dir():
            return
        # By a process of its own: the one that serves the device meanwhile, to fail its requests, is not ours to reap.
        command = [sys.executable, "-m", "vdusefast", "del", self._config.device.name, "--force"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=2 * STOP_TIMEOUT_S)
        if self._pid:
            _reap(self._pid, STOP_TIMEOUT_S)
            self._pid = 0

    def reap(self) -> None:
        """Wait for its end: it is a child of ours."""
        if self._pid and not _reap(self._pid, STOP_TIMEOUT_S):
            raise ServerError(f"pid {self._pid} did not end in {STOP_TIMEOUT_S:g} s")

    def log_end(self) -> str:
        """Return the end of its log."""
        try:
            lines = (self._path / "log").read_text(errors="replace").splitlines()
        except OSError as error:
            return f"no log: {error.strerror}"
        return "; ".join(lines[-LOG_TAIL_LINES:]) or "it has said nothing"

    def _kill_starting(self, again_s: float, with_workers: bool, killed: threading.Event) -> None:
        """Kill the server that holds the run directory next, `again_s` after it has taken it."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            pid = run_dirs.holder_pid(self._path)
            if pid and pid != self._pid and run_dirs.is_held(self._path):
                break
            time.sleep(START_LOOK_S)
        else:
            return
        time.sleep(again_s)
        workers = self._workers_of(pid) if with_workers else []
        for one in (pid, *workers):
            try:
                os.kill(one, signal.SIGKILL)
                killed.set()
            except ProcessLookupError:
                continue

    def _workers_of(self, pid: int) -> list[int]:
        import psutil

        try:
            return [child.pid for child in psutil.Process(pid).children()]
        except psutil.NoSuchProcess:
            return []


def _reap(pid: int, timeout_s: float) -> bool:
    """Wait for the end of a child. Returns whether it has come."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return True
        except ChildProcessError:
            return True  # reaped already
        time.sleep(START_LOOK_S)
    return False
