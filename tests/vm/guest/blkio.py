"""libblkio by ctypes: as much of it as a block device client needs.

The library is looked for at $VDUSEFAST_LIBBLKIO, then where the loader finds it. Standard library only, so that a
process of it starts quickly in an emulated guest.
"""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Callable, Iterator
from ctypes import (
    POINTER,
    byref,
    c_bool,
    c_char,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)

LIBRARY = "libblkio.so.1"
DRIVER = "virtio-blk-vhost-vdpa"


class BlkioError(Exception):
    """libblkio refused something; the message is its own."""


class MemRegion(ctypes.Structure):
    """struct blkio_mem_region."""

    _fields_ = (
        ("addr", c_void_p),
        ("len", c_size_t),
        ("iova", c_uint64),
        ("fd_offset", c_int64),
        ("fd", c_int),
        ("flags", c_uint32),
    )


class Completion(ctypes.Structure):
    """struct blkio_completion."""

    _fields_ = (("user_data", c_void_p), ("error_msg", c_char_p), ("ret", c_int), ("reserved", c_uint8 * 12))


def load() -> ctypes.CDLL:
    """Return the library with the types of the functions used here."""
    lib = ctypes.CDLL(os.environ.get("VDUSEFAST_LIBBLKIO", LIBRARY))
    handle, request = c_void_p, (c_void_p, c_uint32)
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "blkio_get_error_msg": (c_char_p, ()),
        "blkio_create": (c_int, (c_char_p, POINTER(handle))),
        "blkio_connect": (c_int, (handle,)),
        "blkio_start": (c_int, (handle,)),
        "blkio_destroy": (None, (POINTER(handle),)),
        "blkio_set_str": (c_int, (handle, c_char_p, c_char_p)),
        "blkio_set_int": (c_int, (handle, c_char_p, c_int)),
        "blkio_get_int": (c_int, (handle, c_char_p, POINTER(c_int))),
        "blkio_get_uint64": (c_int, (handle, c_char_p, POINTER(c_uint64))),
        "blkio_alloc_mem_region": (c_int, (handle, POINTER(MemRegion), c_size_t)),
        "blkio_map_mem_region": (c_int, (handle, POINTER(MemRegion))),
        "blkio_unmap_mem_region": (None, (handle, POINTER(MemRegion))),
        "blkio_get_queue": (c_void_p, (handle, c_int)),
        "blkioq_read": (None, (handle, c_uint64, c_void_p, c_size_t, *request)),
        "blkioq_write": (None, (handle, c_uint64, c_void_p, c_size_t, *request)),
        "blkioq_write_zeroes": (None, (handle, c_uint64, c_uint64, *request)),
        "blkioq_discard": (None, (handle, c_uint64, c_uint64, *request)),
        "blkioq_flush": (None, (handle, *request)),
        "blkioq_get_completion_fd": (c_int, (handle,)),
        "blkioq_set_completion_fd_enabled": (None, (handle, c_bool)),
        "blkioq_do_io": (c_int, (handle, POINTER(Completion), c_int, c_int, c_void_p)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Client:
    """A started blkio instance on one /dev/vhost-vdpa-N, with one mapped region for all buffers. A context manager."""

    def __init__(self, node: str, *, queues: int = 1, queue_size: int = 256, memory_bytes: int = 1 << 22):
        self.lib = load()
        self._handle = c_void_p()
        self._check(self.lib.blkio_create(DRIVER.encode(), byref(self._handle)), "create")
        try:
            self._check(self.lib.blkio_set_str(self._handle, b"path", node.encode()), f"path {node}")
            self._check(self.lib.blkio_connect(self._handle), f"connect to {node}")
            self.capacity_bytes = self.get_uint64("capacity")
            self.max_queues = self.get_int("max-queues")
            self.request_alignment = self.get_int("request-alignment")
            self._check(self.lib.blkio_set_int(self._handle, b"num-queues", queues), f"{queues} queues")
            self._check(self.lib.blkio_set_int(self._handle, b"queue-size", queue_size), f"queue size {queue_size}")
            self._check(self.lib.blkio_start(self._handle), "start")
            self.region = MemRegion()
            self._check(self.lib.blkio_alloc_mem_region(self._handle, byref(self.region), memory_bytes), "memory")
            self._check(self.lib.blkio_map_mem_region(self._handle, byref(self.region)), "map memory")
        except BaseException:
            self.close()
            raise
        self.memory = memoryview((c_char * memory_bytes).from_address(self.region.addr)).cast("B")
        self.queues = [Queue(self, index) for index in range(queues)]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop and disconnect; a second call does nothing."""
        if self._handle:
            self.lib.blkio_destroy(byref(self._handle))
            self._handle = c_void_p()

    def get_int(self, name: str) -> int:
        """Return an integer property."""
        value = c_int()
        self._check(self.lib.blkio_get_int(self._handle, name.encode(), byref(value)), name)
        return value.value

    def get_uint64(self, name: str) -> int:
        """Return a large integer property."""
        value = c_uint64()
        self._check(self.lib.blkio_get_uint64(self._handle, name.encode(), byref(value)), name)
        return value.value

    def queue_handle(self, index: int) -> int:
        """Return the library's pointer to a queue."""
        handle = self.lib.blkio_get_queue(self._handle, index)
        if not handle:
            raise BlkioError(f"no queue {index}")
        return int(handle)

    def remap(self) -> None:
        """Unmap the region of all buffers and map it again: an UPDATE_IOTLB for the device, twice."""
        self.lib.blkio_unmap_mem_region(self._handle, byref(self.region))
        self._check(self.lib.blkio_map_mem_region(self._handle, byref(self.region)), "map memory again")

    def wait(self, timeout_s: float) -> list[tuple[int, int]]:
        """Submit what is queued, wait until something completes, and return (tag, result) of all that did.

        Raises BlkioError when nothing does within `timeout_s`.
        """
        done = [pair for queue in self.queues for pair in queue.reap()]
        while not done:
            readable, _, _ = select.select(self.queues, [], [], timeout_s)
            if not readable:
                raise BlkioError(f"no request completed within {timeout_s:g} s")
            for queue in readable:
                queue.acknowledge()
                done.extend(queue.reap())
        return done

    def _check(self, result: int, what: str) -> None:
        if result < 0:
            raise BlkioError(f"{what}: {os.strerror(-result)}: {self.lib.blkio_get_error_msg().decode()}")


class Queue:
    """One queue: requests with a tag of the caller's, which is not 0."""

    REAP_MAX = 128

    def __init__(self, client: Client, index: int):
        self._lib, self._client = client.lib, client
        self._handle = client.queue_handle(index)
        self._completions = (Completion * self.REAP_MAX)()
        self._lib.blkioq_set_completion_fd_enabled(self._handle, True)
        self._fd = self._lib.blkioq_get_completion_fd(self._handle)

    def fileno(self) -> int:
        """Return the descriptor (the library's) that polls readable once something has completed."""
        return self._fd

    def acknowledge(self) -> None:
        """Take note of a readable completion descriptor."""
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # a completion that an earlier look has taken already

    def read(self, offset_bytes: int, at: int, length_bytes: int, tag: int) -> None:
        """Queue a read into the client's memory at `at`."""
        self._lib.blkioq_read(self._handle, offset_bytes, self._client.region.addr + at, length_bytes, tag, 0)

    def write(self, offset_bytes: int, at: int, length_bytes: int, tag: int) -> None:
        """Queue a write from the client's memory at `at`."""
        self._lib.blkioq_write(self._handle, offset_bytes, self._client.region.addr + at, length_bytes, tag, 0)

    def write_zeroes(self, offset_bytes: int, length_bytes: int, tag: int) -> None:
        """Queue a write of zeroes."""
        self._lib.blkioq_write_zeroes(self._handle, offset_bytes, length_bytes, tag, 0)

    def discard(self, offset_bytes: int, length_bytes: int, tag: int) -> None:
        """Queue a discard."""
        self._lib.blkioq_discard(self._handle, offset_bytes, length_bytes, tag, 0)

    def flush(self, tag: int) -> None:
        """Queue a flush."""
        self._lib.blkioq_flush(self._handle, tag, 0)

    def reap(self) -> Iterator[tuple[int, int]]:
        """Submit what is queued and yield (tag, result) of what has completed; the result is 0 or -errno."""
        count = self._lib.blkioq_do_io(self._handle, self._completions, 0, self.REAP_MAX, None)
        if count < 0:
            raise BlkioError(f"do_io: {os.strerror(-count)}: {self._lib.blkio_get_error_msg().decode()}")
        for completion in self._completions[:count]:
            yield completion.user_data, completion.ret


def run_one(client: Client, queue: int, request: Callable[[Queue], None], timeout_s: float = 30.0) -> int:
    """Queue one request by `request(queue)` and return its result, 0 or -errno. Nothing else may be in flight."""
    request(client.queues[queue])
    [(_, result)] = client.wait(timeout_s)
    return result
