"""Our own options of `bench fio`; all others are fio's."""

from __future__ import annotations

from dataclasses import dataclass

from vdusefast.bench.common import device_options
from vdusefast.bench.common.device_options import DeviceOptions, Parser, convert, parse_bool, parse_choice
from vdusefast.bench.fio.script import Script
from vdusefast.errors import ConfigError

OWN_JOB = "job"  # of --baseline: the ioengine that the job names


def _parse_engines(text: str) -> tuple[str, ...]:
    engines = tuple(engine.strip() for engine in text.split(",") if engine.strip())
    if not engines:
        raise ConfigError("names no ioengine")
    return engines


PARSERS: dict[str, Parser] = device_options.PARSERS | {
    "baseline": _parse_engines,
    "route": parse_choice("own", "cross"),
    "explain": parse_bool,
}
HELP = device_options.HELP | {
    "baseline": "afterwards, run the same job on the file itself, without vdusefast, with these ioengines: "
    "psync,io_uring; job: the job's own",
    "route": "own: over loopback, each job process uses a queue of its own; cross: no block is read through the queue "
    "that wrote it",
    "explain": "explain the figures at the end of the report",
}
NAMES = frozenset(PARSERS)
FLAGS = device_options.FLAGS | {"explain"}


@dataclass(frozen=True)
class FioOptions:
    """What we do with the jobs, besides what fio does."""

    device: DeviceOptions
    baseline: tuple[str, ...] = ()
    route: str = "own"
    explain: bool = False


def read_options(script: Script) -> FioOptions:
    """Return our options of a script. Raises ConfigError with the place of a wrong one."""
    values = {name: convert(PARSERS, name, value, where) for name, (value, where) in script.own.items()}
    others = {name: values.pop(name) for name in ("baseline", "route", "explain") if name in values}
    return FioOptions(DeviceOptions(**values), **others)


def option_help() -> str:
    """Return the text of --help."""
    lines = [
        "Usage: python -m vdusefast.bench fio [OPTION...] [JOBFILE...]",
        "",
        "Make a block device, and have fio run its jobs on it. Options and job files are",
        "fio's: type fio --help, and fio --cmdhelp=all. What names the target (filename,",
        "directory, ...) is replaced by the device. The exit status is fio's, or 1 when",
        "the device failed. Ctrl-C lets fio finish and report, and the status is 0; a",
        "second one ends it at once.",
        "",
        "Options of our own, also in [global] of a job file:",
    ]
    return "\n".join([*lines, *device_options.option_lines(HELP)])
