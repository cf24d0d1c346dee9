"""Memory that a loopback driver lets its device reach: the table behind the bus's IOTLB."""

from __future__ import annotations

import mmap
import os
from bisect import insort

from vdusefast.transport import uapi
from vdusefast.transport.uapi import IotlbEntry

REGION_COUNT_MAX = 1 << 15


class Region:
    """Memory that the device may reach: `size_bytes` bytes at `iova`.

    The mapping `buf` lives as long as something refers to the region or to a view of it, so that a driver that
    outlives the device does not touch unmapped memory.
    """

    def __init__(self, iova: int, size_bytes: int, perm: int, fd: int, fd_offset: int):
        """Map `size_bytes` of `fd` at `fd_offset` (a multiple of the page size). Consumes `fd`."""
        self.iova = iova
        self.size_bytes = size_bytes
        self.last = iova + size_bytes - 1
        self.perm = perm
        self.fd_offset = fd_offset
        self.fd = fd
        try:
            self.buf = mmap.mmap(fd, size_bytes, offset=fd_offset)
            self.buf.madvise(mmap.MADV_DONTDUMP)  # as a worker's mapping of it
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> int:
        """Where the region starts in this process (a virtual address)."""
        import ctypes

        return ctypes.addressof(ctypes.c_char.from_buffer(self.buf))

    @property
    def entry(self) -> IotlbEntry:
        """The region as a worker gets it."""
        return IotlbEntry(self.fd_offset, self.iova, self.last, self.perm)

    def close(self) -> None:
        """Close the descriptor; the mapping stays. A second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class RegionTable:
    """Regions sorted by IOVA; none overlaps another. Not thread-safe: the bus holds its lock."""

    def __init__(self, name: str):
        """Make an empty table; `name` is the device's, for the memory it makes."""
        self._name = name
        self._regions: list[Region] = []

    def add(self, iova: int, size_bytes: int, perm: int, fd: int | None, fd_offset: int) -> Region:
        """Enter a region over a duplicate of `fd`, or a new memfd. Raises ValueError; see LoopbackBus.add_region."""
        last = iova + size_bytes - 1
        if size_bytes <= 0 or iova < 0 or last > uapi.IOVA_LAST or fd_offset < 0:
            raise ValueError(f"region [{iova:#x}, {last:#x}] is not a range of 64-bit addresses")
        if len(self._regions) >= REGION_COUNT_MAX:
            raise ValueError(f"more than {REGION_COUNT_MAX} regions")
        other = self.find(iova, last)
        if other is not None:
            raise ValueError(f"region [{iova:#x}, {last:#x}] overlaps [{other.iova:#x}, {other.last:#x}]")
        if fd is None:
            own_fd = os.memfd_create(f"vdusefast-{self._name}", os.MFD_CLOEXEC)
            os.ftruncate(own_fd, fd_offset + size_bytes)
        else:
            own_fd = os.dup(fd)
        region = Region(iova, size_bytes, perm, own_fd, fd_offset)
        insort(self._regions, region, key=lambda r: r.iova)
        return region

    def find(self, start: int, last: int) -> Region | None:
        """Return the lowest region that overlaps [start, last]."""
        return next((r for r in self._regions if r.iova <= last and start <= r.last), None)

    def take(self, iova: int) -> Region:
        """Remove the region that starts at `iova` and return it, still open. Raises KeyError when there is none."""
        for place, region in enumerate(self._regions):
            if region.iova == iova:
                return self._regions.pop(place)
        raise KeyError(f"no region starts at {iova:#x}")

    def close(self) -> None:
        """Close all regions and forget them."""
        while self._regions:
            self._regions.pop().close()
