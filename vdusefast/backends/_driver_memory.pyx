"""Mappings of the driver's memory for buffers, which a Python class might keep although it must not.

The loop has its own mappings of all regions. Buffers lie in second mappings, called windows. A window can be replaced with
zero pages, at the same address and atomically, while the loop is unaffected. A kept buffer then reads as zeroes, not as the
driver's memory or freed memory. The addresses are free again when their last view has gone.
"""

import os

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport uint32_t, uintptr_t

from vdusefast.worker._csrc cimport vf_mapping

from vdusefast.base._build cimport vf_build_id
from vdusefast.base.build import check_extension

check_extension(__name__, vf_build_id())

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

cdef extern from "base/core_dump.h" nogil:
    void vf_core_exclude_driver(void *, size_t)

cdef extern from "<errno.h>" nogil:
    int errno


cdef void *put_zeroes(void *at, size_t length_bytes) noexcept nogil:
    cdef void *zeroes = mmap(
        at, length_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0)
    if zeroes != MAP_FAILED:
        vf_core_exclude_driver(zeroes, length_bytes)
    return zeroes


cdef class Window:
    def __cinit__(self):
        self.alias = NULL
        self.waiting = []

    def __dealloc__(self):
        if self.alias != NULL:
            munmap(self.alias, self.length_bytes)

    cdef int zero_pages(self) except -1:
        """Replace the mapping with zero pages. Raises OSError."""
        if put_zeroes(self.alias, self.length_bytes) == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        return 0

    cdef void close(self):
        """Unmap the window, with nothing lent, because its region goes."""
        if self.alias != NULL and self.views == 0:
            munmap(self.alias, self.length_bytes)
            self.alias = NULL
        # A mapping with views was replaced by zero pages when they were found.


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


cdef class Windows:
    cdef void add(self, void *va, size_t length_bytes, const vf_mapping *mapping):
        """Map a region a second time; if that fails, its requests get copies."""
        cdef Window window
        cdef window_entry *entry
        cdef void *alias
        if self.count == WINDOW_MAX:
            return
        alias = mmap(NULL, length_bytes, mapping.prot, MAP_SHARED, mapping.fd, <long> mapping.offset_bytes)
        if alias == MAP_FAILED:
            return
        vf_core_exclude_driver(alias, length_bytes)
        window = Window.__new__(Window)
        window.alias = <char *> alias
        window.length_bytes = length_bytes
        entry = &self.entries[self.count]
        entry.start = <uintptr_t> va
        entry.length_bytes = length_bytes
        entry.alias = <uintptr_t> alias
        Py_INCREF(window)
        entry.window = <PyObject *> window
        self.count += 1

    cdef void remove(self, void *va):
        """End the window of a region that is about to go."""
        cdef uint32_t i
        for i in range(self.count):
            if self.entries[i].start == <uintptr_t> va:
                (<Window> self.entries[i].window).close()
                self.forget(i)
                return

    cdef void close(self):
        while self.count:
            (<Window> self.entries[self.count - 1].window).close()
            self.forget(self.count - 1)

    cdef int zero_pages(self, Window window) except -1:
        """Replace a window, in which nothing is lent, with zero pages. Raises OSError."""
        cdef uint32_t i
        window.zero_pages()
        for i in range(self.count):
            if <Window> self.entries[i].window is window:
                self.forget(i)
                break
        return 0

    cdef int zero_pages_at(self, uintptr_t address) noexcept nogil:
        """See vf_engine_ops.zero_pages."""
        cdef uint32_t i
        cdef window_entry *entry
        for i in range(self.count):
            entry = &self.entries[i]
            if address - entry.alias < entry.length_bytes:
                return -(put_zeroes(<void *> entry.alias, entry.length_bytes) == MAP_FAILED)
        return -1

    cdef DriverMemory lend(self, const char *address, Py_ssize_t length_bytes, bint writable):
        """Return memory for a memoryview of the loop's bytes at `address`; None where there is no window."""
        cdef DriverMemory memory
        cdef window_entry *entry
        cdef uint32_t i, at
        for i in range(self.count + 1):
            at = self.last_hit if i == 0 else i - 1
            entry = &self.entries[at]
            if at >= self.count or <uintptr_t> address - entry.start >= entry.length_bytes:
                continue
            self.last_hit = at
            memory = DriverMemory.__new__(DriverMemory)
            memory.window = <Window> entry.window
            memory.address = <char *> (entry.alias + (<uintptr_t> address - entry.start))
            memory.length_bytes = length_bytes
            memory.writable = writable
            memory.is_lent = True
            memory.views = 0
            memory.window.active += 1
            return memory
        return None

    cdef void forget(self, uint32_t i):
        cdef PyObject *window = self.entries[i].window
        self.count -= 1
        self.entries[i] = self.entries[self.count]
        Py_DECREF(<object> window)
