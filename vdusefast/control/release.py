"""The order in which the parts of a device are released, whatever the order in which they were made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from enum import IntEnum, auto


class Part(IntEnum):
    """The parts of a device, the first to be released first. The supervisor has ended, and the workers with it."""

    RELAY = auto()  # the process: its workers have ended
    KEEPER_WATCH = auto()  # before the loop, which watches the keeper
    LOOP = auto()  # workers that are left die with its thread
    RELAY_SOCKETS = auto()
    KEEPER = auto()  # the process; it stays for the next server of a device that is kept
    WITNESS = auto()  # of write-backs that fail
    STORE_NOTES = auto()
    PAGES = auto()
    STORE = auto()  # with its lock: nobody of ours reaches it any more
    DIRECTORY = auto()  # last: another server may serve the device from here on


class Release:
    """What a device has to release. Each part is added once it is there."""

    def __init__(self) -> None:
        self._closers: dict[Part, Callable[[], object]] = {}

    def add(self, part: Part, close: Callable[[], object]) -> None:
        """Note how a part is released."""
        assert part not in self._closers
        self._closers[part] = close

    def close(self) -> None:
        """Release all parts, also after one that fails. Raises what the last of these has raised."""
        closers, self._closers = self._closers, {}
        with ExitStack() as stack:
            for part in sorted(closers, reverse=True):  # the stack calls the last one first
                stack.callback(closers[part])
