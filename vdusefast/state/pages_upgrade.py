"""Adopt the shared pages of a server with another layout: its in-flight logs are copied.

Counters and latencies begin at zero. The fields that are read here keep their place in every layout: the first fields
of the header, the word after the name (from version 2 on), and magic, version, sizes and state of a log. A log has a
version of its own. A log that cannot be read is refused, unless it says that nothing is in flight.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from vdusefast.errors import VdusefastError
from vdusefast.state import shared_pages
from vdusefast.state.shared_pages import Header, LogState, SharedPages

FLUSH_FAILURE_SINCE = 2  # the version of the pages from which on they have that word
PAGES_MAX_BYTES = 1 << 32
_LOG_MAX_BYTES = shared_pages.INFLIGHT_HEADER_BYTES + shared_pages.RING_SIZE_MAX * shared_pages.INFLIGHT_ENTRY_BYTES


class _Carried(NamedTuple):
    """The parts of other pages that must not be lost."""

    flush_failure: bytes  # the word
    logs: list[bytes]  # one a queue; empty: nothing is in flight


def check(path: Path, name: str, queue_count: int, queue_size: int) -> None:
    """Check that `reopen` would find what it needs; a server may be writing it. Raises VdusefastError."""
    if _is_ours(path):
        SharedPages.find(path, name, queue_count, queue_size).close()
    else:
        _read(path, name, queue_count, queue_size)


def reopen(path: Path, name: str, queue_count: int, queue_size: int) -> SharedPages:
    """Do what SharedPages.reopen does, and replace pages of another layout before. Raises VdusefastError as that."""
    if not _is_ours(path):
        carried = _read(path, name, queue_count, queue_size, wait=True)
        new = path.with_suffix(".new")
        with SharedPages.create(new, name, queue_count, queue_size) as pages:
            pages.map[shared_pages.FLUSH_FAILURE_OFFSET : shared_pages.FLUSH_FAILURE_OFFSET + 8] = carried.flush_failure
            for queue, log in enumerate(carried.logs):
                pages.reserve_log(queue, len(log) // shared_pages.INFLIGHT_ENTRY_BYTES)
                start = shared_pages.queue_offset(queue) + shared_pages.INFLIGHT_OFFSET
                pages.map[start : start + len(log)] = log
        new.rename(path)
    return SharedPages.reopen(path, name, queue_count, queue_size)


def _is_ours(path: Path) -> bool:
    """Return whether SharedPages.open accepts the pages' layout, or reports the error better, as these are no pages."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        if os.pread(fd, len(shared_pages.MAGIC), 0) == shared_pages.MAGIC:
            shared_pages.read_header(fd)
        return True
    except ValueError:
        return False
    finally:
        os.close(fd)


def _read(path: Path, name: str, queue_count: int, queue_size: int, *, wait: bool = False) -> _Carried:
    """Return the parts to carry over. wait: for the storage I/O of its last workers. Raises VdusefastError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise VdusefastError(f"{path}: cannot open the shared pages: {error.strerror}") from None
    try:
        packed = os.pread(fd, shared_pages.HEADER_STRUCT.size, 0)
        if len(packed) < shared_pages.HEADER_STRUCT.size:
            raise VdusefastError(f"{path}: shared pages that are too short: no server can adopt them")
        header = Header(*shared_pages.HEADER_STRUCT.unpack(packed))
        found = header.name.rstrip(b"\0"), header.queue_count, header.queue_size
        if found != (name.encode(), queue_count, queue_size):
            raise VdusefastError(f"{path}: shared pages of another device or geometry: no server can adopt them")
        if wait:
            shared_pages.wait_unlocked(fd, name)
        flush_failure = bytes(8)
        if header.version >= FLUSH_FAILURE_SINCE:
            flush_failure = os.pread(fd, 8, shared_pages.FLUSH_FAILURE_OFFSET)
        return _Carried(flush_failure, [_read_log(fd, name, header, queue) for queue in range(queue_count)])
    finally:
        os.close(fd)


def _read_log(fd: int, name: str, header: Header, queue: int) -> bytes:
    """Return the log of a queue, empty when it says that nothing is in flight. Raises VdusefastError."""
    start = header.header_bytes + queue * header.queue_stride_bytes + header.inflight_offset
    log = os.pread(fd, _LOG_MAX_BYTES, start) if start < PAGES_MAX_BYTES else b""
    if len(log) < shared_pages.INFLIGHT_HEADER_BYTES:
        raise VdusefastError(
            f"{name}: queue {queue}: the shared pages were cut, and its in-flight log is gone: no server can adopt "
            f"the device; remove it: vdusefast del {name} --force"
        )
    magic, version, _format, entry_bytes, entry_count, state, *_ = shared_pages.LOG_HEADER_STRUCT.unpack_from(log)
    if state == LogState.VOID:
        return b""
    length = shared_pages.INFLIGHT_HEADER_BYTES + entry_count * shared_pages.INFLIGHT_ENTRY_BYTES
    wanted = (shared_pages.INFLIGHT_MAGIC, shared_pages.INFLIGHT_VERSION, shared_pages.INFLIGHT_ENTRY_BYTES)
    if (magic, version, entry_bytes) != wanted or len(log) < length:
        raise VdusefastError(
            f"{name}: queue {queue}: its in-flight log has version {version}, and this vdusefast reads "
            f"{shared_pages.INFLIGHT_VERSION}: requests may be in flight, so that only the version that wrote it can "
            "adopt the device; this one can once the driver has reset it"
        )
    return log[:length]
