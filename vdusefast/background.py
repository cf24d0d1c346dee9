"""Start a process in the background that serves a device, and hear from it whether the device is usable.

It reports by one line through a pipe: its info, or its error. Whoever waits and is interrupted, or has waited long
enough, ends it; one that cannot report because nobody waits any more ends by itself.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from vdusefast import left, logs, registry, run_dir
from vdusefast.config import Config
from vdusefast.errors import TimedOutError, VdusefastError, from_exit_code
from vdusefast.signals import PatientStopSignals

START_MARGIN_S = 60.0  # beyond the limit for the attach, what the server allows itself: api.START_TIMEOUT_S, MARGIN_S
EXIT_TIMEOUT_S = 10.0  # once it has said what went wrong
END_TIMEOUT_S = 75.0  # what the server allows itself to undo a start
KILL_TIMEOUT_S = 5.0
REPORT_MAX_BYTES = 4 << 20
ERROR_TEXT_BYTES = 4096
SERVICE_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "INVOCATION_ID", "SYSTEMD_EXEC_PID")
_OUTCOME = {False: "not added", True: "left as it was"}
# How a server is asked to end: SIGINT removes its device, unless somebody uses that by now, SIGTERM leaves it. The
# second signal is for a process that was started with the first one ignored, and has not set that right yet.
_ASKING = {False: (signal.SIGINT, signal.SIGTERM), True: (signal.SIGTERM,)}

Json = dict[str, Any]


class _Report(msgspec.Struct):
    """What the process says, once."""

    info: Json | None = None
    error: str = ""
    exit_code: int = 1


class Mode(StrEnum):
    """What the process is to do."""

    ADD = "add"  # create the device, or go on with one of that name that was left
    TAKE_OVER = "take over"  # the same, once the server that it has now has handed it over
    FAIL = "fail"  # go on with one that was left, to answer its requests with errors until it is removed


class InterruptedStartError(VdusefastError):
    """A signal came before the device was usable."""

    exit_code = 130


# -- the side that waits


def start(config: Config, timeout_s: float, command: Sequence[str] | None = None, *, mode: Mode = Mode.ADD) -> Json:
    """Start a process that serves `config`, and return its info once the device is usable.

    timeout_s: for all of it. mode: what it does first. command: what to run in place of the real one; name, descriptors
    and mode follow. Runs in the main thread. Raises what the process reports, TimedOutError, InterruptedStartError; the
    process has ended then, and nothing is left behind but what it has found: a device that waits in the kernel for a
    server waits on.
    """
    name = config.device.name
    keeps = mode != Mode.ADD or left.is_left(registry.base_directory() / name)
    log_fd = os.memfd_create("vdusefast-log", os.MFD_CLOEXEC)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        with PatientStopSignals() as signals:
            try:
                process = _spawn(list(command or _default_command()), config, mode, write_fd, log_fd)
            finally:
                os.close(write_fd)
            try:
                line = _wait(read_fd, signals, name, time.monotonic() + timeout_s, _OUTCOME[keeps])
            except BaseException:
                _end(process, name, _ASKING[keeps])
                raise
            return _judge(line, process, name, log_fd, _ASKING[keeps])
    finally:
        os.close(read_fd)
        os.close(log_fd)


def _default_command() -> list[str]:
    """Return the words that start the process; see worker_process.default_command."""
    here = str(Path(__file__).resolve().parent.parent)
    code = f"import sys; sys.path.append({here!r}); from vdusefast.background import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-P", "-c", code]


def _spawn(command: list[str], config: Config, mode: Mode, write_fd: int, log_fd: int) -> subprocess.Popen[bytes]:
    """Start the process in a session of its own and hand it the configuration. Raises VdusefastError."""
    journal_fd = 2 if logs.is_journal(2) else -1
    kept = os.dup(journal_fd) if journal_fd >= 0 else -1
    pass_fds = [fd for fd in (write_fd, kept) if fd >= 0]
    try:
        process = subprocess.Popen(
            [*command, config.device.name, str(write_fd), str(kept), mode],
            stdin=subprocess.PIPE,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=pass_fds,
            start_new_session=True,
            # Those of a service that runs this command are for that one's own processes.
            env={key: value for key, value in os.environ.items() if key not in SERVICE_VARIABLES},
        )
    except OSError as error:
        raise VdusefastError(f"{config.device.name}: its server cannot be started: {error}") from None
    finally:
        if kept >= 0:
            os.close(kept)
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(config))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended already, which shows in its report
    return process


def _wait(read_fd: int, signals: PatientStopSignals, name: str, until: float, outcome: str) -> bytes:
    """Return what the process reports, empty when it has ended without. Raises TimedOutError, InterruptedStartError."""
    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    poll.register(signals.fileno(), select.POLLIN)
    line = b""
    began = time.monotonic()
    while not line.endswith(b"\n"):
        ready = poll.poll(max(0.0, until - time.monotonic()) * 1000)
        if signals.received:
            raise InterruptedStartError(f"{name}: interrupted by {signals.received.name}; it was {outcome}")
        if not ready:
            raise TimedOutError(
                f"{name}: not usable within {time.monotonic() - began:.3g} s and {outcome}; see the kernel log, and "
                "raise --timeout if it is merely slow"
            )
        data = os.read(read_fd, 1 << 16)
        if not data or len(line) > REPORT_MAX_BYTES:
            return b""
        line += data
    return line


def _judge(
    line: bytes, process: subprocess.Popen[bytes], name: str, log_fd: int, asking: tuple[signal.Signals, ...]
) -> Json:
    """Return the info that was reported. Raises the error that was; the process has ended then."""
    if line:
        report = msgspec.json.decode(line, type=_Report)
        if report.info is not None:
            process.returncode = 0  # it serves on when we have ended
            return report.info
        _end(process, name, asking, ask=False)
        raise from_exit_code(report.error, report.exit_code)
    _end(process, name, asking, ask=False)
    text = os.pread(log_fd, ERROR_TEXT_BYTES, max(0, os.fstat(log_fd).st_size - ERROR_TEXT_BYTES))
    lines = text.decode(errors="replace").strip().splitlines()
    status = process.returncode
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    raise VdusefastError(f"{name}: its server {how} before the device was usable" + (f": {lines[-1]}" if lines else ""))


def _end(process: subprocess.Popen[bytes], name: str, asking: tuple[signal.Signals, ...], *, ask: bool = True) -> None:
    """Wait until the process has ended. It is asked to by the signals `asking`, at once with `ask`, and killed if it
    does not.

    It may be a healthy server that we have lost: a SIGKILL would leave its device in the kernel.
    """
    if not (
        (not ask and _ends(process, EXIT_TIMEOUT_S))
        or _ends(process, END_TIMEOUT_S, *asking)
        or _ends(process, KILL_TIMEOUT_S, signal.SIGKILL)
    ):
        raise TimedOutError(
            f"{name}: pid {process.pid} hangs in the kernel and cannot be ended; see /proc/{process.pid}/stack"
        )
    path = registry.base_directory() / name
    held = not path.is_dir() or run_dir.is_held(path)
    if not held and run_dir.holder_pid(path) == process.pid and not left.is_left(path):
        registry.remove_dead(path)  # it was killed


def _ends(process: subprocess.Popen[bytes], timeout_s: float, *numbers: signal.Signals) -> bool:
    """Send signals, if any, and return whether the process ends in time."""
    for number in numbers:
        process.send_signal(number)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


# -- the process


def main(words: Sequence[str]) -> int:
    """Serve the device whose configuration comes on standard input.

    words: name, report and journal descriptors, mode.
    """
    _name, report_fd, journal_fd = words[0], int(words[1]), int(words[2])
    os.umask(0o077)
    os.set_inheritable(report_fd, False)
    log = logs.LogFile()
    if journal_fd >= 0:
        logs.log_to_journal(journal_fd)
    try:
        _serve(_read_config(), Mode(words[3]), log, report_fd)
    except VdusefastError as error:
        _tell(report_fd, _Report(error=str(error), exit_code=error.exit_code))
        return error.exit_code
    return 0


def _read_config() -> Config:
    text = sys.stdin.buffer.read()
    null_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null_fd, 0)
    os.close(null_fd)
    return msgspec.json.decode(text, type=Config)


def _serve(config: Config, mode: Mode, log: logs.LogFile, report_fd: int) -> None:
    from vdusefast.daemon import Service

    service = Service(
        config, registry.base_directory(), take_over=mode == Mode.TAKE_OVER, fail_requests=mode == Mode.FAIL
    )

    def on_ready(info: Json) -> None:
        log.move(service.path / "log")
        os.chdir("/")
        if not _tell(report_fd, _Report(info=info)):
            raise VdusefastError(f"{config.device.name}: whoever added it has not waited for it")
        os.close(report_fd)

    service.run(on_ready)


def _tell(report_fd: int, report: _Report) -> bool:
    """Return whether somebody hears the report."""
    line = msgspec.json.encode(report) + b"\n"
    try:
        while line:
            line = line[os.write(report_fd, line) :]
    except OSError:
        return False
    return True
