"""The plugin of nbdkit that examples/disks/ram_disk.py is compared with.

It has the same lines for a read, over the same file.
"""

import io
import mmap

import nbdkit

API_VERSION = 2

path = ""
data = memoryview(b"")


def config(key, value):
    """Take path=PATH."""
    global path
    if key != "path":
        raise RuntimeError(f"unknown parameter {key}")
    path = value


def get_ready():
    """Map the file."""
    global data
    with io.open(path, "r+b") as file:  # noqa: UP020 (`open` is a name of nbdkit)
        data = memoryview(mmap.mmap(file.fileno(), 0))


def thread_model():
    """Whatever is asked for by -t: nothing here needs to be kept apart."""
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):  # noqa: A001 (the name that nbdkit looks for)
    """Return a connection."""
    return 1


def get_size(connection):
    """Return the size in bytes."""
    return len(data)


def pread(connection, buffer, offset_bytes, flags):
    """Fill the buffer, as the disk does."""
    buffer[:] = data[offset_bytes : offset_bytes + len(buffer)]
