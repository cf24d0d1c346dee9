"""Time limits that hold in a task that is being cancelled, as asyncio's own do from Python 3.11.3 on."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

import vdusefast
from vdusefast.base.deadline import limit


async def expires(timeout_s: float | None = 0.01) -> bool:
    try:
        async with limit(timeout_s):
            await asyncio.sleep(30)
    except TimeoutError:
        return True
    return False


def test_limit_expires() -> None:
    assert asyncio.run(expires())


def test_limit_expires_while_its_task_is_being_cancelled() -> None:
    async def cleans_up() -> bool:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            return await expires()
        return False

    async def scene() -> bool:
        task = asyncio.create_task(cleans_up())
        await asyncio.sleep(0)
        task.cancel()
        return await task

    assert asyncio.run(scene())


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_cancellation_from_outside_is_none_of_its_own(timeout_s: float | None) -> None:
    async def scene() -> None:
        task = asyncio.create_task(expires(timeout_s))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())


def test_nothing_else_is_used() -> None:
    for path in Path(vdusefast.__file__).parent.rglob("*.py"):
        if path.name != "deadline.py" and "bench" not in path.parts:
            assert not re.search(r"asyncio\.timeout", path.read_text()), path
