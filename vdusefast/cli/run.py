"""The command `run`: a program that uses a loopback device as a disk, without a kernel module."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from vdusefast.base.kinds import TransportKind
from vdusefast.cli.serve import DEVICE_OPTIONS, fill_standard_descriptors, read_config
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.server.signals import Wakeup

if TYPE_CHECKING:
    import subprocess

    from vdusefast.config import Config

KIND = "run"  # of its run directories
EXIT_NOT_EXECUTABLE = 126  # as a shell reports these two
EXIT_NOT_FOUND = 127
_SIGNAL_BASE = 128
_FORWARDED = (signal.SIGTERM, signal.SIGHUP)
_IGNORED = (signal.SIGINT, signal.SIGQUIT)  # the terminal sends these to the program, too
_KERNEL_ONLY = {
    *("bus", "irq_cpus", "msg_timeout_s", "bounce_size_bytes", "user_memory", "lock_memory", "scheduler"),
    "attach_timeout_s",
}
_F = TypeVar("_F", bound=Callable[..., Any])


def _device_options(command: _F) -> _F:
    for names, kind, text in reversed(DEVICE_OPTIONS):
        keyword = names[1] if len(names) > 1 else names[0].strip("-").partition("/")[0].replace("-", "_")
        if keyword not in _KERNEL_ONLY:
            flag = {"is_flag": True} if kind is bool else {"type": kind}
            command = click.option(*names, default=None, help=text, **flag)(command)
    return command


@click.command(context_settings={"allow_interspersed_args": False})
@_device_options
@click.option(
    "--route",
    type=click.Choice(["own", "cross"]),
    default="own",
    show_default=True,
    help="own: each thread and AIO context has its own queue; cross: no block is read through the queue that wrote it.",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[CONFIG.toml] -- PROGRAM [ARGUMENT]...")
def run(words: tuple[str, ...], route: str, **options: Any) -> int:
    """Run a program that has a device as its disk, without a kernel module.

    --backend or CONFIG.toml says what holds the bytes. The program finds the disk at the path in $VDUSEFAST_DISK; {}
    in an argument stands for this path. The exit status is the program's. docs/run.md says which programs work.
    """
    target, program = split_words(words, has_backend=options.get("uri") is not None)
    fill_standard_descriptors()
    from vdusefast.state import dead_runs

    dead_runs.remove_dead(KIND)
    name = target or dead_runs.name_of_process(KIND)
    return run_program(read_config(name, {**options, "transport": TransportKind.LOOPBACK}), program, route)


def split_words(words: Sequence[str], *, has_backend: bool) -> tuple[str, list[str]]:
    """Return the configuration file, "" when --backend replaces it, and the program with its arguments.

    Raises ConfigError.
    """
    left = list(words)
    target = "" if has_backend or not left else left.pop(0)
    if left[:1] == ["--"]:
        left.pop(0)
    if not has_backend and not target.endswith(".toml"):
        raise ConfigError("say what holds the bytes of the disk: --backend URI, or a CONFIG.toml before the --")
    if not left:
        raise ConfigError("say which program is to run: vdusefast run --backend URI -- PROGRAM")
    return target, left


def run_program(config: Config, program: Sequence[str], route: str) -> int:
    """Serve a device for a program until that ends. Returns the exit status. Raises VdusefastError."""
    from vdusefast.api import Device
    from vdusefast.base import logs
    from vdusefast.driver import preload
    from vdusefast.driver.attach_server import AttachServer

    with PassedOn() as signals:
        with (
            logs.log_to_stderr(),
            Device(config) as device,
            AttachServer(device.bus, serial=config.device.serial, route=route) as server,
        ):
            status = _wait_for(program, str(server.path), preload.environment(server), signals)
        failure = server.failure or device.failure  # the device drains at its end: that can fail, too
    if failure is not None:
        raise VdusefastError(f"{program[0]} has lost its disk: {failure}")
    return status


def _wait_for(program: Sequence[str], disk: str, environment: dict[str, str], signals: PassedOn) -> int:
    """Run the program to its end. Returns its exit status as a shell does."""
    import subprocess

    command = [word.replace("{}", disk) for word in program]
    with _terminal_left_to_the_program(), Wakeup() as wakeup:
        signals.keep()
        try:
            # It inherits what we have inherited: our own descriptors are closed on exec.
            process = subprocess.Popen(command, env=environment, close_fds=False)
        except OSError as error:
            click.echo(f"vdusefast: {command[0]}: {error.strerror}", err=True)
            return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
        signals.pass_to(process)
        _wait_for_end(process.pid, wakeup)
        status = process.wait()
    return status if status >= 0 else _SIGNAL_BASE - status


def _wait_for_end(pid: int, wakeup: Wakeup) -> None:
    """Wait for the end of a child; handlers of signals run meanwhile."""
    child = os.pidfd_open(pid)
    try:
        while not wakeup.wait(child):
            pass
    finally:
        os.close(child)


class PassedOn:
    """Context manager: signals that would end us are the program's, and we end, cleaned up, when it does.

    Before the program is started, the first one ends us as Ctrl-C does. Once it has ended, they change nothing.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._kept: list[int] | None = None  # those that came while the program was started
        self._ending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = _caught(_FORWARDED, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _restore(self._before)

    def keep(self) -> None:
        """From now on, keep signals for the program."""
        self._kept = []

    def pass_to(self, process: subprocess.Popen[bytes]) -> None:
        """Send the program the signals that were kept, and those that come from now on."""
        self._process = process
        for number in self._kept or []:
            process.send_signal(number)

    def _take(self, number: int, _frame: object) -> None:
        if self._process is not None:
            self._process.send_signal(number)
        elif self._kept is not None:
            self._kept.append(number)
        elif not self._ending:
            self._ending = True  # a second one must not interrupt the clean-up
            raise SystemExit(_SIGNAL_BASE + number)


@contextmanager
def _terminal_left_to_the_program() -> Iterator[None]:
    before = _caught(_IGNORED, lambda *_: None)
    try:
        yield
    finally:
        _restore(before)


def _caught(numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle signals, except those that we were started to ignore: the program ignores these, too.

    Returns the handlers before.
    """
    wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
