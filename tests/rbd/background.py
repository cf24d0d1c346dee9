"""A call in a thread, so that the test continues meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
LIMIT_S = 20.0


class Background(Generic[T]):
    """Begins at once; `result` waits for its end."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._results: list[T] = []
        self._thread = threading.Thread(target=lambda: self._results.append(call()), daemon=True)
        self._thread.start()

    def result(self) -> T:
        """Return what the call has returned."""
        self._thread.join(LIMIT_S)
        assert self._results, "no result"
        return self._results[0]
