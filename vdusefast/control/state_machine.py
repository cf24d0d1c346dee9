"""States, events, and one table that says which event each state allows and where it leads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class ForbiddenEventError(RuntimeError):
    """An event came in a state that does not allow it: a fault in our own code. The message names both."""


@dataclass(frozen=True)
class Transition(Generic[S, E]):
    """One row of a table. `target` is None where each of the `sources` stays as it is."""

    event: E
    sources: tuple[S, ...]
    target: S | None


class TransitionTable(Generic[S, E]):
    """All transitions of one kind of machine."""

    def __init__(self, rows: Sequence[Transition[S, E]]):
        """Hold `rows`. Raises ValueError when two rows are about the same state and event."""
        self.rows = tuple(rows)
        self._targets: dict[tuple[S, E], S] = {}
        for row in self.rows:
            for source in row.sources:
                if (source, row.event) in self._targets:
                    raise ValueError(f"{source.name} has two rows for the event {row.event.name}")
                self._targets[source, row.event] = source if row.target is None else row.target

    def allows(self, state: S, event: E) -> bool:
        """Return whether `event` may come in `state`."""
        return (state, event) in self._targets

    def target(self, state: S, event: E) -> S:
        """Return the state that follows. Raises ForbiddenEventError."""
        try:
            return self._targets[state, event]
        except KeyError:
            raise ForbiddenEventError(f"the event {event.name} is not allowed in the state {state.name}") from None


class StateMachine(Generic[S, E]):
    """One machine. `state` may be read in any thread; `apply` is for one thread."""

    def __init__(self, table: TransitionTable[S, E], first: S):
        """Begin in the state `first`."""
        self.state = first
        self._table = table

    def apply(self, event: E) -> tuple[S, S]:
        """Enter the state that follows from `event`. Returns the state before and the state now.

        Raises ForbiddenEventError; the state stays then.
        """
        before = self.state
        self.state = self._table.target(before, event)
        return before, self.state
