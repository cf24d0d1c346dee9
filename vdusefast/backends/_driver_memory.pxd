"""The driver's memory as a Python class sees it: through mappings of its own, which can be replaced with zero pages."""

from cpython.ref cimport PyObject
from libc.stdint cimport uint32_t, uintptr_t

from vdusefast.worker._csrc cimport vf_mapping

cdef enum:
    WINDOW_MAX = 1024  # requests in regions beyond that get copies

cdef struct window_entry:
    uintptr_t start  # where the loop has the region
    size_t length_bytes
    uintptr_t alias
    PyObject *window  # owned


cdef class Window:
    """A second mapping of one region of the driver's memory."""

    cdef char *alias
    cdef size_t length_bytes
    cdef Py_ssize_t active  # buffers that are lent
    cdef Py_ssize_t views  # of them and of those that were kept
    cdef bint condemned
    cdef list waiting  # of a condemned one: requests that end when it is replaced by zero pages

    cdef int zero_pages(self) except -1
    cdef void close(self)


cdef class DriverMemory:
    """The memory behind the memoryview of a buffer."""

    cdef Window window
    cdef char *address
    cdef Py_ssize_t length_bytes
    cdef Py_ssize_t views
    cdef bint writable
    cdef bint is_lent


cdef class Windows:
    """The windows of all mapped regions."""

    cdef window_entry entries[WINDOW_MAX]
    cdef uint32_t count
    cdef uint32_t last_hit

    cdef void add(self, void *va, size_t length_bytes, const vf_mapping *mapping)
    cdef void remove(self, void *va)
    cdef void close(self)
    cdef int zero_pages(self, Window window) except -1
    cdef int zero_pages_at(self, uintptr_t address) noexcept nogil
    cdef DriverMemory lend(self, const char *address, Py_ssize_t length_bytes, bint writable)
    cdef void forget(self, uint32_t i)
