"""The real fio: finding it, its engines, and running it so that nothing of it is left behind."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from vdusefast.base.json_types import Json
from vdusefast.errors import ConfigError, VdusefastError

SYS_IO_URING_SETUP = 425  # the same on every architecture
IO_URING_PARAMS_BYTES = 120
FINISH_S = 20.0  # how long fio may take to finish what is in flight once it was told to stop
KILL_S = 5.0  # how long a killed process may take to be gone, unless a device holds it
KILL_ROUNDS_MAX = 20  # looks at all processes: a job may fork while we look
TICK_S = 0.1
SIGNAL_BASE = 128
RUN_VARIABLE = "VDUSEFAST_FIO_RUN"  # in the environment of fio, of its jobs and of programs that they start
START_TIME_FIELD = 19  # of /proc/PID/stat, counted after the name
PERCENTILE_99 = "99.000000"
DIRECTIONS = ("read", "write", "trim")


class FioStuckError(VdusefastError):
    """A killed fio is not gone: requests of it wait in the kernel, and their device has to go first.

    fio: to `reap` then. cause: why it was killed, None when it was not for an error.
    """

    def __init__(self, message: str, fio: FioProcess):
        super().__init__(message)
        self.fio = fio
        self.cause: BaseException | None = None


@dataclass(frozen=True)
class FioOutcome:
    """How a run ended: exit status, the JSON report ({} when it printed none), and every other line that it printed."""

    status: int
    report: Json
    messages: list[str]


def find_fio(purpose: str) -> str:
    """Return the path of fio. Raises ConfigError that says what needs it and how to get it."""
    path = shutil.which("fio")
    if path is None:
        raise ConfigError(f"{purpose} needs the real fio, which is not installed; type: sudo apt-get install fio")
    return path


def choose_engine(fio: str, wanted: str | None = None) -> str:
    """Return the ioengine to use: `wanted`, else io_uring where kernel and fio have it, else libaio.

    Raises ConfigError when fio or the kernel does not have it.
    """
    listed = subprocess.run([fio, "--enghelp"], capture_output=True, text=True, timeout=60, check=False).stdout
    known = set(listed.split())
    if wanted is None:
        wanted = "io_uring" if "io_uring" in known and kernel_has_io_uring() else "libaio"
    if wanted not in known:
        raise ConfigError(f"ioengine={wanted}: this fio does not have it; type: fio --enghelp")
    if wanted == "io_uring" and not kernel_has_io_uring():
        raise ConfigError("ioengine=io_uring: this kernel does not have it, or forbids it; use ioengine=libaio")
    return wanted


def kernel_has_io_uring() -> bool:
    """Return whether this process may set up an io_uring."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_IO_URING_SETUP, 1, ctypes.create_string_buffer(IO_URING_PARAMS_BYTES))
    if fd >= 0:
        os.close(fd)
        return True
    return ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM)


def exit_status(status: int) -> int:
    """Return a status of `subprocess` as a shell has it: 128 and the number of the signal that ended the process."""
    return status if status >= 0 else SIGNAL_BASE - status


class FioProcess:
    """A running fio. A context manager: when it exits, fio and the processes of its jobs are gone.

    Jobs lead sessions of their own, and have no parent any more once fio was killed: a variable in the environment says
    whose they are. Programs that fio started stay when it has ended by itself.

    Raises FioStuckError on exit when they are not: the device that they use has to go first, then `reap`.
    """

    def __init__(self, arguments: Sequence[str], *, out_fd: int = -1, environment: Mapping[str, str] | None = None):
        """Start `arguments`, a complete command line. Raises VdusefastError.

        out_fd: borrowed; what fio prints goes there, and what it says on stderr to ours. -1: both are for `outcome`,
        which needs --output-format=json. environment: variables over ours.
        """
        self._arguments = list(arguments)
        self._mark = f"{RUN_VARIABLE}={secrets.token_hex(16)}"
        self._killed: dict[int, int] = {}  # by pid, the pidfds of processes of its jobs
        self._out: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        try:
            # A group of its own: a terminal's Ctrl-C is ours to pass on.
            self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=self._out if out_fd < 0 else out_fd,
                stderr=subprocess.STDOUT if out_fd < 0 else None,
                process_group=0,
                env={**os.environ, **(environment or {}), RUN_VARIABLE: self._mark.partition("=")[2]},
            )
        except OSError as error:
            self._out.close()
            raise VdusefastError(f"{self._arguments[0]}: cannot be started: {error.strerror}") from None
        self._pid_fd = os.pidfd_open(self._process.pid)
        self._began = _start_time(self._process.pid)

    def __enter__(self) -> FioProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        try:
            self.reap(KILL_S)
        except FioStuckError as stuck:
            stuck.cause = error
            raise

    def wait(self, timeout_s: float, *fds: int) -> bool:
        """Wait until fio has ended, one of `fds` (borrowed; -1: none) is readable, or `timeout_s` is over.

        Returns whether fio has ended.
        """
        if self._pid_fd < 0:
            return True
        watched = [self._pid_fd, *(fd for fd in fds if fd >= 0)]
        ready, _, _ = select.select(watched, [], [], max(0.0, timeout_s))
        return self._pid_fd in ready

    def interrupt(self) -> None:
        """Ask fio to finish what is in flight and to print its report."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Kill fio and the processes of its jobs, unless it has ended by itself. Does not wait for them."""
        status = self._process.poll()
        if self._pid_fd < 0 or (status is not None and status >= 0):
            return
        if status is None:
            self._process.kill()
        for _ in range(KILL_ROUNDS_MAX):
            found = [pid for pid in self._jobs() if pid not in self._killed]
            if not found:
                return
            for pid in found:
                self._kill_job(pid)

    def _jobs(self) -> Iterator[int]:
        """Yield the processes of the run, without fio itself."""
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != self._process.pid and self._is_job(int(entry)):
                yield int(entry)

    def _is_job(self, pid: int) -> bool:
        if _start_time(pid) < self._began:
            return False
        try:
            return self._mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            return False

    def _kill_job(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            pid_fd = os.pidfd_open(pid)
            if self._is_job(pid):  # the number could be another process's by now
                self._killed[pid] = pid_fd
                signal.pidfd_send_signal(pid_fd, signal.SIGKILL)
            else:
                os.close(pid_fd)

    def reap(self, timeout_s: float) -> None:
        """Wait until a killed or ended fio is gone. Raises FioStuckError after `timeout_s`."""
        if self._pid_fd < 0:
            return
        until = time.monotonic() + timeout_s
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise FioStuckError(
                f"fio (pid {self._process.pid}) was killed and is not gone: requests of it wait for an answer", self
            ) from None
        for pid, pid_fd in list(self._killed.items()):
            if not select.select([pid_fd], [], [], max(0.0, until - time.monotonic()))[0]:
                raise FioStuckError(
                    f"a job of fio (pid {pid}) was killed and is not gone: requests of it wait for an answer", self
                )
            os.close(self._killed.pop(pid))
        os.close(self._pid_fd)
        self._pid_fd = -1
        self._out.close()

    def status(self) -> int:
        """Return fio's exit status, once `wait` has returned true."""
        return self._process.wait()

    def outcome(self) -> FioOutcome:
        """Return how it went, once `wait` has returned true."""
        status = self._process.wait()
        self._out.seek(0)
        report, messages = split_output(self._out.read())
        return FioOutcome(status, report, messages)


def _start_time(pid: int) -> int:
    """Return when a process began, in clock ticks since the start of the machine; 0 when it has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[START_TIME_FIELD])
    except OSError:
        return 0


def split_output(text: str) -> tuple[Json, list[str]]:
    """Return the report within what fio printed ({} when there is none), and the other lines that are not empty."""
    lines = text.splitlines(keepends=True)
    for first, line in enumerate(lines):
        if not line.startswith("{"):
            continue
        try:
            report, end = json.JSONDecoder().raw_decode("".join(lines[first:]))
        except ValueError:
            break
        rest = "".join(lines[:first]) + "".join(lines[first:])[end:]
        return report, [other.strip() for other in rest.splitlines() if other.strip()]
    return {}, [line.strip() for line in lines if line.strip()]


def run_fio(
    arguments: Sequence[str],
    *,
    limit_s: float,
    stop_fd: int = -1,
    finish: bool = False,
    tick: Callable[[float], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> FioOutcome:
    """Run fio to its end and return how it went. environment: variables over ours.

    limit_s: it is killed after so many seconds. stop_fd: borrowed; when it becomes readable, fio is killed, or, with
    `finish`, asked to finish, and its report so far is returned. tick: called ten times a second with the time passed;
    an exception of it ends fio. Raises VdusefastError, FioStuckError.
    """
    began = time.monotonic()
    with FioProcess(arguments, environment=environment) as fio:
        asked_s = 0.0
        while True:
            passed = time.monotonic() - began
            if passed > limit_s or (asked_s and passed - asked_s > FINISH_S):
                raise VdusefastError(f"fio did not end within {passed:.0f} s")
            if fio.wait(TICK_S, -1 if asked_s else stop_fd):
                return fio.outcome()
            if tick is not None:
                tick(passed)
            if not asked_s and readable(stop_fd):
                if not finish:
                    raise VdusefastError("fio was stopped by a signal")
                asked_s = max(passed, 1e-9)
                fio.interrupt()


def readable(fd: int) -> bool:
    """Return whether `fd` (-1: none) is readable now."""
    return fd >= 0 and bool(select.select([fd], [], [], 0)[0])


def job_figures(jobs: Sequence[Json]) -> Json:
    """Return IOPS, bandwidth, mean and 99th percentile of latency over all jobs of a report, in fio's own units.

    The percentile is that of the slowest direction or job: percentiles cannot be added up.
    """
    sides = [job[op] for job in jobs for op in DIRECTIONS if job[op]["total_ios"]]
    count = sum(side["total_ios"] for side in sides)
    weighed = sum(side["clat_ns"]["mean"] * side["total_ios"] for side in sides)
    return {
        "iops": sum(side["iops"] for side in sides),
        "bw_bytes": sum(side["bw_bytes"] for side in sides),
        "total_ios": count,
        "clat_mean_ns": weighed / count if count else 0.0,
        "clat_p99_ns": max((side["clat_ns"].get("percentile", {}).get(PERCENTILE_99, 0) for side in sides), default=0),
        "usr_cpu": sum(job["usr_cpu"] for job in jobs) / len(jobs) if jobs else 0.0,
        "sys_cpu": sum(job["sys_cpu"] for job in jobs) / len(jobs) if jobs else 0.0,
    }


def problem(outcome: FioOutcome) -> str:
    """Return in a few words why fio failed, "" when it did not."""
    if outcome.status == 0 and outcome.report:
        return ""
    said = outcome.messages[-1] if outcome.messages else "it printed nothing"
    how = (
        f"was killed by {signal.Signals(-outcome.status).name}"
        if outcome.status < 0
        else f"ended with status {outcome.status}"
    )
    return f"fio {how}: {said}"
