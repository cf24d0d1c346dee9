"""The driver's memory as a Python class sees it: through mappings of its own, which can be taken away."""

cdef class Window:
    """A second mapping of one region of the driver's memory."""

    cdef char *alias
    cdef size_t length_bytes
    cdef Py_ssize_t active  # buffers that are lent
    cdef Py_ssize_t views  # of them and of those that were kept
    cdef bint condemned
    cdef list waiting  # of a condemned one: requests that end when it is buried

    cdef int bury(self) except -1
    cdef void close(self)


cdef class DriverMemory:
    """What a buffer is a memoryview of."""

    cdef Window window
    cdef char *address
    cdef Py_ssize_t length_bytes
    cdef Py_ssize_t views
    cdef bint writable
    cdef bint is_lent


cdef Window open_window(int fd, int prot, unsigned long long offset_bytes, size_t length_bytes)
cdef DriverMemory lend(Window window, char *address, Py_ssize_t length_bytes, bint writable)
