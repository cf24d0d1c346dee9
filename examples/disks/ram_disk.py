"""A disk in memory, twice: a call for each request, and all requests of a round at once.

    vdusefast serve: uri = "python:examples/disks/ram_disk.py:RamDisk?size=256M"
    vdusefast serve: uri = "python:examples/disks/ram_disk.py:BatchRamDisk?path=/dev/shm/disk"

The bytes lie in a file on a tmpfs that every process maps: several queues are several processes, and one that dies is
replaced by another, which must find what the first one has answered for.
"""

import mmap
import os

import vdusefast


class RamDisk(vdusefast.Backend):
    """A call for each request."""

    def __init__(self, size: str = "64M", path: str = "/dev/shm/vdusefast-ram-disk") -> None:
        self.size_bytes = vdusefast.parse_size(size)
        self.path = path

    def open(self) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, self.size_bytes)
            self.map = mmap.mmap(fd, self.size_bytes)
        finally:
            os.close(fd)
        self.data = memoryview(self.map)

    def pread(self, buffer: memoryview, offset_bytes: int) -> None:
        buffer[:] = self.data[offset_bytes : offset_bytes + len(buffer)]

    def pwrite(self, buffer: memoryview, offset_bytes: int) -> None:
        self.data[offset_bytes : offset_bytes + len(buffer)] = buffer

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        page = mmap.PAGESIZE
        start, end = -(-offset_bytes // page) * page, (offset_bytes + length_bytes) // page * page
        if start < end:
            self.map.madvise(mmap.MADV_REMOVE, start, end - start)


class BatchRamDisk(RamDisk):
    """The same, all requests of a round at once."""

    def submit(self, batch: vdusefast.Batch) -> None:
        batch.read_from(self.data)
        batch.write_to(self.data)
        batch.complete()  # flushes, too: there is nothing to make durable
