"""fio's command line, read as fio reads it: getopt_long_only, then the job files in their order."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vdusefast.errors import ConfigError, VdusefastError

HELP_S = 60.0


def names(text: str) -> frozenset[str]:
    """Return the words of `text` as a set."""
    return frozenset(text.split())


# Options of fio itself (init.c of fio). They describe no job, and are passed on as they are.
WITH_VALUE = names(
    "debug output terse-version output-format eta eta-newline eta-interval status-interval section "
    "alloc-size max-jobs daemonize client remote-config idle-prof inflate-log trigger-file trigger-timeout "
    "trigger trigger-remote aux-path latency-log"
)
WITHOUT_VALUE = names(
    "bandwidth-log minimal append-terse version help parse-only merge-blktrace-only cpuclock-test crctest "
    "cmdhelp enghelp showcmd readonly warnings-fatal server"
)
# fio answers these by itself: they need no device.
ANSWERED = names("version parse-only cpuclock-test crctest cmdhelp enghelp showcmd inflate-log")
REFUSED = {
    "server": "a server runs jobs that others send, on disks of its own",
    "client": "the jobs would run on another machine",
    "remote-config": "the jobs would run on another machine",
    "daemonize": "a device needs its server, which would end with this command",
    "merge-blktrace-only": "it runs no job; type fio in place of this command",
}
ALIASES = {
    "readwrite": "rw",
    "io_limit": "io_size",
    "fill_fs": "fill_device",
    "fileoffset": "offset",
    "blocksize": "bs",
    "blocksize_range": "bsrange",
    "nr_files": "nrfiles",
    "iomem": "mem",
    "timeout": "runtime",
    "wait_for_previous": "stonewall",
}
# Options of engines that take no value; fio tells those of jobs apart by itself.
ENGINE_FLAGS = names("hipri fixedbufs registerfiles sqthread_poll nonvectored uncached userspace_reap")


@dataclass(frozen=True)
class Argument:
    """An option of the command line with its value (None: without), or, with name "", the name of a job file."""

    name: str
    value: str | None

    def text(self) -> str:
        """Return the argument as fio takes it."""
        if not self.name:
            return self.value or ""
        return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"


def canonical(name: str) -> str:
    """Return the name that fio's documentation uses for an option of a job."""
    return ALIASES.get(name, name)


class Knowledge:
    """What this fio knows: names of options, which of them need a value, options of engines, values of numbers."""

    def __init__(self, fio: str):
        self._fio = fio

    def ask(self, *arguments: str, text: str = "") -> str:
        """Return what fio prints. Raises VdusefastError when it does not answer."""
        return self._ask(arguments, text)[1]

    def parse(self, *arguments: str) -> tuple[int, str]:
        """Let fio read a command line and carry out nothing. Returns its status and what it prints, as `ask`."""
        return self._ask(["--parse-only", *arguments], "")

    def _ask(self, arguments: Sequence[str], text: str) -> tuple[int, str]:
        try:
            done = subprocess.run(
                [self._fio, *arguments], input=text, capture_output=True, text=True, timeout=HELP_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise VdusefastError(f"{self._fio} {arguments[0]}: {error}") from None
        return done.returncode, done.stdout + done.stderr

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The options of jobs."""
        lines = self.ask("--cmdhelp=all").splitlines()
        return frozenset(line.split()[0].rstrip(":") for line in lines if line.strip())

    @functools.cache  # noqa: B019 (lives as long as the command)
    def takes_value(self, name: str) -> bool:
        """Return whether the argument after `--name` belongs to it."""
        if name in WITH_VALUE:
            return True
        if name in WITHOUT_VALUE or name in ENGINE_FLAGS:
            return False
        return "empty or boolean" not in self.ask(f"--cmdhelp={name}")

    @functools.cache  # noqa: B019
    def engine_options(self, engine: str) -> frozenset[str]:
        """Return the options that only `engine` has; none when this fio does not have the engine."""
        lines = self.ask(f"--enghelp={engine}").splitlines()
        return frozenset(line.split()[0].rstrip(":") for line in lines if ": " in line and not line.startswith("fio:"))

    @functools.cached_property
    def engines(self) -> frozenset[str]:
        """The engines that this fio lists."""
        return frozenset(self.ask("--enghelp").split())

    def full_name(self, name: str) -> str:
        """Return the option that `name` abbreviates, as getopt does; `name` itself where it abbreviates none."""
        if name in WITH_VALUE or name in WITHOUT_VALUE or name in ALIASES or name in self.names:
            return name
        longer = {one for one in (*WITH_VALUE, *WITHOUT_VALUE, *ALIASES, *self.names) if one.startswith(name)}
        return longer.pop() if len(longer) == 1 else name


def read_arguments(
    arguments: Sequence[str], own: frozenset[str], own_flags: frozenset[str], know: Knowledge
) -> list[Argument]:
    """Return the command line as options and job files; names of `own` options are spelled with `_`.

    Raises ConfigError for a missing value.
    """
    out: list[Argument] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            out += [Argument("", file) for file in rest]
        elif argument == "-" or not argument.startswith("-"):
            out.append(Argument("", argument))
        else:
            out.append(_read_option(argument, rest, own, own_flags, know))
    return out


def _read_option(
    argument: str, rest: Iterator[str], own: frozenset[str], own_flags: frozenset[str], know: Knowledge
) -> Argument:
    name, equals, value = argument.removeprefix("-").removeprefix("-").partition("=")
    mine = name.replace("-", "_")
    if mine in own:
        if not equals and mine in own_flags:
            return Argument(mine, "1")
        if not equals and (value := next(rest, "")) == "":
            raise ConfigError(f"option '--{name}' needs a value")
        return Argument(mine, value)
    name = know.full_name(name)
    if equals:
        return Argument(name, value)
    if not know.takes_value(name):
        return Argument(name, None)
    following = next(rest, None)
    if following is None:
        raise ConfigError(f"option '--{name}' needs a value")
    return Argument(name, following)
