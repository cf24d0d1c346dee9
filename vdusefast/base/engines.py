"""The properties of the core's engines: one row for each line of csrc/engine/engines.c."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

EngineName = Literal["auto", "sync", "cached", "uring", "memory", "null"]


class EngineTraits(NamedTuple):
    """An engine as a configuration may name it."""

    serves_files: bool = False
    completes_in_order: bool = True  # requests end in the order in which they were popped
    writes_in_order: bool = True  # a queue's writes reach the store in that order
    uses_io_uring: bool = False


ENGINES = {
    "sync": EngineTraits(serves_files=True),
    "cached": EngineTraits(serves_files=True, completes_in_order=False, uses_io_uring=True),
    "uring": EngineTraits(serves_files=True, completes_in_order=False, writes_in_order=False, uses_io_uring=True),
    "memory": EngineTraits(),
    "null": EngineTraits(writes_in_order=False),  # it writes nothing
}
NAMES: tuple[str, ...] = get_args(EngineName)
assert ("auto", *ENGINES) == NAMES
FILE_CHOICES = ["auto", *(name for name, engine in ENGINES.items() if engine.serves_files)]
OF_ONE_STORE = tuple(name for name, engine in ENGINES.items() if not engine.serves_files)  # named as that kind of store
IO_URING = tuple(name for name, engine in ENGINES.items() if engine.uses_io_uring)
