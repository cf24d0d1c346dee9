"""Request memory of a job: one region that the device sees, laid out as the driver's loop expects it."""

from __future__ import annotations

from dataclasses import dataclass

from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import ConfigError
from vdusefast.transport import uapi

PAGE_BYTES = 4096
DESCRIPTOR_BYTES = 16
LINE_BYTES = 64


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def data_segments(driver: LoopbackDriver, block_bytes: int) -> int:
    """Return how many data descriptors a block takes. Raises ConfigError when the device takes fewer."""
    count = -(-block_bytes // driver.size_max_bytes)
    most = min(driver.seg_max, _driver.DATA_SEGMENTS_MAX)
    if count > most:
        raise ConfigError(
            f"bs={block_bytes}: the device takes requests of up to {most * driver.size_max_bytes} bytes "
            f"({most} segments of {driver.size_max_bytes}); use a smaller block size"
        )
    return count


def needs_indirect(driver: LoopbackDriver, segment_count: int, depth: int, queue_count: int) -> bool:
    """Return True when requests go through indirect tables: the rings would not hold the depth otherwise.

    Direct chains cost less while they fit. Raises ConfigError when a single request does not fit and indirect
    tables were not negotiated.
    """
    if segment_count * depth <= driver.queue_size * queue_count and segment_count <= driver.queue_size:
        return False
    if driver.has(uapi.VIRTIO_RING_F_INDIRECT_DESC):
        return True
    if segment_count > driver.queue_size:
        raise ConfigError(
            f"a request takes {segment_count} descriptors, the queue has {driver.queue_size} and the device takes no "
            "indirect descriptors; use a larger --queue-size"
        )
    return False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The requests of one job, over [offset_bytes, offset_bytes + size_bytes) of the device."""

    kind: str
    order: str
    block_bytes: int
    depth: int
    size_bytes: int
    offset_bytes: int = 0
    io_limit: int | None = None  # requests in all; None = each block once, 0 = without limit
    queue_count: int | None = None  # queues that the job uses; None = all
    read_share: float = 0.5
    fsync_every: int = 0
    verify: str = "none"
    pattern: bytes = b""
    check_after: bool = False
    seed: int = 1  # goes into verified blocks
    order_seed: int = 1
    ramp_s: float = 0.0
    runtime_s: float = 0.0
    moves_no_data: bool = False
    overlap: bool = False  # some writes are followed at once by another to the same block: one queue, served in order

    @property
    def block_count(self) -> int:
        """Blocks of the device that the job uses."""
        return self.size_bytes // self.block_bytes


def make_job(driver: LoopbackDriver, load: Workload) -> _driver.Job:
    """Return a job with memory of its own, which `driver` keeps.

    Raises ConfigError when the device cannot take such requests.
    """
    segment_count = data_segments(driver, load.block_bytes) + 2
    indirect = needs_indirect(driver, segment_count, load.depth, load.queue_count or driver.queue_count)
    stride_bytes = _round_up(load.block_bytes, PAGE_BYTES)
    table_bytes = _round_up(DESCRIPTOR_BYTES * segment_count, LINE_BYTES)
    tables_at = _round_up(_driver.SLOT_BYTES * load.depth, PAGE_BYTES)
    data_at = tables_at + (_round_up(table_bytes * load.depth, PAGE_BYTES) if indirect else 0)
    region = driver.add_region(data_at + stride_bytes * load.depth)
    job = _driver.Job(
        kind=load.kind,
        order=load.order,
        offset_bytes=load.offset_bytes,
        block_count=load.block_count,
        block_bytes=load.block_bytes,
        depth=load.depth,
        io_limit=load.block_count if load.io_limit is None else load.io_limit,
        slot_va=region.address,
        slot_iova=region.iova,
        data_va=region.address + data_at,
        data_iova=region.iova + data_at,
        data_stride_bytes=stride_bytes,
        table_va=region.address + tables_at,
        table_iova=region.iova + tables_at,
        table_stride_bytes=table_bytes,
        segment_count=segment_count,
        size_max_bytes=min(driver.size_max_bytes, 0xFFFFFFFF),
        read_share=load.read_share,
        fsync_every=load.fsync_every if driver.has(uapi.VIRTIO_BLK_F_FLUSH) else 0,
        verify=load.verify,
        pattern=load.pattern,
        check_after=load.check_after,
        seed=load.seed,
        order_seed=load.order_seed,
        ramp_s=load.ramp_s,
        runtime_s=load.runtime_s,
        indirect=indirect,
        moves_no_data=load.moves_no_data,
        overlap=load.overlap,
    )
    if load.verify == "none" and load.kind in ("write", "mixed"):
        job.fill_buffers(load.order_seed)
    return job
