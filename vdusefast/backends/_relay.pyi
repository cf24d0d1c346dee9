"""Types of the relay's extension; see _relay.pyx for what each does."""

from collections.abc import Sequence

from vdusefast.backends.plugin import Plugin, StoreEvent

PATH_MAX_BYTES: int

class Client:
    def __init__(self, path: str, queue: int, memory_fd: int) -> None: ...
    @property
    def engine(self) -> object: ...
    def fileno(self) -> int: ...
    def events(self) -> list[StoreEvent]: ...
    def close(self) -> None: ...

class Server:
    def __init__(
        self,
        plugin: Plugin,
        *,
        places: Sequence[tuple[int, int]],
        slot_count: int,
        size_bytes: int,
        flushes: bool = True,
        read_only: bool = False,
    ) -> None: ...
    def serve(self, wake_fd: int) -> bool: ...
    def close(self) -> None: ...
