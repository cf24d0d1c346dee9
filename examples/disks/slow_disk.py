"""A disk with a latency, by asyncio: each request waits for itself, and all of them wait at once.

    vdusefast serve: uri = "python:examples/disks/slow_disk.py:SlowDisk?path=/srv/disk.img&delay_ms=2"

What a class does that asks a server for its data looks like this: an `await` where this one sleeps.
"""

import asyncio
import os

import vdusefast


class SlowDisk(vdusefast.Backend):
    """A file, late."""

    def __init__(self, path: str, delay_ms: str = "1") -> None:
        self.path, self.delay_s = path, float(delay_ms) / 1000

    async def open(self) -> None:
        self.fd = os.open(self.path, (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self.fd).st_size // 512 * 512

    def close(self) -> None:
        os.close(self.fd)

    async def pread(self, buffer: memoryview, offset_bytes: int) -> int:
        await asyncio.sleep(self.delay_s)
        return os.preadv(self.fd, [buffer], offset_bytes)

    async def pwrite(self, buffer: memoryview, offset_bytes: int) -> int:
        await asyncio.sleep(self.delay_s)
        return os.pwrite(self.fd, buffer, offset_bytes)

    async def flush(self) -> None:
        await asyncio.to_thread(os.fdatasync, self.fd)
