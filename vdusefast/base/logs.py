"""The log of a serving process: a terminal, the journal, or a bounded file in the run directory."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vdusefast.base.printable import printable
from vdusefast.base.secret import redact

LOG_MAX_BYTES = 1 << 20  # then it becomes log.1, in place of an older one
COPY_BYTES = 1 << 16

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))  # of syslog(3)


class _JournalFormatter(logging.Formatter):
    """Lines with a priority that the journal reads (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message and what there is of a traceback, each line with the priority in front."""
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def make_safe() -> None:
    """Make every message of ours one line without secrets, for all handlers.

    A second call does nothing.
    """
    logging.getLogger("vdusefast").addFilter(_make_safe)


def _make_safe(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(redact(record.getMessage())), ()
    return True


def is_journal(fd: int) -> bool:
    """Return whether a descriptor is the journal's, by $JOURNAL_STREAM (systemd.exec(5))."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Send messages to standard error in the block, in the journal's format if that is the journal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JournalFormatter() if is_journal(2) else logging.Formatter("vdusefast: %(message)s"))
    _install(handler)
    try:
        yield
    finally:
        logging.getLogger("vdusefast").removeHandler(handler)


def log_to_journal(fd: int) -> None:
    """Send messages to the journal too. Consumes `fd`."""
    handler = logging.StreamHandler(os.fdopen(fd, "w", encoding="utf-8"))
    handler.setFormatter(_JournalFormatter())
    _install(handler)


class LogFile(logging.StreamHandler):  # type: ignore[type-arg]
    """Messages with their time on standard output and error, which `move` then turns into a file.

    Until then both are an unnamed file, which keeps errors from before there is a run directory.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._path: Path | None = None
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _install(self)

    def move(self, path: Path) -> None:
        """Continue in the file at `path`, after the earlier messages, as far as there is space for them."""
        size = os.fstat(2).st_size
        so_far = os.pread(2, min(size, COPY_BYTES), max(0, size - COPY_BYTES))
        try:
            self._open(path)
            self._path = path
            os.write(2, so_far)
        except OSError:
            self.handleError(logging.makeLogRecord({"msg": "the log cannot be written"}))  # serving matters more

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message; a file that has become too large makes room for a new one."""
        super().emit(record)
        if self._path is not None and os.fstat(2).st_size > LOG_MAX_BYTES and self._path.exists():
            try:
                self._path.rename(self._path.with_suffix(".1"))
                self._open(self._path)
            except OSError:
                self.handleError(record)

    def _open(self, path: Path) -> None:
        self.flush()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)


def _install(handler: logging.Handler) -> None:
    make_safe()
    root = logging.getLogger("vdusefast")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
