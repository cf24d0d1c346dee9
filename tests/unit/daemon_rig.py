"""A service over a made-up device, for tests of the process that serves one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vdusefast import errors
from vdusefast.base.start_mode import StartMode
from vdusefast.config import Config, make_config
from vdusefast.server.rpc_client import NoServerError, RpcClient
from vdusefast.server.service import Service
from vdusefast.state.run_dir import RunDirectory


class FakeDevice:
    """In place of api.Device for the service: it holds its run directory while it runs."""

    def __init__(self, config: Config, base: Path) -> None:
        self.name = config.device.name
        self.node = "/dev/vdfake"
        self.failure: errors.VdusefastError | None = None
        self.start_error: Exception | None = None
        self.start_takes_s = 0.0
        self.stops: list[tuple[float, bool]] = []
        self.hand_overs: list[float] = []
        self.starts: list[StartMode] = []
        self.recovered = False
        self.upgraded = ""
        self.outlives_server = config.device.transport == "kernel" and "memory:" not in config.backend.uri
        self.proofs: list[bool] = []
        self.proof_error: errors.VdusefastError | None = None
        self.forced: list[float] = []
        self.store_failure: dict[str, int] | None = None
        self.stop_gate = threading.Event()
        self.stop_gate.set()
        self.healthy = True
        self._base = base
        self._directory: RunDirectory | None = None

    def start(self, *, mode: StartMode = StartMode.ADD) -> None:
        self.starts.append(mode)
        directory = RunDirectory(self.name, self._base)
        try:
            time.sleep(self.start_takes_s)
            if self.start_error is not None:
                raise self.start_error
        except BaseException:
            directory.close()
            raise
        self._directory = directory

    def prove(self, *, look: bool = True) -> None:
        self.proofs.append(look)
        if self.proof_error is not None:
            raise self.proof_error

    def force(self, timeout_s: float = 30.0) -> None:
        self.forced.append(timeout_s)
        self.stop_gate.set()

    def stop(self, timeout_s: float = 30.0, *, force: bool = False) -> None:
        if self._directory is None:
            return
        self.stops.append((timeout_s, force))
        assert self.stop_gate.wait(10)
        self._directory.close()
        self._directory = None

    def hand_over(self, timeout_s: float = 30.0) -> None:
        if self._directory is None:
            return
        self.hand_overs.append(timeout_s)
        assert self.stop_gate.wait(10)
        self._directory.release()
        self._directory = None

    def resize(self, size_bytes: int | None = None, *, force: bool = False) -> int:
        return size_bytes or 0

    def forgive_store(self) -> None:
        self.store_failure = None

    def info(self) -> dict[str, Any]:
        state = {"state": "running", "store_failure": self.store_failure}
        return {"name": self.name, "node": self.node, "pid": os.getpid(), **state}

    def stats(self) -> Any:
        class Stats:
            def to_dict(self) -> dict[str, Any]:
                return {"total": {"requests": 5}}

        return Stats()

    def responds(self, timeout_s: float) -> bool:
        return self.healthy


class Rig:
    """A service in this thread, and in another one what a test does once the device is usable."""

    def __init__(
        self,
        base: Path,
        *,
        uri: str = "null:1M",
        mode: StartMode = StartMode.ADD,
        **overrides: Any,
    ) -> None:
        self.base = base
        self.device: FakeDevice
        # The service would lock the memory of this process, and all of its threads would stay marked.
        config = make_config(name="vd0", uri=uri, **({"lock_memory": "off"} | overrides))
        self.service = Service(config, base, mode, make_device=self._make)
        self.path = base / "vd0"
        self.result: Any = None
        self.error: BaseException | None = None

    def _make(self, config: Config, base: Path) -> FakeDevice:
        self.device = FakeDevice(config, base)
        return self.device

    def run(self, act: Callable[[], Any]) -> None:
        """Serve until `act`, whose result or error is kept, has ended the service."""
        threads = []

        def ready(info: dict[str, Any]) -> None:
            assert info["run_dir"] == str(self.path)
            threads.append(threading.Thread(target=self._act, args=(act,)))
            threads[0].start()

        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that comes late must not end the tests
        try:
            self.service.run(ready)
            for thread in threads:
                thread.join(60)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _act(self, act: Callable[[], Any]) -> None:
        try:
            self.result = act()
        except BaseException as error:
            self.error = error
            os.kill(os.getpid(), signal.SIGTERM)

    def wait_until_it_listens(self) -> None:
        """Wait until the service takes connections; it has its device a moment earlier."""
        deadline = time.monotonic() + 20
        while True:
            try:
                RpcClient(self.path).close()
                return
            except NoServerError:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def call(self, method: str, **params: Any) -> Any:
        with RpcClient(self.path) as client:
            return client.call(method, params)
