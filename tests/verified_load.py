"""A verified load on a device of the loopback transport, while a test does something to it."""

from __future__ import annotations

import threading

from vdusefast.bench.raw.memory import Workload, make_job
from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver

MIB = 1 << 20


class Load:
    """A verified random read and write load on every queue, in a thread of its own."""

    def __init__(self, driver: LoopbackDriver, *, depth: int = 16, seconds: float = 2.0) -> None:
        rings = [driver.ring(queue) for queue in range(driver.queue_count)]
        load = Workload(
            kind="mixed",
            order="random",
            block_bytes=4096,
            depth=depth,
            size_bytes=8 * MIB,
            io_limit=0,
            verify="crc32c",
            check_after=True,
            runtime_s=seconds,
        )
        self.job = make_job(driver, load)
        self._driving = _driver.DriverThread(rings, [self.job], spin_us=20.0)
        self._thread = threading.Thread(target=self._driving.run)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Return whether requests are still being sent."""
        return self._thread.is_alive()

    def check(self) -> None:
        """Wait for the end and assert that every request and every block was right."""
        self._thread.join()
        results = self.job.results()
        assert results["request_errors"] == 0
        assert results["verify_errors"] == 0, results["faults"]
        assert results["verified"] > 0
        assert results["ops"]["write"]["ios"] > 0
