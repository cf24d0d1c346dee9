"""User memory that the kernel copies a device's data through, in place of its own bounce pages.

A memfd, of huge pages where the machine has any. Once it is registered the kernel's file of the region shows no page
any more: a process that has mapped it maps the memfd instead. It counts against RLIMIT_MEMLOCK of the process that
registers it, survives a reset of the device, and ends with the last close of /dev/vduse/NAME, when the kernel copies
the used parts back into pages of its own.

Source: Linux 7.3, drivers/vdpa/vdpa_user/vduse_dev.c, vduse_dev_reg_umem; mm/memfd.c.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path

from vdusefast.base.page import PAGE_BYTES
from vdusefast.transport import uapi

HUGE_PAGE_BYTES = 2 << 20
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

# <asm-generic/mman-common.h>; older Pythons do not name them.
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25

# Errors with which the kernel refuses user memory, now or ever; its own pages serve as well.
REFUSALS = (errno.ENOMEM, errno.EFAULT, errno.EEXIST, errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)

Ioctl = Callable[[int, bytes], bytes]


class UserMemoryError(Exception):
    """The memory cannot be allocated, or the kernel refuses it; the message has the reason and the remedy."""


class UserMemory:
    """The memory of one device. `fd` is there from the beginning, so that every worker can inherit it."""

    def __init__(self, name: str, size_bytes: int, ioctl: Ioctl):
        """Make the memfd, without any memory in it yet; see `fill`.

        size_bytes: that of the bounce pages. ioctl: calls /dev/vduse/NAME and returns what it has filled in. Raises
        OSError.
        """
        self.size_bytes = size_bytes
        self.registered = False
        self.huge = False  # known once it is filled
        self._name = f"vdusefast-{name}"
        self._ioctl = ioctl
        self._view: mmap.mmap | None
        self._hugetlb = _free_huge_pages() * HUGE_PAGE_BYTES >= size_bytes
        try:
            self.fd, self._view = self._make()
        except OSError:
            if not self._hugetlb:
                raise
            self._hugetlb = False  # another process was faster
            self.fd, self._view = self._make()

    @property
    def used_bytes(self) -> int:
        """How many bytes of it the kernel uses: all or none."""
        return self.size_bytes if self.registered else 0

    def fill(self) -> None:
        """Allocate all of it, so that registering takes no time. Blocks; in any thread. Raises UserMemoryError."""
        assert self._view is not None
        address, length_bytes = _address(self._view), len(self._view)
        if error_number := _madvise(address, length_bytes, MADV_POPULATE_WRITE):
            raise UserMemoryError(f"{self._size_text()} cannot be allocated: {os.strerror(error_number)}")
        # Without a pool of them the kernel may still make huge pages of ordinary ones.
        self.huge = self._hugetlb or _madvise(address, length_bytes, MADV_COLLAPSE) == 0

    def is_due(self) -> bool:
        """Return whether the kernel accepts it now: it does once the driver has mapped something.

        Raises UserMemoryError when it never does, OSError.
        """
        try:
            packed = self._ioctl(uapi.VDUSE_IOTLB_GET_INFO, uapi.IOVA_INFO.pack(0, self.size_bytes - 1, 0, 0))
        except OSError as error:
            if error.errno == errno.EINVAL:  # no region there yet
                return False
            if error.errno == errno.ENOTTY:
                raise UserMemoryError("this kernel does not take any; Linux 6.0 does") from None
            raise
        return bool(uapi.IOVA_INFO.unpack(packed)[2] & uapi.VDUSE_IOVA_CAP_UMEM)

    def register(self) -> bool:
        """Register it with the kernel, after it is filled, while nobody touches the device's data.

        Returns False when the region has gone meanwhile, as by a reset: try again when it is due. Raises
        UserMemoryError.
        """
        assert self._view is not None
        limit_text = _raise_memlock(self.size_bytes)
        umem = uapi.IOVA_UMEM.pack(_address(self._view), 0, self.size_bytes, 0)
        try:
            self._ioctl(uapi.VDUSE_IOTLB_REG_UMEM, umem)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            if error.errno not in REFUSALS:
                raise
            raise UserMemoryError(limit_text or f"the kernel refuses {self._size_text()}: {error.strerror}") from None
        self.registered = True
        self._unmap()  # the kernel holds the pages, and the workers map the file
        return True

    def close(self) -> None:
        """Close it: the kernel keeps the pages for as long as it uses them. A second call does nothing."""
        self._unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _make(self) -> tuple[int, mmap.mmap]:
        """Return a new memfd and its mapping, by which huge pages are set aside for it. Raises OSError."""
        unit = HUGE_PAGE_BYTES if self._hugetlb else PAGE_BYTES
        file_bytes = (self.size_bytes + unit - 1) // unit * unit
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if self._hugetlb else 0)
        fd = os.memfd_create(self._name, flags)
        try:
            os.ftruncate(fd, file_bytes)
            # Pages that are registered, here and by workers, must not be cut off.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            view = mmap.mmap(fd, file_bytes)
            view.madvise(mmap.MADV_DONTDUMP)  # as a worker's mapping of it
            return fd, view
        except BaseException:
            os.close(fd)
            raise

    def _unmap(self) -> None:
        if self._view is not None:
            self._view.close()
            self._view = None

    def _size_text(self) -> str:
        pages = "huge pages" if self._hugetlb else "memory"
        return f"{self.size_bytes >> 20} MiB of {pages}"


def _free_huge_pages() -> int:
    """Return how many huge pages are free and not reserved; 0 where there are none."""
    try:
        free, reserved = (int((HUGE_PAGES / name).read_text()) for name in ("free_hugepages", "resv_hugepages"))
    except (OSError, ValueError):
        return 0
    return free - reserved


def _raise_memlock(more_bytes: int) -> str:
    """Allow this process to pin so much more, if it has the right to. Returns "", or the reason against it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    needed = _pinned_bytes() + more_bytes
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ""
    try:
        enough = hard == resource.RLIM_INFINITY or hard >= needed
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (needed, hard if enough else needed))
    except (ValueError, OSError):
        return (
            f"{needed >> 20} MiB would be locked, and RLIMIT_MEMLOCK allows {soft >> 20} MiB: raise it (ulimit -l, "
            "LimitMEMLOCK=)"
        )
    return ""


def _pinned_bytes() -> int:
    """Return the bytes that the kernel already counts as locked for this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPin:"):
            return int(line.split()[1]) << 10
    return 0


def _address(view: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _madvise(address: int, length_bytes: int, advice: int) -> int:
    """Return 0 or an errno. Releases the GIL meanwhile, which mmap.madvise does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length_bytes), advice) == 0:
        return 0
    return ctypes.get_errno()
