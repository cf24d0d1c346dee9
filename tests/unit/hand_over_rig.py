"""Servers of one device, each a process, and a load that goes through all of them: for tests of a hand-over."""

from __future__ import annotations

import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from vdusefast.bench.torture.loopback_host import LoopbackHost
from vdusefast.config import Config
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.state import run_dir

BLOCK_BYTES = 4096
READY_S = 30.0


class Servers:
    """Servers of one device on one bus, each a process."""

    def __init__(self, base: Path, host: LoopbackHost, config: Config) -> None:
        self.base, self.host, self.config = base, host, config
        self.path = base / config.device.name
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self, which: str, wrong: str = "", config: Config | None = None, limit_s: float = READY_S
    ) -> subprocess.Popen[str]:
        text = msgspec.json.encode(config or self.config).decode()
        script = str(Path(__file__).with_name("successor.py"))
        words = [script, str(self.host.path), str(self.base), text, which, wrong, str(limit_s)]
        process = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.communicate()
        if self.path.exists():
            run_dir.RunDirectory(self.path.name, self.base, "loopback").close()


def said_pid(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], READY_S)[0]
    return int(process.stdout.readline())


class Load:
    """Writes and reads back on both queues until `stop`; keeps any error."""

    def __init__(self, driver: LoopbackDriver) -> None:
        self.driver = driver
        self.done = [0, 0]
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(queue,)) for queue in range(2)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(READY_S)
        assert self.error is None

    def wait_more(self) -> None:
        """Wait until each queue has completed requests that were sent from now on."""
        goal = [done + 3 for done in self.done]
        until = time.monotonic() + READY_S
        while any(done < wanted for done, wanted in zip(self.done, goal, strict=True)):
            assert self.error is None
            assert time.monotonic() < until
            time.sleep(0.005)

    def _run(self, queue: int) -> None:
        number = 0
        try:
            while not self._stop.is_set():
                number += 1
                at = (2 * (number % 64) + queue) * BLOCK_BYTES
                data = number.to_bytes(8, "little") * (BLOCK_BYTES // 8)
                self.driver.write(at, data, queue=queue)
                assert self.driver.read(at, BLOCK_BYTES, queue=queue) == data
                self.done[queue] = number
        except BaseException as error:
            self.error = error
