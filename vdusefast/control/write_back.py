"""Failed write-backs of a file, and the descriptions through which the kernel reports them.

The kernel reports a failed write-back once for each open file description, and not at all to one that is opened after
a report. The workers share the description that they flush with. So each queue has a witness: a description of the same
file that nothing is flushed with, which its worker asks after each flush (csrc/queue/flush.h). The supervisor has one
more, for reports that a worker received before it died.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import time
from typing import TYPE_CHECKING

from vdusefast.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vdusefast.backends import Store
    from vdusefast.state.shared_pages import SharedPages

FAR_BYTES = 1 << 62  # where no file has pages: nothing is written, and nothing waited for
SYNC_FILE_RANGE_WAIT_BEFORE = 1
_NO_REPORT = (errno.EINVAL, errno.ENOSYS, errno.EPERM)

_log = logging.getLogger("vdusefast")


def take_report(fd: int) -> int:
    """Return the errno of a failed write-back that this open file description has yet to report, 0 for none."""
    libc = ctypes.CDLL(None, use_errno=True)
    far = ctypes.c_int64(FAR_BYTES)
    if libc.sync_file_range(fd, far, ctypes.c_int64(1), SYNC_FILE_RANGE_WAIT_BEFORE) == 0:
        return 0
    error = ctypes.get_errno()
    return 0 if error in _NO_REPORT else error


class WriteBack:
    """The write-backs of one device's store. Owns the witnesses; `close` is idempotent.

    `look` is called in the supervisor's loop: it does no I/O. `forgive` may be called in any thread.
    """

    def __init__(self, device: str, pages: SharedPages, store: Store, queue_count: int):
        """Open a witness for each queue and one for ourselves, where the store is a file that is flushed.

        pages, store: borrowed. Raises OSError.
        """
        self._device = device
        self._pages = pages
        self._store = store
        self._fds: list[int] = []
        if not store.is_on_disk or store.cache == "unsafe" or store.read_only:
            return
        try:
            for _ in range(queue_count + 1):
                self._fds.append(os.open(f"/proc/self/fd/{store.fd}", os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            self.close()
            raise

    @property
    def queue_fds(self) -> Sequence[int]:
        """The witness of each queue; none where the store needs none."""
        return self._fds[:-1]

    def look(self) -> None:
        """Have all flushes fail if a write-back has failed: a worker that died may have received the report."""
        error = take_report(self._fds[-1]) if self._fds else 0
        if error:
            self._pages.fail_flushes(error)

    def failure(self) -> BackendError | None:
        """Return why every flush fails, and what to do; None when none does. For any thread."""
        try:
            failure = self._pages.flush_failure()
        except ValueError:  # the pages have just been closed
            return None
        if failure is None:
            return None
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(failure.since_s))
        return BackendError(
            f"device {self._device}: data that was written to its store is lost ({os.strerror(failure.errno)}, "
            f"{since}): every flush fails. Mend {self._store.uri}, check what is on it, then: vdusefast recover "
            f"{self._device}"
        )

    def begin(self, *, is_left: bool, forgive: bool) -> None:
        """Take note of earlier failures. is_left: the device is an orphan that is adopted.

        forgive: an operator says that its flushes are to be carried out again. Data that others wrote to a store
        without a device is not the driver's: the log says that it may be lost.
        """
        if is_left and not forgive:
            self._warn_of_cut_off_flushes()
            self.look()
        elif error := self.forgive():
            _log.warning(
                "device %s: %s: data written to it earlier may be lost (%s), which was not reported: check it",
                *(self._device, self._store.uri, os.strerror(error)),
            )

    def forgive(self) -> int:
        """Have flushes be carried out again. Returns the errno of a failure that was not reported, 0 for none.

        Pages of the cache that the store never got are dropped: reads return from now on the data that the store has.
        """
        fds = [self._store.fd, *self._fds] if self._fds else []
        errors = [take_report(fd) for fd in fds]  # of all: each has its own
        if self._fds and self._pages.flush_failure() is not None:
            os.posix_fadvise(self._store.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._pages.forgive_flushes()
        return max(errors, default=0)

    def close(self) -> None:
        """Close the witnesses."""
        while self._fds:
            os.close(self._fds.pop())

    def _warn_of_cut_off_flushes(self) -> None:
        """Log the flushes that the previous processes were carrying out: if one failed, nobody knows any more."""
        queues = [queue for queue in range(self._pages.queue_count) if self._pages.status(queue).flushing]
        if queues and self._fds:
            _log.warning(
                "device %s: all its processes were killed during a flush of queue %s, which is carried out again; if "
                "the kernel log has write errors of %s from then, data is lost",
                *(self._device, ", ".join(map(str, queues)), self._store.uri),
            )
