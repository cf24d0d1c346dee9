"""`vdusefast.Backend`, the base class of a disk written in Python."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


class Batch(Protocol):
    """All requests that one round popped from a driver's ring, as `Backend.submit` gets them.

    A request's memory may lie in several pieces: each is a row with its own tag. After a tag is completed, its
    buffer cannot be used. A batch may be kept until all of it is complete.
    """

    @property
    def requests(self) -> NDArray[np.void]:
        """Rows of (offset_bytes i8, length_bytes i8, tag i8, operation u1, unmap ?), read-only."""

    @property
    def buffers(self) -> MutableMapping[int, memoryview]:
        """Memory of the driver by tag: writable for reads, read-only for writes; made when asked for."""

    def read_from(self, store: object, at: ArrayLike | None = None) -> int:
        """Fill the buffers of all reads from the bytes of `store`, a contiguous buffer; return how many rows.

        at: for each row of `requests` the byte in `store`; offset_bytes unless given. Completes nothing. Raises
        IndexError when a row lies outside of `store`; nothing is moved then.
        """

    def write_to(self, store: object, at: ArrayLike | None = None) -> int:
        """Do the reverse for all writes: copy their buffers into `store`."""

    def complete(self, tags: int | ArrayLike | None = None, error: int = 0) -> None:
        """Complete one tag, an array of tags, or all of this batch that are still open; from any thread.

        error: 0, or an errno, with which the driver gets IOERR. Raises ValueError for a tag that is not open,
        TypeError for a value that is no tag; then none of them is completed.
        """


class Backend:
    """A disk. Derive from it and set `size_bytes`. The parameters after `?` in the URI are the constructor's arguments.

    Methods that a class does not override are not offered to the driver. Without `pwrite` the disk is read-only.
    Without `discard` the driver cannot discard. Without `flush` a flush does nothing, so writes must be durable when
    they are completed, or need not be. Without `write_zeroes` zeroes are written by `pwrite`. Methods may be `async
    def`. A class overrides `pread` and the like, or `submit`, which gets all requests of a round at once.

    An OSError gives the driver IOERR and is counted by its errno. So does any other exception, whose traceback goes to
    the log. So does all that a class prints, as warnings, with limits on the length and number of lines.

    A buffer is the driver's memory, and is released when its request is complete. Keep bytes(buffer), not the buffer, a
    slice or an array of it. Those read as zeroes after the release, and the class gets slower copies from then on.

    Each queue is a process with an instance of its own. Instances share data outside of the processes: in a file, in
    shared memory, on a server. With shareable = False there is one instance for all queues, in a process of its own,
    which costs each request a copy and a detour. A dead process is replaced, and its incomplete requests are submitted
    again. The next process must find the data of all completed ones.

    Attributes: size_bytes, block_size_bytes (the smallest unit of a request: a power of two, 512 to 4096), and for
    classes with `submit`, whose abilities do not show, read_only, can_discard and can_write_zeroes. Set before `open`:
    queue (which one this instance serves), queue_count, writable (False where the device is read-only).
    """

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4

    size_bytes: int = 0
    block_size_bytes: int = 512
    read_only: bool | None = None
    can_discard: bool | None = None
    can_write_zeroes: bool | None = None
    shareable: bool = True
    queue: int = 0
    queue_count: int = 1
    writable: bool = True

    def open(self) -> Awaitable[None] | None:
        """Prepare; called once in each process, before `size_bytes` is looked at."""

    def close(self) -> Awaitable[None] | None:
        """Clean up; called at the end, unless the process is killed."""

    def pread(self, buffer: memoryview, offset_bytes: int) -> Awaitable[int | None] | int | None:
        """Fill `buffer` with the bytes at `offset_bytes`. Returns how many bytes, None for all of them."""
        raise _absent(self, "pread")

    def pwrite(self, buffer: memoryview, offset_bytes: int) -> Awaitable[int | None] | int | None:
        """Store `buffer` at `offset_bytes`. Returns how many bytes, None for all of them."""
        raise _absent(self, "pwrite")

    def flush(self) -> Awaitable[None] | None:
        """Make completed writes durable."""
        raise _absent(self, "flush")

    def discard(self, offset_bytes: int, length_bytes: int) -> Awaitable[None] | None:
        """Forget these bytes; later reads of them may return anything."""
        raise _absent(self, "discard")

    def write_zeroes(self, offset_bytes: int, length_bytes: int, unmap: bool) -> Awaitable[None] | None:
        """Write zeroes there; unmap: the space may be deallocated."""
        raise _absent(self, "write_zeroes")

    def submit(self, batch: Batch) -> Awaitable[None] | None:
        """Start all requests of a round; complete each of them, now or later."""
        raise _absent(self, "submit")


def _absent(disk: Backend, name: str) -> OSError:
    """Return the error of a method that a class does not override; the engine checks `overrides` and calls none."""
    return OSError(errno.EOPNOTSUPP, f"{type(disk).__name__} has no {name}")


def overrides(disk: Backend, name: str) -> bool:
    """Return whether a disk has a method `name` of its own."""
    method: Any = getattr(disk, name, None)
    return callable(method) and getattr(method, "__func__", method) is not getattr(Backend, name)


# The arguments of each method, as the engine passes them.
_ARGUMENTS = {
    "open": (),
    "close": (),
    "pread": ("buffer", "offset_bytes"),
    "pwrite": ("buffer", "offset_bytes"),
    "flush": (),
    "discard": ("offset_bytes", "length_bytes"),
    "write_zeroes": ("offset_bytes", "length_bytes", "unmap"),
    "submit": ("batch",),
}


def wrong_method(disk: Backend) -> str:
    """Return what is wrong with the form of a method of a disk, and how to write it; "" if all can be called."""
    import inspect

    for name, arguments in _ARGUMENTS.items():
        if not overrides(disk, name):
            continue
        method = getattr(disk, name)
        wanted = f"write def {name}({', '.join(('self', *arguments))})"
        try:
            inspect.signature(method).bind(*arguments)
        except TypeError as error:
            return f"{name} cannot be called with {len(arguments)} arguments beside self: {error}; {wanted}"
        except ValueError:
            continue  # it is compiled, and does not say what it takes
        if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
            return f"{name} is a generator, as there is a yield in it; {wanted} without"
    return ""
