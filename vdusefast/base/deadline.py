"""Time limits for waiting in a task, also while the task is being cancelled.

asyncio.timeout before Python 3.11.3 (Debian 12 has 3.11.2) takes its own time-out for a cancellation in a task that has
been cancelled before: a task that cleans up after a cancellation, and waits for that with a limit, would not clean up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def limit(timeout_s: float | None) -> AsyncIterator[None]:
    """Raise TimeoutError if the block has not ended after `timeout_s`; None = no limit."""
    task = asyncio.current_task()
    assert task is not None
    cancelling = task.cancelling()
    scope = asyncio.timeout(timeout_s)
    try:
        async with scope:
            yield
    except asyncio.CancelledError:
        if scope.expired() and task.cancelling() <= cancelling:
            raise TimeoutError from None
        raise
