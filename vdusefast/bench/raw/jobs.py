"""Jobs in fio's vocabulary: job files and command-line options, read into typed plans.

An unknown option is an error that names it and its place. Options that describe the device rather than a job
(`RUN_OPTIONS`) may stand on the command line or in [global].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vdusefast.bench.common.device_options import (
    PARSERS,
    DeviceOptions,
    Parser,
    parse_bool,
    parse_choice,
    parse_int,
    parse_seconds,
)
from vdusefast.config import parse_size
from vdusefast.errors import ConfigError

COMMAND_LINE = "command line"
KIND_BY_RW = {
    "read": ("read", False),
    "write": ("write", False),
    "randread": ("read", True),
    "randwrite": ("write", True),
    "rw": ("mixed", False),
    "readwrite": ("mixed", False),
    "randrw": ("mixed", True),
    "trim": ("trim", False),
    "randtrim": ("trim", True),
}


@dataclass(frozen=True)
class JobSpec:
    """One job as written. Sizes in bytes, times in seconds; size 0 = the rest of the device."""

    name: str
    rw: str = "read"
    rwmixread: int = 50  # per cent
    bs: int = 4096
    size: int = 0
    offset: int = 0
    iodepth: int = 1
    numjobs: int = 1
    runtime: float = 0.0
    time_based: bool = False
    ramp_time: float = 0.0
    verify: str = "none"
    verify_pattern: bytes = b""
    do_verify: bool = True
    fsync: int = 0
    randrepeat: bool = True
    randseed: int = 0
    norandommap: bool = False
    stonewall: bool = False
    group_reporting: bool = False
    buffered: bool = False  # `bench peers` alone: through the page cache, all of it once, until it is on the device
    description: str = ""
    options: dict[str, str] = field(default_factory=dict)  # as written, for the report

    @property
    def kind(self) -> str:
        """What the job does: one of _driver.KINDS."""
        return KIND_BY_RW[self.rw][0]

    @property
    def order(self) -> str:
        """In which order: one of _driver.ORDERS."""
        if not KIND_BY_RW[self.rw][1]:
            return "sequential"
        return "random" if self.norandommap else "random_once"

    @property
    def writes(self) -> bool:
        """True when the job changes what the device holds."""
        return self.kind != "read"


@dataclass(frozen=True)
class RunOptions(DeviceOptions):
    """Options that are not about a single job: the device, its driver and the report."""

    baseline: tuple[str, ...] = ()
    output: str | None = None
    output_format: str = "normal"
    explain: bool = False
    direct: bool | None = None  # of the real fio, which the kernel transport runs
    ioengine: str | None = None


@dataclass(frozen=True)
class Plan:
    """All that one command asks for."""

    run: RunOptions
    jobs: tuple[JobSpec, ...]


def _parse_block_size(text: str) -> int:
    size = parse_size(text)
    if size == 0 or size % 512 or size > 1 << 26:
        raise ConfigError(f"{text!r} is not a multiple of 512 bytes up to 64M")
    return size


def parse_pattern(text: str) -> bytes:
    """Return the bytes of a pattern: 0xHEX, a decimal number, or "text" in quotes. Raises ConfigError."""
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
        digits = text[2:]
        return bytes.fromhex(digits if len(digits) % 2 == 0 else "0" + digits)
    if re.fullmatch(r"\d+", text):
        number = int(text)
        return number.to_bytes(max(1, (number.bit_length() + 7) // 8), "little")
    if len(text) > 2 and text[0] == text[-1] == '"':
        return text[1:-1].encode()
    raise ConfigError(f'{text!r} is not a pattern; write for example 0xdeadbeef, 255 or "text"')


def _parse_words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise ConfigError("names no ioengine")
    return words


JOB_OPTIONS: dict[str, Parser] = {
    "rw": parse_choice(*KIND_BY_RW),
    "rwmixread": parse_int(0, 100),
    "bs": _parse_block_size,
    "size": parse_size,
    "offset": parse_size,
    "iodepth": parse_int(1, 32768),
    "numjobs": parse_int(1, 1024),
    "runtime": parse_seconds,
    "time_based": parse_bool,
    "ramp_time": parse_seconds,
    "verify": parse_choice("crc32c", "pattern"),
    "verify_pattern": parse_pattern,
    "do_verify": parse_bool,
    "fsync": parse_int(0, 1 << 31),
    "randrepeat": parse_bool,
    "randseed": parse_int(0, (1 << 63) - 1),
    "norandommap": parse_bool,
    "stonewall": parse_bool,
    "group_reporting": parse_bool,
    "description": str,
}
RUN_OPTIONS: dict[str, Parser] = PARSERS | {
    "baseline": _parse_words,
    "output": str,
    "output_format": parse_choice("normal", "json"),
    "explain": parse_bool,
    "direct": parse_bool,
    "ioengine": parse_choice("io_uring", "libaio", "psync", "posixaio"),
}
ALIASES = {"readwrite": "rw", "blocksize": "bs"}
FLAGS = {name for name, parser in (JOB_OPTIONS | RUN_OPTIONS).items() if parser is parse_bool}


class _Reader:
    """Collects options in the order in which they come, as fio does: globals first, then those of each job."""

    def __init__(self) -> None:
        self.run: dict[str, str] = {}
        self.run_where: dict[str, str] = {}
        self.common: dict[str, tuple[str, str]] = {}
        self.jobs: list[tuple[str, dict[str, tuple[str, str]]]] = []
        self.current: dict[str, tuple[str, str]] | None = None

    def begin_job(self, name: str) -> None:
        self.current = dict(self.common)
        self.jobs.append((name, self.current))

    def take(self, name: str, value: str, where: str, *, anywhere: bool = False) -> None:
        """Note one option. anywhere: run options may come after a job has begun (on the command line)."""
        key = ALIASES.get(name.replace("-", "_"), name.replace("-", "_"))
        if key in RUN_OPTIONS:
            if self.current is not None and not anywhere:
                raise ConfigError(f"{where}: option {name!r} describes the whole run, put it into [global]")
            self.run[key], self.run_where[key] = value, where
        elif key in JOB_OPTIONS:
            target = self.common if self.current is None else self.current
            target[key] = (value, where)
        else:
            raise ConfigError(f"{where}: unknown option {name!r}")

    def plan(self) -> Plan:
        run = {key: _convert(RUN_OPTIONS[key], key, value, self.run_where[key]) for key, value in self.run.items()}
        # Options without a --name make one job, as long as they say what it does.
        if not self.jobs and "rw" in self.common:
            self.begin_job("job")
        if not self.jobs:
            raise ConfigError("no job: give a job file, or --rw=... and --size=...")
        return Plan(RunOptions(**run), tuple(_job(name, options) for name, options in self.jobs))


def _convert(parser: Parser, key: str, value: str, where: str) -> Any:
    try:
        return parser(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {key}: {error}") from None


def _job(name: str, options: dict[str, tuple[str, str]]) -> JobSpec:
    values = {key: _convert(JOB_OPTIONS[key], key, value, where) for key, (value, where) in options.items()}
    job = JobSpec(name=name, options={key: value for key, (value, _where) in options.items()}, **values)
    return _check(job)


def _check(job: JobSpec) -> JobSpec:
    """Check what one option alone does not show. Raises ConfigError naming the job."""
    if job.time_based and not job.runtime:
        raise ConfigError(f"job {job.name}: time_based needs runtime")
    if (job.verify == "pattern") != bool(job.verify_pattern):
        raise ConfigError(f"job {job.name}: verify=pattern and verify_pattern go together")
    if job.verify != "none" and job.kind == "trim":
        raise ConfigError(f"job {job.name}: rw={job.rw} leaves nothing to verify")
    if job.offset % 512:
        raise ConfigError(f"job {job.name}: offset {job.offset} is no multiple of 512")
    if job.size and job.size < job.bs:
        raise ConfigError(f"job {job.name}: size {job.size} is smaller than one block of {job.bs}")
    if job.verify == "pattern":
        repeats = -(-job.bs // len(job.verify_pattern))
        return replace(job, verify_pattern=(job.verify_pattern * repeats)[: job.bs])
    return job


def parse_job_file(path: Path, reader: _Reader) -> None:
    """Read a job file into `reader`. Raises ConfigError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{path}: cannot read the job file: {reason}") from None
    section = None
    for number, raw in enumerate(text.splitlines(), 1):
        line, where = raw.strip(), f"{path}:{number}"
        if not line or line[0] in "#;":
            continue
        if line.startswith("["):
            section = line[1:-1].strip() if line.endswith("]") else ""
            if not section:
                raise ConfigError(f"{where}: {line!r} is not a section")
            if section == "global":
                reader.current = None
            else:
                reader.begin_job(section)
            continue
        if section is None:
            raise ConfigError(f"{where}: option before the first section; begin with [global] or [name]")
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals and name.replace("-", "_") in FLAGS:
            value = "1"
        elif not equals and name.replace("-", "_") in JOB_OPTIONS | RUN_OPTIONS | ALIASES:
            raise ConfigError(f"{where}: option {name!r} needs a value")
        reader.take(name, value, where)
    reader.current = None


def parse_arguments(arguments: Sequence[str]) -> Plan:
    """Read the words after `fio`: options, and names of job files. Raises ConfigError.

    Job options before the first --name, and before a job file, apply to all jobs after them.
    """
    reader = _Reader()
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            if word.startswith("-"):
                raise ConfigError(f"{COMMAND_LINE}: unknown option {word!r}")
            parse_job_file(Path(word), reader)
            continue
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        if not equals:
            if key in FLAGS:
                value = "1"
            elif key in JOB_OPTIONS | RUN_OPTIONS | ALIASES or key == "name":
                following = next(words, None)
                if following is None:
                    raise ConfigError(f"{COMMAND_LINE}: option '--{name}' needs a value")
                value = following
        if key == "name":
            reader.begin_job(value)
        else:
            try:
                reader.take(name, value, COMMAND_LINE, anywhere=True)
            except ConfigError:
                raise ConfigError(f"{COMMAND_LINE}: unknown option '--{name}'") from None
    return reader.plan()


JOB_FIELDS = frozenset(f.name for f in fields(JobSpec))
assert set(JOB_OPTIONS) <= JOB_FIELDS, "every job option has its field"
