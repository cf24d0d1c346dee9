"""Counters of a running device as plain Python values, for people and for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vdusefast.state.shared_pages import COUNTERS, OP_FIELDS, OPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from vdusefast.control.states import QueueInfo
    from vdusefast.state.shared_pages import FlushFailure, SharedPages

PERCENTILES = (0.5, 0.9, 0.99, 0.999)
# Not a sum when queues are added up.
_LATEST = ("last_host_errno",)


@dataclass(frozen=True)
class OpStats:
    """One kind of operation. `hist` counts latencies in nanoseconds, in the buckets of histogram.bucket_bounds_ns."""

    requests: int
    bytes: int
    errors: int
    hist: npt.NDArray[np.uint64]

    def to_dict(self) -> dict[str, Any]:
        """Return counters, and latencies as percentiles in nanoseconds."""
        from vdusefast.state.histogram import percentile_ns

        latency_ns = percentile_ns(self.hist, PERCENTILES)
        named = {f"p{fraction * 100:g}": float(ns) for fraction, ns in zip(PERCENTILES, latency_ns, strict=True)}
        return {"requests": self.requests, "bytes": self.bytes, "errors": self.errors, "latency_ns": named}


class Counters:
    """All counters of csrc/base/counters.h as ints, under their names there, and one OpStats a kind in `ops`."""

    requests: int
    batches: int
    kicks: int
    irqs: int
    irqs_suppressed: int
    spins: int
    sleeps: int
    relooks: int
    iotlb_misses: int
    bad_requests: int
    unsupported: int
    host_errors: int
    host_enospc: int
    host_eio: int
    last_host_errno: int
    ring_errors: int
    memory_faults: int
    invalidations: int

    def __init__(self, counters: dict[str, int], ops: dict[str, OpStats]):
        """Keep `counters`, by name, and `ops`, by name of the operation (shm.OPS)."""
        self.__dict__.update(counters)
        self.counters = counters
        self.ops = ops

    @property
    def bytes_read(self) -> int:
        """Bytes that the driver read."""
        return self.ops["read"].bytes

    @property
    def bytes_written(self) -> int:
        """Bytes that the driver wrote."""
        return self.ops["write"].bytes

    @property
    def errors(self) -> int:
        """Requests completed with an error of any kind."""
        return sum(op.errors for op in self.ops.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        sums = {"bytes_read": self.bytes_read, "bytes_written": self.bytes_written, "errors": self.errors}
        return {**self.counters, **sums, "ops": {name: op.to_dict() for name, op in self.ops.items()}}


class QueueStats(Counters):
    """One queue: its worker and its counters."""

    def __init__(self, info: QueueInfo, counters: dict[str, int], ops: dict[str, OpStats]):
        """Keep the supervisor's info about the queue and its worker's counters."""
        super().__init__(counters, ops)
        self.index = info.index
        self.pid = info.pid
        self.size = info.size
        self.cpu = info.cpu
        self.engine = info.engine
        self.state = info.state
        self.reason = info.reason
        self.waiting_s = info.waiting_s
        self.restarts = info.restarts
        self.irq_cpu = info.irq_cpu
        self.poll = info.poll
        self.irq_hold = info.irq_hold

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        worker = {"index": self.index, "pid": self.pid, "cpu": self.cpu, "irq_cpu": self.irq_cpu, "engine": self.engine}
        waits = {"size": self.size, "poll": self.poll, "irq_hold": self.irq_hold}
        stands = {"state": str(self.state), "reason": self.reason, "waiting_s": self.waiting_s}
        return {**worker, **waits, **stands, "restarts": self.restarts, **super().to_dict()}


class DeviceStats(Counters):
    """A device: `queues`, and their sums under the same names."""

    def __init__(self, name: str, queues: Sequence[QueueStats], store_failure: FlushFailure | None = None):
        """Add up `queues`, of which there is at least one. store_failure: why every flush of the device fails."""
        counters = {field: sum(queue.counters[field] for queue in queues) for field in COUNTERS if field not in _LATEST}
        for field in _LATEST:
            counters[field] = next((queue.counters[field] for queue in queues if queue.counters[field]), 0)
        super().__init__(counters, {op: _add_up([queue.ops[op] for queue in queues]) for op in OPS})
        self.name = name
        self.queues = list(queues)
        self.store_failure = store_failure

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        failure = self.store_failure
        return {
            "name": self.name,
            "store_failure": {"errno": failure.errno, "since_s": failure.since_s} if failure is not None else None,
            "queues": [queue.to_dict() for queue in self.queues],
            "total": super().to_dict(),
        }


def _add_up(parts: Sequence[OpStats]) -> OpStats:
    hist = parts[0].hist.copy()
    for other in parts[1:]:
        hist += other.hist
    return OpStats(sum(p.requests for p in parts), sum(p.bytes for p in parts), sum(p.errors for p in parts), hist)


def read_stats(name: str, pages: SharedPages, infos: Sequence[QueueInfo]) -> DeviceStats:
    """Copy the counters of device `name` out of its shared pages; `infos` has one entry a queue. Imports NumPy."""
    queues = []
    for info in infos:
        record = pages.counters(info.index)
        ops = {}
        for place, op in enumerate(OPS):
            requests, bytes_, errors = (int(record["op"][place][field]) for field in OP_FIELDS)
            ops[op] = OpStats(requests, bytes_, errors, pages.hist(info.index, op))
        queues.append(QueueStats(info, {field: int(record[field]) for field in COUNTERS}, ops))
    return DeviceStats(name, queues, pages.flush_failure())
