"""The run directory: it holds a device's shared pages, and its lock gives a name to one device only."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from vdusefast.base.kinds import TransportKind
from vdusefast.errors import DeviceBusyError, VdusefastError
from vdusefast.host import containers, run_dirs

LOCK_TRIES_MAX = 16
# `is_held` takes a shared lock for a moment: a process that tries to get the name at that moment tries again.
BLOCKED_TRIES_MAX = 3
BLOCKED_PAUSE_S = 0.02
CONTENTS = ("pages", "pages.new", "store", "state", "state.new", "socket", "log", "log.1", "keeper", "lock")
PRIVATE_PREFIX = "relay-"  # directories that exist for a moment
FOREIGN_SHOWN_MAX = 5
HOLDER_MAX_BYTES = 100


def _make_base(base: Path) -> None:
    """Make the parent of all run directories, if it is missing. Everybody may list it. Raises OSError."""
    try:
        base.mkdir(parents=True)
    except FileExistsError:
        return
    base.chmod(0o755)  # whatever the umask


class RunDirectory:
    """BASE/NAME, mode 0700, held by a lock from construction to `close`, which removes it.

    base: None chooses as `base_directory` does; without any, a private temporary directory is made. transport: noted
    for those who find the directory of a dead process; "" keeps what such a process has noted.
    Raises DeviceBusyError when a living process holds the name, VdusefastError when the directory cannot be made.
    """

    def __init__(self, name: str, base: Path | None = None, transport: str = "") -> None:
        self._lock_fd = -1
        self._private: Path | None = None
        self.transport = transport
        base = base or run_dirs.base_directory()
        if base is None:
            base = self._private = Path(tempfile.mkdtemp(prefix="vdusefast-"))
        base = run_dirs.absolute(base)
        self.path = base / name
        try:
            _make_base(base)
            self._lock_fd = self._acquire(name)
        except OSError as error:
            self._remove_private()
            raise VdusefastError(
                f"{name}: cannot make the run directory {self.path}: {error.strerror}; set VDUSEFAST_RUN_DIR"
            ) from None
        except VdusefastError:
            self._remove_private()
            raise

    @property
    def pages_path(self) -> Path:
        """Return where the shared pages go."""
        return self.path / "pages"

    @property
    def state_path(self) -> Path:
        """Return where the device is described for the next server; see saved_state.py."""
        return self.path / "state"

    def open_store_notes(self, size_bytes: int) -> int:
        """Return a descriptor of the file that workers of a store's module leave notes in for the next ones.

        It has `size_bytes` at least, which are allocated: a note can always be written. Raises VdusefastError.
        """
        fd = -1
        try:
            fd = os.open(self.path / "store", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.posix_fallocate(fd, 0, size_bytes)
            return fd
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise VdusefastError(f"{self.path.name}: cannot open {self.path / 'store'}: {error.strerror}") from None

    @property
    def lock_path(self) -> Path:
        """Return the file whose lock holds the name."""
        return self.path / "lock"

    def close(self) -> None:
        """Remove the directory with our files in it, then release the name. Idempotent.

        Raises VdusefastError when it cannot be removed; when it is not the one that was made, which stays then; and
        when there are other files in it, which stay and are named.
        """
        if self._lock_fd < 0:
            return
        try:
            if not self._names(self._lock_fd):
                raise VdusefastError(f"{self.path} is not the run directory that was made there: it has been moved")
            if (self.path / "keeper").is_socket():
                from vdusefast.state.keeper_control import end

                end(self.path)
            for private in self.path.glob(f"{PRIVATE_PREFIX}*"):
                shutil.rmtree(private, ignore_errors=True)  # of a process that was killed
            foreign = sorted(set(os.listdir(self.path)) - set(CONTENTS))
            for name in CONTENTS:
                (self.path / name).unlink(missing_ok=True)
            if foreign:
                shown = ", ".join(foreign[:FOREIGN_SHOWN_MAX]) + ", ..." * (len(foreign) > FOREIGN_SHOWN_MAX)
                raise VdusefastError(
                    f"{self.path.name}: removed, but {self.path} stays, as there are files in it that are not "
                    f"vdusefast's: {shown}; remove them, then: vdusefast del {self.path.name}"
                )
            self._remove_directory()
        except OSError as error:
            raise VdusefastError(f"cannot remove the run directory {self.path}: {error.strerror}") from None
        finally:
            self.release()
            self._remove_private()

    @property
    def was_in_kernel(self) -> bool:
        """Whether the device of this directory is, or was, one of the kernel transport."""
        return self.transport == TransportKind.KERNEL

    def note_transport(self, transport: str) -> None:
        """Note the transport for processes that find the directory after our death. Raises OSError."""
        self.transport = transport
        self._note_holder(self._lock_fd)

    def release(self) -> None:
        """Release the name and leave the directory as it is, for the next server of its device. Idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _remove_directory(self) -> None:
        """Remove the empty directory. Without its lock file it may belong to another server already. Raises OSError."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            pass  # the next owner of the name has removed it already
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # the next owner of the name has it already
                raise

    def _remove_private(self) -> None:
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None

    def _acquire(self, name: str) -> int:
        """Return a descriptor that holds the lock, with our pid and transport written into the file.

        A file removed by its last holder meanwhile is tried again.
        """
        blocked = 0
        for _ in range(LOCK_TRIES_MAX):
            try:
                self.path.mkdir(mode=0o700, exist_ok=True)
                self._check_private(name)
                fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except (FileNotFoundError, FileExistsError):
                continue  # its holder removed the directory meanwhile
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._names(fd):
                    self._note_holder(fd)
                    return fd
            except BlockingIOError:
                os.close(fd)
                blocked += 1
                if blocked < BLOCKED_TRIES_MAX:
                    time.sleep(BLOCKED_PAUSE_S)
                    continue
                raise DeviceBusyError(
                    f"{name}: a device of this name is being served already ({self.path}); choose another name"
                ) from None
            except BaseException:
                if self._names(fd) and not os.fstat(fd).st_size:  # new, and not even a pid could be written
                    self.lock_path.unlink(missing_ok=True)
                    with suppress(OSError):
                        self.path.rmdir()
                os.close(fd)
                raise
            os.close(fd)
        raise DeviceBusyError(f"{name}: other processes keep making and removing {self.path}")

    def _note_holder(self, fd: int) -> None:
        self.transport = self.transport or run_dirs.parse_holder(os.pread(fd, HOLDER_MAX_BYTES, 0))[1]
        text = f"{os.getpid()}@{containers.pid_namespace()} {self.transport}".rstrip().encode()
        # In place, with a fixed length: it needs no space that another file may have taken.
        os.pwrite(fd, text.ljust(HOLDER_MAX_BYTES - 1) + b"\n", 0)
        os.ftruncate(fd, HOLDER_MAX_BYTES)

    def _check_private(self, name: str) -> None:
        """Check that nobody else can put files into the directory."""
        status = self.path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise VdusefastError(f"{name}: {self.path} is not a directory of this user with mode 0700; remove it")

    def _names(self, fd: int) -> bool:
        """Return whether the lock's path still leads to `fd`."""
        try:
            return os.path.samestat(os.fstat(fd), self.lock_path.lstat())
        except FileNotFoundError:
            return False
