"""Types of the driver's side of a device at C speed."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

SEGMENTS_MAX: int
DATA_SEGMENTS_MAX: int
SLOT_BYTES: int
QUEUES_MAX: int
BLOCK_UNKNOWN: int
HIST_BUCKET_COUNT: int
OPS: tuple[str, ...]
KINDS: tuple[str, ...]
VERIFIES: tuple[str, ...]
ORDERS: tuple[str, ...]
FAULTS: tuple[str, ...]
PHASES: tuple[str, ...]
PACKED_FRESH: int

Segment = tuple[int, int, bool]

class OpResults(TypedDict):
    ios: int
    bytes: int
    lat_sum_ns: int
    lat_min_ns: int
    lat_max_ns: int
    hist: bytes

class Fault(TypedDict):
    kind: str
    op: str
    offset_bytes: int
    block: int
    expected: int
    found: int
    where: int

class JobResults(TypedDict):
    ops: dict[str, OpResults]
    run_ns: int
    start_ns: int
    end_ns: int
    check_ns: int
    request_errors: int
    verify_errors: int
    verified: int
    faults: list[Fault]

def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int: ...
def crc32c_soft(data: bytes | bytearray | memoryview, crc: int = 0) -> int: ...
def fill_block(block: bytearray | memoryview, offset_bytes: int, generation: int, seed: int) -> None: ...
def check_block(
    block: bytes | bytearray | memoryview, offset_bytes: int, generation: int = 0, seed: int = 0
) -> str: ...
def sequence(order: str, count: int, seed: int, length: int) -> list[int]: ...

class Ring:
    def __init__(
        self,
        index: int,
        size: int,
        *,
        desc_va: int,
        driver_va: int,
        device_va: int,
        kick_fd: int,
        irq_fd: int,
        event_idx: bool,
        packed: bool = False,
        in_order: bool = False,
        start: int | None = None,
    ) -> None: ...
    def close(self) -> None: ...
    def add(self, chain: Sequence[Segment], cookie: int = 0) -> int: ...
    def add_indirect(self, chain: Sequence[Segment], table_va: int, table_iova: int, cookie: int = 0) -> int: ...
    def publish(self) -> bool: ...
    def kick(self) -> None: ...
    def reap(self) -> list[tuple[int, int, int]]: ...
    def wait(self, timeout_ms: int) -> bool: ...
    def take_gap_s(self) -> float: ...
    def counters(self) -> dict[str, int]: ...
    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def free_count(self) -> int: ...
    @property
    def inflight(self) -> int: ...
    @property
    def avail_idx(self) -> int: ...
    @property
    def last_used_idx(self) -> int: ...
    @property
    def position(self) -> int: ...

class Job:
    def __init__(
        self,
        *,
        kind: str,
        order: str,
        offset_bytes: int,
        block_count: int,
        block_bytes: int,
        depth: int,
        io_limit: int,
        slot_va: int,
        slot_iova: int,
        data_va: int,
        data_iova: int,
        data_stride_bytes: int,
        table_va: int = 0,
        table_iova: int = 0,
        table_stride_bytes: int = 0,
        segment_count: int = 3,
        size_max_bytes: int = 131072,
        read_share: float = 0.5,
        fsync_every: int = 0,
        verify: str = "none",
        pattern: bytes = b"",
        check_after: bool = False,
        seed: int = 1,
        order_seed: int = 1,
        ramp_s: float = 0.0,
        runtime_s: float = 0.0,
        indirect: bool = False,
        moves_no_data: bool = False,
        overlap: bool = False,
    ) -> None: ...
    def fill_buffers(self, seed: int) -> None: ...
    def forget(self, first_block: int, block_count: int) -> None: ...
    def journal(self) -> bytes: ...
    @property
    def phase(self) -> str: ...
    def progress(self) -> tuple[int, int]: ...
    def errors(self) -> tuple[int, int]: ...
    def results(self) -> JobResults: ...

class DriverThread:
    def __init__(
        self, rings: Iterable[Ring], jobs: Iterable[Job], *, spin_us: float = 0.0, stall_s: float = 30.0
    ) -> None: ...
    def run(self) -> None: ...
    def stop(self, *, abandon: bool = False) -> None: ...
    def counters(self) -> dict[str, int]: ...
