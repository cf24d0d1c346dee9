from collections.abc import Sequence
from typing import TypedDict

class About(TypedDict):
    size_bytes: int
    object_bytes: int
    stripe_unit_bytes: int
    stripe_count: int
    exclusive_lock: int
    caches: int
    early_writes: int
    identity: bytes

class Failure(Exception):
    step: str
    error: int
    keyrings: str
    names: list[str]

class Settings:
    def __init__(
        self, names: Sequence[str], *, read_only: bool, early_writes: bool, connect_limit_s: int, op_limit_s: int
    ) -> None: ...

def look(settings: Settings) -> About: ...

class Engine:
    def __init__(
        self,
        settings: Settings,
        *,
        size_bytes: int,
        timeout_s: float,
        reconnect_s: float,
        notes_fd: int,
        notes_offset: int,
    ) -> None: ...
    @property
    def engine(self) -> object: ...
    def fileno(self) -> int: ...
    def events(self) -> list[tuple[str, str, int, int]]: ...
    def close(self) -> bool: ...
