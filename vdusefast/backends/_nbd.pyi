"""Types of what Python needs of csrc/nbd."""

from typing import TypedDict

from vdusefast.backends.plugin import StoreEvent

class Export(TypedDict):
    size_bytes: int
    block_min_bytes: int
    block_preferred_bytes: int
    block_max_bytes: int
    read_only: bool
    is_rotational: bool
    can_flush: bool
    can_fua: bool
    can_trim: bool
    can_zero: bool
    can_fast_zero: bool
    can_multi_conn: bool

class ProbeError(Exception):
    stage: str
    err: int
    text: str

def probe(uri: str, limit_ms: int) -> Export: ...
def list_exports(uri: str, limit_ms: int) -> tuple[list[str], int]: ...
def library() -> tuple[str, bool]: ...

class Engine:
    def __init__(
        self,
        uri: str,
        *,
        size_bytes: int,
        block_size_bytes: int,
        read_only: bool,
        timeout_s: float,
        reconnect_s: float,
        sole: bool = False,
        hold_fd: int = -1,
        notes_fd: int = -1,
        notes_offset: int = 0,
    ) -> None: ...
    @property
    def engine(self) -> object: ...
    def fileno(self) -> int: ...
    def events(self) -> list[StoreEvent]: ...
    def close(self) -> None: ...
