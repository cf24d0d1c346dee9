"""The temporary directory of a disk's attach socket, and what servers that were killed have left of theirs."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "vdusefast-disk-"
UNUSED_AGE_S = 60.0  # of a directory without a socket: a server that has just made it is about to lock it

_log = logging.getLogger("vdusefast")


class DiskDirectory:
    """A new private directory; `close` removes it. It is locked meanwhile, so that nobody takes it for a dead one's."""

    def __init__(self) -> None:
        """Make it, and remove those of dead servers. Raises OSError."""
        remove_dead()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            self.path.rmdir()
            raise
        with suppress(OSError):  # on a file system without locks nobody takes it for dead
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove it with all that is in it. A second call does nothing."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1


def remove_dead() -> None:
    """Remove the directories of servers of this user that are dead. What cannot be removed is logged."""
    base = Path(tempfile.gettempdir())
    try:
        with os.scandir(base) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(PREFIX)]
    except OSError as error:
        _log.debug("%s: %s", base, error.strerror)
        return
    for name in names:
        try:
            _remove_if_dead(base / name)
        except FileNotFoundError:
            continue  # it has been removed meanwhile
        except OSError as error:
            _log.debug("%s stays: %s", base / name, error.strerror)


def _remove_if_dead(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        names = sorted(os.listdir(fd))
        sockets = [name for name in names if stat.S_ISSOCK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)]
        if not sockets and (names or time.time() - status.st_mtime < UNUSED_AGE_S):
            return
        if sockets and ({*names} - {sockets[0], f"{sockets[0]}.lock"} or _has_server(path / sockets[0])):
            return
        for name in names:
            os.unlink(name, dir_fd=fd)
        path.rmdir()
    except BlockingIOError:
        return  # a living server has it
    finally:
        os.close(fd)


def _has_server(path: Path) -> bool:
    """Return whether somebody listens on a socket: also a server on a file system without locks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # its backlog is full, or nobody can tell
        return True
