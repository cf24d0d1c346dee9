"""Mappings of the driver's memory for buffers that a Python class may keep although it must not.

The loop has mappings of its own, of rings and everything. Buffers lie in second ones, so that one of these can be replaced by
zero pages, at the same address and at one stroke, without anything else noticing: what was kept reads zeroes then, and
neither the driver's memory nor freed memory. The addresses are free again when the last view of them has gone.
"""

import os

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    enum:
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_FIXED
    void *MAP_FAILED

cdef extern from "<errno.h>" nogil:
    int errno


cdef class Window:
    def __cinit__(self):
        self.alias = NULL
        self.waiting = []

    def __dealloc__(self):
        if self.alias != NULL:
            munmap(self.alias, self.length_bytes)

    cdef int bury(self) except -1:
        """Replace the mapping by zeroes. Raises OSError."""
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        if mmap(self.alias, self.length_bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        return 0

    cdef void close(self):
        """End the mapping, with nothing lent: the region goes."""
        if self.alias != NULL and self.views == 0:
            munmap(self.alias, self.length_bytes)
            self.alias = NULL
        # What has views was buried when they were found.


@cython.freelist(64)
@cython.final
cdef class DriverMemory:
    def __getbuffer__(self, Py_buffer *view, int flags):
        if not self.is_lent:
            raise BufferError("the request that this buffer belongs to is complete")
        PyBuffer_FillInfo(view, self, self.address, self.length_bytes, not self.writable, flags)
        self.views += 1
        self.window.views += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.views -= 1
        self.window.views -= 1


cdef Window open_window(int fd, int prot, unsigned long long offset_bytes, size_t length_bytes):
    """Map a region a second time; None when the kernel does not let us."""
    cdef Window window = Window.__new__(Window)
    cdef void *alias = mmap(NULL, length_bytes, prot, MAP_SHARED, fd, <long> offset_bytes)
    if alias == MAP_FAILED:
        return None
    window.alias = <char *> alias
    window.length_bytes = length_bytes
    return window


cdef DriverMemory lend(Window window, char *address, Py_ssize_t length_bytes, bint writable):
    """Return memory to make a memoryview of; `address` lies in the window."""
    cdef DriverMemory memory = DriverMemory.__new__(DriverMemory)
    memory.window = window
    memory.address = address
    memory.length_bytes = length_bytes
    memory.writable = writable
    memory.is_lent = True
    memory.views = 0
    window.active += 1
    return memory
