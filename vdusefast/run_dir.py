"""The run directory: where a device keeps its shared pages, and how two devices of one name are told apart."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType

from vdusefast.errors import DeviceBusyError, VdusefastError

LOCK_TRIES_MAX = 16
# `is_held` takes a shared lock for a moment: who wants the name at that moment looks again.
BLOCKED_TRIES_MAX = 3
BLOCKED_PAUSE_S = 0.02
CONTENTS = ("pages", "store", "state", "state.new", "socket", "log", "log.1", "lock")
HOLDER_MAX_BYTES = 100
SYSTEM_BASE = Path("/run/vdusefast")


def base_directory() -> Path | None:
    """Return where run directories live, None when each process needs a private one.

    `$VDUSEFAST_RUN_DIR`, else /run/vdusefast when that can be written, else `$XDG_RUNTIME_DIR/vdusefast`. Absolute: it
    means the same in a process that has gone elsewhere. Raises VdusefastError.
    """
    if named := os.environ.get("VDUSEFAST_RUN_DIR"):
        return absolute(Path(named))
    system = SYSTEM_BASE
    if os.access(system if system.exists() else system.parent, os.W_OK | os.X_OK):
        return system
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "vdusefast"
    return None


def absolute(path: Path) -> Path:
    """Return `path` as it is understood here. Raises VdusefastError when that cannot be known."""
    try:
        return path.absolute()
    except OSError as error:
        raise VdusefastError(
            f"{path}: cannot tell where that is, the working directory: {error.strerror}; name an absolute path"
        ) from None


def device_names(base: Path) -> list[str]:
    """Return the names of the run directories below `base`, sorted; none where it does not exist.

    Raises VdusefastError when it cannot be read.
    """
    try:
        return sorted(entry.name for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise VdusefastError(f"cannot list the devices in {base}: {error.strerror}") from None


def is_held(path: Path) -> bool:
    """Return whether a living process holds the run directory at `path`.

    Raises VdusefastError when its lock cannot be opened.
    """
    try:
        fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise VdusefastError(
            f"{path.name}: cannot look at {path}: {error.strerror}; be the user who added it"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def holder_pid(path: Path) -> int:
    """Return the process that took the run directory at `path` last, 0 where that is not known."""
    return _read_holder(path)[0]


def holder_transport(path: Path) -> str:
    """Return the transport of the device that has or had the run directory at `path`, "" where that is not known."""
    return _read_holder(path)[1]


def _read_holder(path: Path) -> tuple[int, str]:
    try:
        return _parse_holder((path / "lock").read_bytes())
    except OSError:
        return 0, ""


def _parse_holder(text: bytes) -> tuple[int, str]:
    """Return pid and transport out of a lock file."""
    pid, _, transport = text.decode(errors="replace").strip().partition(" ")
    return (int(pid) if pid.isdecimal() else 0), transport


def _make_base(base: Path) -> None:
    """Make the directory that run directories lie in, if need be. Everybody may see their names. Raises OSError."""
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
        base = base or base_directory()
        if base is None:
            base = self._private = Path(tempfile.mkdtemp(prefix="vdusefast-"))
        base = absolute(base)
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

    def open_store_notes(self) -> int:
        """Return a descriptor of the file that workers of a store's module leave notes in for the next ones.

        Raises VdusefastError.
        """
        try:
            return os.open(self.path / "store", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise VdusefastError(f"{self.path.name}: cannot open {self.path / 'store'}: {error.strerror}") from None

    @property
    def lock_path(self) -> Path:
        """Return the file whose lock holds the name."""
        return self.path / "lock"

    def close(self) -> None:
        """Remove the directory with what is in it, then give the name back. Idempotent.

        Raises VdusefastError when it cannot be removed, or is not the one that was made: what is there stays then.
        """
        if self._lock_fd < 0:
            return
        try:
            if not self._names(self._lock_fd):
                raise VdusefastError(f"{self.path} is not the run directory that was made there: somebody has moved it")
            for name in CONTENTS:
                (self.path / name).unlink(missing_ok=True)
            self._remove_directory()
        except OSError as error:
            raise VdusefastError(f"cannot remove the run directory {self.path}: {error.strerror}") from None
        finally:
            self.release()
            self._remove_private()

    def note_transport(self, transport: str) -> None:
        """Note the transport for those who find the directory of a dead process. Raises OSError."""
        self.transport = transport
        self._note_holder(self._lock_fd)

    def release(self) -> None:
        """Give the name back and leave the directory as it is, for the next server of its device. Idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _remove_directory(self) -> None:
        """Remove the empty directory. Without its lock file it may be another's already. Raises OSError."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            pass  # whoever took the name after us has removed it already
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # whoever takes the name after us has it already
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
                os.close(fd)
                raise
            os.close(fd)
        raise DeviceBusyError(f"{name}: other processes keep making and removing {self.path}")

    def _note_holder(self, fd: int) -> None:
        self.transport = self.transport or _parse_holder(os.pread(fd, HOLDER_MAX_BYTES, 0))[1]
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {self.transport}".rstrip().encode() + b"\n", 0)

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
