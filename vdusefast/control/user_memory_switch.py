"""Which memory the driver's data goes through: the kernel's bounce pages, or user memory in their place.

The change is made once, soon after the driver's first request: the kernel takes no memory before. Every worker
completes the requests that it has popped, drops the region and pops nothing more. Only then is our memory registered:
a worker that still used the old pages would read and write data that the driver does not see. Then all continue. For
the driver this is a moment of slow storage.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from vdusefast.control.virtqueue import VqControl
from vdusefast.transport.user_memory import UserMemory, UserMemoryError

LOOK_MIN_S = 0.005  # between two checks whether the driver has begun
LOOK_MAX_S = 0.5
HOLD_S = 1.0  # for the workers to complete their requests; a slower store must not be waited for
TRY_AGAIN_S = 5.0
TRY_COUNT = 3

_log = logging.getLogger("vdusefast")


class MemoryControl:
    """The memory of one device. `text` names it for people, and may be read from any thread."""

    def __init__(self, name: str, memory: UserMemory, vqs: Sequence[VqControl], before: str):
        """Prepare to put `memory` (borrowed) to use in place of what is called `before`; see `run`."""
        self.text = before
        self._name = name
        self._memory = memory
        self._vqs = vqs

    async def run(self) -> None:
        """Put the memory to use as soon as the kernel takes it. Returns when that is done or has failed.

        The device is served in both cases. To be cancelled when the device ends.
        """
        try:
            self._memory.is_due()  # a kernel that never takes any says so before it is allocated
            await asyncio.to_thread(self._memory.fill)
            for _ in range(TRY_COUNT):
                await self._wait_due()
                if await self._switch():
                    self.text = "user memory (huge pages)" if self._memory.huge else "user memory"
                    return
                await asyncio.sleep(TRY_AGAIN_S)
            why = "the workers do not come to rest"
        except UserMemoryError as error:
            why = str(error)
        except OSError as error:  # the device is broken, which is reported by its messages
            why = str(error.strerror)
        self.give_up(why)

    def give_up(self, why: str = "an internal failure, see the log") -> None:
        """Leave the memory as it is."""
        self.text = f"{self.text}; no user memory: {why}"
        _log.warning("device %s: no user memory: %s", self._name, why)

    async def _wait_due(self) -> None:
        pause_s = LOOK_MIN_S
        while not self._memory.is_due():
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_MAX_S)

    async def _switch(self) -> bool:
        """Register the memory while no worker touches the driver's data. Returns whether that is done.

        Raises UserMemoryError, OSError.
        """
        last = self._memory.size_bytes - 1
        held: list[VqControl] = []
        try:
            holds = (self._hold(vq, last, held) for vq in self._vqs)
            rests = await asyncio.gather(*holds, return_exceptions=True)  # none may be held after this returns
            for rest in rests:
                if isinstance(rest, BaseException):
                    raise rest
            return all(rests) and self._memory.register()
        finally:
            await asyncio.gather(*(vq.release(self._memory.used_bytes) for vq in held))

    @staticmethod
    async def _hold(vq: VqControl, last: int, held: list[VqControl]) -> bool:
        await vq.lock()
        held.append(vq)
        return await vq.hold(last, HOLD_S)
