"""The states of a device, and a queue as it is shown to people."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from vdusefast.control.vq_states import VqState

if TYPE_CHECKING:
    from vdusefast.control.virtqueue import VqControl
    from vdusefast.control.worker_process import WorkerProcess


class DeviceState(StrEnum):
    """The state of a device."""

    CREATED = "created"
    ATTACHED = "attached"
    RUNNING = "running"
    SUSPENDED = "suspended"
    BROKEN = "broken"
    STOPPED = "stopped"


@dataclass(frozen=True)
class QueueInfo:
    """One queue, as shown to people. `pid` is -1 where there is no worker, `cpu` where it is not pinned, `irq_cpu`
    where its interrupts go as the kernel has them.
    """

    index: int
    pid: int
    size: int  # of the ring that the driver has set up, 0 when it has not
    cpu: int
    engine: str
    state: VqState
    reason: str  # why it failed, "" otherwise
    waiting_s: float = 0.0  # for how long its storage has kept it waiting, 0.0 when it does not
    restarts: int = 0  # workers that had to be replaced
    irq_cpu: int = -1
    poll: str = ""  # how an idle worker waits: "adaptive, 200 us", "always", "never"
    irq_hold: str = ""  # how long an interrupt may wait for more completions: "up to 200 us", "none"


def queue_info(
    vq: VqControl, worker: WorkerProcess | None, waiting_s: float, irq_cpu: int | None, *, driver_runs: bool
) -> QueueInfo:
    """Return a queue as it is shown. The caller has read its worker once: another thread may replace it."""
    unused = driver_runs and vq.state == VqState.STOPPED and not vq.ring_size
    pid, engine = (worker.pid, worker.engine) if worker is not None else (-1, "")
    spec = vq.slot.spec
    return QueueInfo(
        vq.index,
        pid,
        vq.ring_size,
        spec.cpu,
        engine,
        VqState.UNUSED if unused else vq.state,
        vq.reason,
        waiting_s=round(waiting_s, 1),
        restarts=vq.restart_count,
        irq_cpu=-1 if irq_cpu is None else irq_cpu,
        poll="never" if spec.poll_us == 0 else f"adaptive, {spec.poll_us} us" if spec.poll_us > 0 else "always",
        irq_hold=f"up to {spec.irq_delay_us} us" if spec.irq_delay_us else "none",
    )
