"""The store of a benchmark: an existing one, a file made for it, or a temporary file."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from vdusefast.backends.image_format import path_of
from vdusefast.errors import BackendError, ConfigError, VdusefastError

DEFAULT_BYTES = 256 << 20
ALIGN_BYTES = 4096
FILL_BYTES = 1 << 20
FILLED_MAX_BYTES = 1 << 30  # a larger file would fill the disk before anything runs

Say = Callable[[str], None]
Stopped = Callable[[], bool]


class StoppedError(VdusefastError):
    """A signal came before there was a device."""


class BenchStore(AbstractContextManager["BenchStore"]):
    """Makes sure that the backend's file is there and large enough; removes a temporary one when it exits."""

    def __init__(self, uri: str | None, size_bytes: int, *, reads: bool, say: Say, stopped: Stopped = lambda: False):
        """Prepare `uri`, or a temporary file when None, for jobs that need `size_bytes` bytes (0 = whatever is there).

        reads: some job reads what it has not written, so a new file is filled with data. Raises ConfigError when an
        existing file is too small: it is never grown; StoppedError, without a file left, when `stopped()` says so.
        """
        self._stopped = stopped
        self.temporary: Path | None = None
        self.uri = uri or ""
        wanted_bytes = -(-(size_bytes or DEFAULT_BYTES) // ALIGN_BYTES) * ALIGN_BYTES
        if uri is None:
            fd, name = tempfile.mkstemp(prefix="vdusefast-bench-", suffix=".img")
            self.temporary, self.uri = Path(name), f"file:{name}"
            holes = _holes(wanted_bytes, reads)
            try:
                say(f"store: a temporary file, {name}, {_human(wanted_bytes)}, removed at the end{holes}")
            except BaseException:
                os.close(fd)
                self.temporary.unlink()
                raise
            try:
                _fill(fd, wanted_bytes, reads, stopped)
            except BaseException:
                self.temporary.unlink()
                raise
        elif uri.startswith("file:"):
            self._prepare_file(path_of(uri), size_bytes, wanted_bytes, reads, say)
        self.path = path_of(self.uri) if self.uri.startswith("file:") else None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.temporary is not None:
            self.temporary.unlink(missing_ok=True)

    def _prepare_file(self, path: Path, size_bytes: int, wanted_bytes: int, reads: bool, say: Say) -> None:
        try:
            status = path.stat()
        except FileNotFoundError:
            if not size_bytes:
                raise ConfigError(f"{path}: no such file; give --size to have it made") from None
            self._create(path, wanted_bytes, reads)
            say(f"store: made {path}, {_human(wanted_bytes)}; it stays{_holes(wanted_bytes, reads)}")
            return
        except OSError as error:
            raise BackendError(f"{path}: {error.strerror}") from None
        if stat.S_ISREG(status.st_mode) and status.st_size < size_bytes:
            raise ConfigError(
                f"{path}: {status.st_size} bytes, but the jobs need {size_bytes}; existing files are not grown: use a "
                "smaller --size, another file, or remove it"
            )

    def _create(self, path: Path, size_bytes: int, reads: bool) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BackendError(f"{path}: cannot make the file: {error.strerror}") from None
        try:
            _fill(fd, size_bytes, reads, self._stopped)
        except BaseException:
            path.unlink()
            raise


def _fill(fd: int, size_bytes: int, with_data: bool, stopped: Stopped) -> None:
    """Give the file its size, and data that does not compress where it will be read. Consumes `fd`."""
    try:
        os.ftruncate(fd, size_bytes)
        filled = with_data and size_bytes <= FILLED_MAX_BYTES
        chunk = os.urandom(FILL_BYTES) if filled else b""
        for at in range(0, size_bytes if filled else 0, FILL_BYTES):
            if stopped():
                raise StoppedError("stopped by a signal before there was a device")
            os.pwrite(fd, chunk[: size_bytes - at], at)
    except OSError as error:
        raise BackendError(f"cannot write a file of {size_bytes} bytes: {error.strerror}") from None
    finally:
        os.close(fd)


def _holes(size_bytes: int, reads: bool) -> str:
    if not reads or size_bytes <= FILLED_MAX_BYTES:
        return ""
    return f"; larger than {_human(FILLED_MAX_BYTES)}, so not filled: what no job has written is read as zeroes at once"


def _human(size_bytes: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:g} {unit}" if size_bytes == int(size_bytes) else f"{size_bytes:.1f} {unit}"
        size_bytes = size_bytes / 1024  # type: ignore[assignment]
    raise AssertionError("unreachable")
