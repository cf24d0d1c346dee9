"""Start a server in the background, and wait for its report whether the device is usable.

Where systemd is process 1, the server is a service of its own, which systemd restarts. Elsewhere it is a child of ours.
It reports by one line through a pipe: its info, or its error. A caller that is interrupted, or whose time limit has
passed, ends the server. A server that cannot report, because nobody waits any more, ends by itself.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress

import msgspec

from vdusefast.backends import find
from vdusefast.base import logs, spawn, time_limits
from vdusefast.base.decoding import decode_json
from vdusefast.base.json_types import Json
from vdusefast.base.start_mode import StartMode
from vdusefast.config import Config
from vdusefast.errors import EXIT_DELETED, TimedOutError, VdusefastError, from_exit_code
from vdusefast.host import run_dirs
from vdusefast.server import foreign_process, registry
from vdusefast.server.foreign_process import ForeignProcess
from vdusefast.server.sd_notify import is_service
from vdusefast.server.signals import PatientStopSignals
from vdusefast.server.systemd import manager as service_manager
from vdusefast.server.systemd import start_file, transient_unit
from vdusefast.state import orphans

EXIT_TIMEOUT_S = 10.0  # once it has said what went wrong
END_TIMEOUT_S = time_limits.undo_s()
LET_BE_TIMEOUT_S = 2.0  # for a server that has not taken over yet to see that nobody waits for it
KILL_TIMEOUT_S = 5.0
REPORT_MAX_BYTES = 4 << 20
ERROR_TEXT_BYTES = 4096
LOG_BYTES = 64 << 10  # of the server's log that its caller shows: several tracebacks
SERVICE_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "INVOCATION_ID", "SYSTEMD_EXEC_PID")
# A new main process of a service needs these. WATCHDOG_PID names another process, without it the watchdog is anybody's.
MAIN_PROCESS_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "INVOCATION_ID")
SERVICE_LOOK_S = 1.0  # how often systemd is asked whether it still starts a server that has not reported
_OUTCOME = {False: "not added", True: "left as it was"}
_OUTCOME_TAKE_OVER = "left to its old server, unless the new one serves it already"
# How a server is asked to end: SIGINT removes its device, unless somebody uses that by now, SIGTERM leaves it. The
# second signal is for a process that was started with the first one ignored, and has not set that right yet.
_ASKING = {False: (signal.SIGINT, signal.SIGTERM), True: (signal.SIGTERM,)}

Process = subprocess.Popen[bytes] | ForeignProcess


class _Report(msgspec.Struct):
    """What the server reports, once."""

    info: Json | None = None
    error: str = ""
    exit_code: int = 1


class InterruptedStartError(VdusefastError):
    """A signal came before the device was usable."""

    exit_code = 130


# -- the side that waits


def start(
    config: Config,
    timeout_s: float | None = None,
    command: Sequence[str] | None = None,
    *,
    mode: StartMode = StartMode.ADD,
    service: bool = False,
    own_service: bool = True,
) -> Json:
    """Start a process that serves `config`, and return its info once the device is usable.

    timeout_s: for all of it, None for what the process allows itself. mode: what it does first. command: what to run in
    place of the real one; name, descriptors and mode follow. service: it becomes the main process of the service that
    this process belongs to, and logs to where we do. own_service: it is one of its own where systemd can be asked. Runs
    in the main thread. Raises what the process reports, TimedOutError, InterruptedStartError, with the log of
    the process as a note when it may have a traceback of a user's class. The process has ended then, and leaves nothing
    behind but what it has found: an orphan waits in the kernel as before. A process that takes over is not ended: it
    ends by itself where it has not taken over yet, and serves on where it has.
    """
    name = config.device.name
    keeps = mode != StartMode.ADD or orphans.is_left(registry.base_directory() / name)
    outcome = _OUTCOME_TAKE_OVER if mode.takes_over else _OUTCOME[keeps]
    if timeout_s is None:
        server_s = time_limits.take_over_s if mode.takes_over else time_limits.start_s
        timeout_s = time_limits.client_s(server_s(config.device.attach_timeout_s))
    log_fd = os.memfd_create("vdusefast-log", os.MFD_CLOEXEC)
    read_fd = -1
    is_own = own_service and command is None and mode.may_be_service and _starts_service(config)
    try:
        with PatientStopSignals() as signals:
            process: Process
            if is_own:
                process, read_fd = _spawn_service(config, mode, signals, time.monotonic() + timeout_s, outcome)
            else:
                read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
                output_fd = None if service else log_fd
                try:
                    process = _spawn(list(command or _default_command("main")), config, mode, write_fd, output_fd)
                finally:
                    os.close(write_fd)
            try:
                line = _wait(read_fd, signals, name, time.monotonic() + timeout_s, outcome)
            except BaseException:
                if mode.takes_over:
                    read_fd = _let_be(process, read_fd)
                else:
                    _end(process, name, _ASKING[keeps])
                raise
            return _judge(line, process, name, log_fd, _ASKING[keeps])
    except VdusefastError as error:
        if find(config.backend.uri).foreign and (log := _last_bytes(log_fd, LOG_BYTES)):
            error.add_note(log)
        raise
    finally:
        if read_fd >= 0:
            os.close(read_fd)
        os.close(log_fd)


def _starts_service(config: Config) -> bool:
    """Return whether the server is to be a service. One that cannot come to serve says why as a child of ours."""
    path = registry.base_directory() / config.device.name
    held = path.is_dir() and run_dirs.is_held(path)
    return config.device.is_in_kernel and not held and not transient_unit.refusal()


def _spawn_service(
    config: Config, mode: StartMode, signals: PatientStopSignals, until: float, outcome: str
) -> tuple[transient_unit.ServiceProcess, int]:
    """Start the process as a service. Returns it with a descriptor of its report, once it has begun.

    Raises VdusefastError, InterruptedStartError, TimedOutError; it has ended then.
    """
    name = config.device.name
    listener, address = start_file.listen()
    own = {*SERVICE_VARIABLES, "JOURNAL_STREAM", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}
    environment = {key: value for key, value in os.environ.items() if key not in own}
    with listener:
        start_file.write(start_file.Launch(config, mode, address, os.getcwd(), environment))
        serve = [*_default_command("main_of_service"), name]
        reload = [*spawn.command("cli.systemd", "reload_service"), name]
        try:
            transient_unit.start(config, serve, reload)
            connection = _await_service(listener, signals, name, until, outcome)
        except BaseException:
            transient_unit.stop(name)
            raise
    return transient_unit.ServiceProcess(start_file.peer_ids(connection)[0]), connection.detach()


def _await_service(
    listener: socket.socket, signals: PatientStopSignals, name: str, until: float, outcome: str
) -> socket.socket:
    """Return the connection that a service has made. Raises as `_spawn_service`."""
    while True:
        ready = select.select([listener.fileno(), signals.fileno()], [], [], SERVICE_LOOK_S)[0]
        if signals.received:
            raise InterruptedStartError(f"{name}: interrupted by {signals.received.name}; it was {outcome}")
        if ready:
            connection, _ = listener.accept()
            if start_file.peer_ids(connection)[1] == 0:
                return connection
            connection.close()  # of somebody who is not asked
        elif transient_unit.has_ended(name):
            unit = transient_unit.unit_name(name)
            raise VdusefastError(f"{name}: its server ended at once: journalctl -u {unit} says why")
        elif time.monotonic() > until:
            raise TimedOutError(f"{name}: systemd did not start its server in time and it was {outcome}")


def _default_command(function: str) -> list[str]:
    """Return the command that starts the server."""
    return spawn.command("server.launch", function)


def _spawn(command: list[str], config: Config, mode: StartMode, write_fd: int, output_fd: int | None) -> Process:
    """Start the process in a session of its own and hand it the configuration.

    output_fd: for its output. None makes it the main process of our service: with our output, and with systemd as its
    parent. Raises VdusefastError.
    """
    name = config.device.name
    hidden = set(SERVICE_VARIABLES) - set(MAIN_PROCESS_VARIABLES if output_fd is None else ())
    # Those of a service that runs this command are for that one's own processes.
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    kept = -1
    try:
        with open(os.memfd_create("vdusefast-config", os.MFD_CLOEXEC), "w+b") as file:
            file.write(msgspec.json.encode(config))
            file.seek(0)
            if output_fd is None:
                arguments = [*command, name, str(write_fd), "-1", mode]
                return foreign_process.start(arguments, stdin=file, pass_fds=[write_fd], environment=environment)
            if logs.is_journal(2):
                kept = os.dup(2)
            return subprocess.Popen(
                [*command, name, str(write_fd), str(kept), mode],
                stdin=file,
                stdout=output_fd,
                stderr=output_fd,
                pass_fds=[fd for fd in (write_fd, kept) if fd >= 0],
                start_new_session=True,
                env=environment,
            )
    except (OSError, VdusefastError) as error:
        raise VdusefastError(f"{name}: its server cannot be started: {error}") from None
    finally:
        if kept >= 0:
            os.close(kept)


def _wait(read_fd: int, signals: PatientStopSignals, name: str, until: float, outcome: str) -> bytes:
    """Return what the process reports, empty when it has ended without. Raises TimedOutError, InterruptedStartError."""
    line = b""
    began = time.monotonic()
    while not line.endswith(b"\n"):
        ready = signals.wait_for(read_fd, timeout_s=until - time.monotonic())
        if signals.received:
            raise InterruptedStartError(f"{name}: interrupted by {signals.received.name}; it was {outcome}")
        if not ready and time.monotonic() < until:
            continue
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


def _judge(line: bytes, process: Process, name: str, log_fd: int, asking: tuple[signal.Signals, ...]) -> Json:
    """Return the info that was reported. Raises the error that was; the process has ended then."""
    if line:
        try:
            report = decode_json(line, _Report)
        except msgspec.DecodeError as error:
            _end(process, name, asking)
            raise VdusefastError(f"{name}: its server sent a report that cannot be read: {error}") from None
        if report.info is not None:
            process.returncode = 0  # it serves on when we have ended
            return report.info
        _end(process, name, asking, ask=False)
        raise from_exit_code(report.error, report.exit_code)
    _end(process, name, asking, ask=False)
    if isinstance(process, ForeignProcess):
        is_own = isinstance(process, transient_unit.ServiceProcess)
        unit = transient_unit.unit_name(name) if is_own else service_manager.own_unit()
        where = f": journalctl -u {unit} says why" if unit else ""
        raise VdusefastError(f"{name}: its server ended before the device was usable{where}")
    lines = _last_bytes(log_fd, ERROR_TEXT_BYTES).splitlines()
    status = process.returncode
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    raise VdusefastError(f"{name}: its server {how} before the device was usable" + (f": {lines[-1]}" if lines else ""))


def _last_bytes(fd: int, limit_bytes: int) -> str:
    """Return the end of a file, without space around it."""
    return os.pread(fd, limit_bytes, max(0, os.fstat(fd).st_size - limit_bytes)).decode(errors="replace").strip()


def _end(process: Process, name: str, asking: tuple[signal.Signals, ...], *, ask: bool = True) -> None:
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
    if isinstance(process, transient_unit.ServiceProcess):
        transient_unit.stop(name)  # nor is another one started
    path = registry.base_directory() / name
    held = not path.is_dir() or run_dirs.is_held(path)
    if not held and run_dirs.holder_pid(path) == process.pid and not orphans.is_left(path):
        registry.remove_dead(path)  # it was killed


def _let_be(process: Process, read_fd: int) -> int:
    """Wait no more for a process that takes a device over: to end it may leave the device without a server.

    Consumes `read_fd`, by whose end it knows. Returns -1.
    """
    os.close(read_fd)
    if not _ends(process, LET_BE_TIMEOUT_S):
        process.returncode = 0  # it continues when we have ended
    return -1


def _ends(process: Process, timeout_s: float, *numbers: signal.Signals) -> bool:
    """Send signals, if any, and return whether the process ends in time."""
    for number in numbers:
        process.send_signal(number)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


# -- the process


def main(arguments: Sequence[str]) -> int:
    """Serve the device whose configuration comes on standard input.

    arguments: name, report and journal descriptors, mode.
    """
    _name, report_fd, journal_fd = arguments[0], int(arguments[1]), int(arguments[2])
    os.umask(0o077)
    log = None if is_service() else logs.LogFile()
    if journal_fd >= 0:
        logs.log_to_journal(journal_fd)
    with logs.log_to_stderr() if log is None else nullcontext():
        try:
            return _serve(_read_config(), StartMode(arguments[3]), log, report_fd)
        except VdusefastError as error:
            _send_report(report_fd, _Report(error=str(error), exit_code=error.exit_code))
            return error.exit_code


def main_of_service(arguments: Sequence[str]) -> int:
    """Serve a device as a service of systemd's: the first time as start_file.py's file says, later the orphan.

    arguments: its name. The status says whether systemd is to start the next one.
    """
    name = arguments[0]
    os.umask(0o077)
    journal_fd = os.dup(2)
    log_fd = os.memfd_create("vdusefast-log", os.MFD_CLOEXEC)
    for fd in (1, 2):
        os.dup2(log_fd, fd)
    log = logs.LogFile()
    logs.log_to_journal(journal_fd)
    report_fd = -1
    try:
        start = start_file.read(name)
        enter(start)
        connection = start_file.connect(start.waiting)
        report_fd = connection.detach() if connection is not None else -1
        path = registry.base_directory() / name
        if report_fd < 0 and not orphans.is_left(path):
            return EXIT_DELETED
        config = start.config if report_fd >= 0 else orphans.load_state(path).config
        _serve(config, StartMode(start.mode) if report_fd >= 0 else StartMode.ADD, log, report_fd)
    except VdusefastError as error:
        if report_fd >= 0:
            _send_report(report_fd, _Report(error=str(error), exit_code=error.exit_code))
            return EXIT_DELETED  # the caller knows
        logging.getLogger("vdusefast").error("%s", error)
        return error.exit_code
    if orphans.in_kernel(name):
        return 0
    start_file.remove(name)
    return EXIT_DELETED  # by `del`, or by a signal


def enter(start: start_file.Launch) -> None:
    """Be where the caller of `add` was, as far as there is such a place, with its environment."""
    os.environ.update(start.environment)
    sys.path[1:1] = [entry for entry in start.environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    with suppress(OSError):
        os.chdir(start.working_directory)


def _read_config() -> Config:
    text = sys.stdin.buffer.read()
    null_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null_fd, 0)
    os.close(null_fd)
    return msgspec.json.decode(text, type=Config)


def _serve(config: Config, mode: StartMode, log: logs.LogFile | None, report_fd: int) -> int:
    """Serve to the end. Returns the exit status."""
    from vdusefast.server.service import Service

    if report_fd >= 0:
        os.set_inheritable(report_fd, False)

    def refuse_unheard() -> None:
        poll = select.poll()
        poll.register(report_fd, 0)
        if poll.poll(0):
            raise VdusefastError(f"{config.device.name}: nobody waits for the new server any more")

    service = Service(
        config,
        registry.base_directory(),
        mode,
        before_take_over=refuse_unheard,
    )

    def on_ready(info: Json) -> None:
        if log is not None:
            log.move(service.path / "log")
        os.chdir("/")
        if report_fd < 0:
            return
        if not _send_report(report_fd, _Report(info=info)) and not mode.takes_over:
            raise VdusefastError(f"{config.device.name}: the command that added it has not waited for it")
        null_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null_fd, report_fd, inheritable=False)  # the waiting side sees its end, and its number stays taken
        os.close(null_fd)

    service.run(on_ready)
    return service.exit_status


def _send_report(report_fd: int, report: _Report) -> bool:
    """Return whether somebody hears the report."""
    line = msgspec.json.encode(report) + b"\n"
    try:
        while line:
            line = line[os.write(report_fd, line) :]
    except OSError:
        return False
    return True
