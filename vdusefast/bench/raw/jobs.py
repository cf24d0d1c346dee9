"""The load of `bench raw`: one job, in fio's words for the little that it can do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vdusefast.bench.common.device_options import (
    FLAGS,
    PARSERS,
    DeviceOptions,
    Parser,
    convert,
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
    "randrw": ("mixed", True),
    "trim": ("trim", False),
    "randtrim": ("trim", True),
}


@dataclass(frozen=True)
class JobSpec:
    """A job as written. Sizes in bytes, times in seconds; size 0 = the rest of the device."""

    name: str = "raw"
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
    do_verify: bool = True
    fsync: int = 0
    norandommap: bool = False
    direct: bool | None = None  # `bench peers` alone; False: through the page cache, until all is on the device
    options: dict[str, str] = field(default_factory=dict)  # as written

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

    @property
    def buffered(self) -> bool:
        """Whether writes go through the page cache."""
        return self.direct is False


@dataclass(frozen=True)
class Plan:
    """All that one command asks for."""

    device: DeviceOptions
    job: JobSpec
    output: str | None = None
    output_format: str = "normal"


def _parse_block_size(text: str) -> int:
    size = parse_size(text)
    if size == 0 or size % 512 or size > 1 << 26:
        raise ConfigError(f"{text!r} is not a multiple of 512 bytes up to 64M")
    return size


JOB_OPTIONS: dict[str, Parser] = {
    "name": str,
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
    "verify": parse_choice("crc32c"),
    "do_verify": parse_bool,
    "fsync": parse_int(0, 1 << 31),
    "norandommap": parse_bool,
}
JOB_HELP = {
    "name": "name of the job in the report",
    "rw": ", ".join(KIND_BY_RW),
    "rwmixread": "percentage of reads in a mixed job",
    "bs": "bytes of one request: 4k, 128k, 1m",
    "size": "bytes that the job covers. Default: the whole device",
    "offset": "where on the device the range starts, in bytes",
    "iodepth": "requests in flight",
    "numjobs": "number of clones of the job, which run at once",
    "runtime": "stop after this time: 10 (seconds), 10s, 500ms",
    "time_based": "repeat the range until runtime is over",
    "ramp_time": "time to run before the measurement starts",
    "verify": "crc32c: read back all that was written, and compare",
    "do_verify": "1: read everything back after the run; 0: do not. Default: 1",
    "fsync": "number of writes after which a FLUSH follows",
    "norandommap": "choose random blocks without a map: some come twice before others come once",
}
REPORT_OPTIONS: dict[str, Parser] = {"output": str, "output_format": parse_choice("normal", "json")}
REPORT_HELP = {"output": "write the report to this file", "output_format": "normal or json"}
SWITCHES = FLAGS | {"time_based", "do_verify", "norandommap"}


def option_values(arguments: Sequence[str], parsers: dict[str, Parser]) -> dict[str, str]:
    """Return the options in `arguments`, as written, by name. Raises ConfigError."""
    out: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        match = re.fullmatch(r"--([a-z0-9_-]+)(?:=(.*))?", argument, re.DOTALL)
        name = match[1].replace("-", "_") if match else ""
        if match is None or name not in parsers:
            raise ConfigError(f"{COMMAND_LINE}: unknown option {argument.partition('=')[0]!r}")
        value = match[2]
        if value is None and name in SWITCHES:
            value = "1"
        value = next(rest, None) if value is None else value
        if value is None:
            raise ConfigError(f"{COMMAND_LINE}: option '--{match[1]}' needs a value")
        out[name] = value
    return out


def make_job(given: dict[str, str], parsers: dict[str, Parser] = JOB_OPTIONS) -> JobSpec:
    """Return the job that these options describe. Raises ConfigError."""
    values: dict[str, Any] = {key: convert(parsers, key, value, COMMAND_LINE) for key, value in given.items()}
    job = JobSpec(options=given, **values)
    if job.time_based and not job.runtime:
        raise ConfigError(f"job {job.name}: time_based needs runtime")
    if job.verify != "none" and job.kind == "trim":
        raise ConfigError(f"job {job.name}: rw={job.rw} leaves nothing to verify")
    if job.offset % 512:
        raise ConfigError(f"job {job.name}: offset {job.offset} is no multiple of 512")
    if job.size and job.size < job.bs:
        raise ConfigError(f"job {job.name}: size {job.size} is smaller than one block of {job.bs}")
    return job


def parse_arguments(arguments: Sequence[str]) -> Plan:
    """Read the arguments after `raw`. Raises ConfigError."""
    given = option_values(arguments, JOB_OPTIONS | PARSERS | REPORT_OPTIONS)
    job = {key: value for key, value in given.items() if key in JOB_OPTIONS}
    device = {key: convert(PARSERS, key, given[key], COMMAND_LINE) for key in given if key in PARSERS}
    report = {key: convert(REPORT_OPTIONS, key, given[key], COMMAND_LINE) for key in given if key in REPORT_OPTIONS}
    return Plan(DeviceOptions(**device), make_job(job), **report)
