"""A look at a device every second: queues that wait for their storage, CPUs that come and go, failed write-back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from vdusefast.base.guard import PAUSE_S, Guard, Part
from vdusefast.control.cpu_watch import CpuWatch
from vdusefast.control.failures import Failures
from vdusefast.control.stall_watch import LOOK_S, QueueWatch
from vdusefast.control.virtqueue import VqControl
from vdusefast.control.vq_states import VqState
from vdusefast.control.worker_process import Pages
from vdusefast.control.write_back import WriteBack
from vdusefast.errors import VdusefastError
from vdusefast.transport import Transport

_STORE = "store"  # the key of its failure


class DeviceWatch:
    """The watch over one device. `waiting_s` and `missing_cpus` may be used in any thread."""

    def __init__(
        self,
        name: str,
        pages: Pages,
        vqs: Sequence[VqControl],
        transport: Transport,
        guard: Guard,
        failures: Failures,
        write_back: WriteBack | None,
        place_irqs: Callable[[], None],
    ):
        """Prepare; see `begin`. All arguments are borrowed. place_irqs: sends interrupts where they belong."""
        self._vqs = vqs
        self._transport = transport
        self._guard = guard
        self._failures = failures
        self._write_back = write_back
        self._place_irqs = place_irqs
        self._store_failed = False
        self._cpus = CpuWatch()
        self._stalls = QueueWatch(name, pages, len(vqs))

    @property
    def allowed_cpus(self) -> frozenset[int]:
        """The CPUs that workers may run on now."""
        return self._cpus.cpus.allowed

    @property
    def store_failure(self) -> VdusefastError | None:
        """Why every flush fails, None when the store's data is safe."""
        return self._write_back.failure() if self._write_back is not None else None

    @property
    def missing_cpus(self) -> str:
        """Which workers and interrupts are not on the CPU that they belong on, for people."""
        lost = [
            f"queue {vq.index} is not pinned: CPU {vq.slot.missing_cpu} is gone"
            for vq in self._vqs
            if vq.slot.missing_cpu >= 0
        ]
        lost += [
            f"interrupts of queue {index} go to any CPU: CPU {cpu} is not online"
            for index, cpu in enumerate(self._transport.irq_cpus)
            if cpu is not None and cpu not in self._cpus.cpus.online
        ]
        return "; ".join(lost)

    def waiting_s(self, queue: int, now_s: float) -> float:
        """Return for how many seconds `queue` has waited for its storage, 0.0 when it does not."""
        return self._stalls.waiting_s(queue, now_s)

    def begin(self, pause_s: float = 0.0) -> None:
        """Begin to watch after a pause, and again after an unexpected exception."""
        self._guard.task(Part.QUEUE_WATCH, self._watch(pause_s), lambda: self.begin(PAUSE_S))

    def check_store(self) -> None:
        """Make flushes fail if a worker died that knew of a failed write-back."""
        if self._write_back is not None:
            self._write_back.look()

    async def _watch(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        while True:
            await asyncio.sleep(LOOK_S)
            self._failures.settle()
            self._report_store_failure()
            for vq in self._vqs:
                serves = vq.state not in (VqState.STOPPED, VqState.FAILED)
                self._stalls.look(vq.index, time.monotonic(), serves=serves)
            if self._cpus.look():
                self._follow_cpus()

    def _follow_cpus(self) -> None:
        """Have workers and interrupts where they belong, as far as those CPUs are there."""
        for vq in self._vqs:
            vq.slot.follow(self.allowed_cpus)
        self._place_irqs()

    def _report_store_failure(self) -> None:
        error = self.store_failure
        if error is None:
            self._failures.end(_STORE)
        elif not self._store_failed:
            self._failures.begin(error, _STORE)
        self._store_failed = error is not None
