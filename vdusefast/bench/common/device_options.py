"""The options of a load that describe its device, rather than a job: their values, and the configuration they make."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vdusefast.base.engines import NAMES
from vdusefast.base.json_types import Json
from vdusefast.base.kinds import TransportKind
from vdusefast.config import Config, load_config, make_config, override, resolve_cpus
from vdusefast.errors import ConfigError
from vdusefast.host.cpu_topology import check_cpu, parse_cpu_list, read_topology
from vdusefast.state.dead_runs import name_of_process

KIND = "bench"  # of run directories
AUTO_QUEUES = 0  # two where there are two CPUs, else one
Parser = Callable[[str], Any]


@dataclass(frozen=True)
class DeviceOptions:
    """The device, and who loads it; None where nothing was said."""

    transport: str = "auto"
    queues: int | None = None
    cpus: str | None = None
    driver_cpus: str | None = None
    queue_size: int | None = None
    packed: bool | None = None
    in_order: bool | None = None
    indirect: bool | None = None
    backend: str | None = None
    engine: str | None = None
    cache: str | None = None
    poll: str | None = None
    merge: bool | None = None
    sqpoll: bool | None = None
    map: str | None = None
    poll_us: int | None = None
    irq_delay_us: int | None = None
    config: str | None = None


def parse_int(low: int, high: int) -> Parser:
    """Return a parser of whole numbers."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or not low <= int(text) <= high:
            raise ConfigError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def parse_choice(*choices: str) -> Parser:
    """Return a parser of one of `choices`."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ConfigError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def parse_bool(text: str) -> bool:
    """Return what 0, 1, true or false says. Raises ConfigError."""
    if text not in ("0", "1", "true", "false"):
        raise ConfigError(f"{text!r} is neither 0 nor 1")
    return text in ("1", "true")


def parse_seconds(text: str) -> float:
    """Return the seconds that `text` stands for: 10, 500ms or 2m. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|h|d)?", text)
    if not match:
        raise ConfigError(f"{text!r} is not a time; write for example 10, 500ms or 2m")
    unit = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    return float(match[1]) * unit[match[2] or "s"]


def _parse_queues(text: str) -> int:
    return AUTO_QUEUES if text == "auto" else int(parse_int(1, 64)(text))


PARSERS: dict[str, Parser] = {
    "transport": parse_choice("auto", "loopback", "kernel"),
    "queues": _parse_queues,
    "cpus": str,
    "driver_cpus": str,
    "queue_size": parse_int(2, 32768),
    "packed": parse_bool,
    "in_order": parse_bool,
    "indirect": parse_bool,
    "backend": str,
    "engine": parse_choice(*NAMES),
    "cache": parse_choice("writeback", "writethrough", "none", "unsafe"),
    "poll": parse_choice("adaptive", "always", "never"),
    "merge": parse_bool,
    "sqpoll": parse_bool,
    "map": parse_choice("auto", "off"),
    "poll_us": parse_int(0, 1_000_000),
    "irq_delay_us": parse_int(0, 10_000),
    "config": str,
}
HELP = {
    "transport": "kernel (a real /dev/vdX), loopback, or auto: kernel where it works",
    "queues": "number of virtqueues, each with its own worker process. auto: 2 on 2 or more CPUs",
    "cpus": "CPUs of the workers, one for each queue: 0,1 or 0-3 or auto",
    "driver_cpus": "CPUs of the load. Default: those without a worker",
    "queue_size": "entries of a virtqueue, a power of two",
    "packed": "1: offer packed rings; 0: only split rings",
    "in_order": "1: offer IN_ORDER, if the engine completes requests in order",
    "indirect": "1: offer indirect descriptors",
    "backend": "file:PATH, memory:SIZE, nbd://..., rbd:... (docs/stores.md). Default: a temporary file",
    "engine": "auto, sync, cached or uring",
    "merge": "0: engines sync and cached do not merge adjacent requests",
    "sqpoll": "1: a kernel thread submits to io_uring",
    "map": "auto: engine sync reads a file on tmpfs through a mapping; off: it uses pread",
    "cache": "writeback, writethrough, none (O_DIRECT) or unsafe",
    "poll": "adaptive, always (an idle worker never sleeps) or never (it sleeps at once)",
    "poll_us": "longest time that an idle worker spins before it sleeps, in microseconds",
    "irq_delay_us": "longest time that an interrupt waits for more completions, in microseconds; 0: none",
    "config": "configuration file of a device (TOML); options override it",
}
FLAGS = frozenset(name for name, parser in PARSERS.items() if parser is parse_bool)
HELP_COLUMNS = 80
_NOT_CONFIGURATION = ("transport", "driver_cpus", "backend", "config")


def option_lines(options: Mapping[str, str]) -> list[str]:
    """Return the lines of --help for options by name, with their meaning beside them."""
    width = len("  -- ") + 2 + max(len(name) for name in options)
    return [
        textwrap.fill(
            text,
            HELP_COLUMNS,
            initial_indent=f"  --{name.replace('_', '-')}".ljust(width),
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in options.items()
    ]


def convert(parsers: Mapping[str, Parser], name: str, value: str, where: str) -> Any:
    """Return the value of an option. Raises ConfigError with its place and name."""
    try:
        return parsers[name](value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {name}: {error}") from None


def build_config(options: DeviceOptions, uri: str | None, transport: str = TransportKind.LOOPBACK) -> Config:
    """Return the device's configuration: the file of --config, options over it, `uri` (the store) over both."""
    given: Json = {one.name: getattr(options, one.name) for one in fields(DeviceOptions)}
    overrides = {key: value for key, value in given.items() if value is not None and key not in _NOT_CONFIGURATION}
    if options.queues == AUTO_QUEUES:
        overrides["queues"] = min(2, len(os.sched_getaffinity(0)))
    if uri is not None:
        overrides["uri"] = uri
    if options.config is None:
        overrides.setdefault("cpus", "auto")
        return resolve_cpus(make_config(name=name_of_process(KIND), transport=transport, **overrides))
    if options.cpus is not None:
        overrides["cpu"] = None  # of each queue: the list on the command line decides
    return resolve_cpus(override(load_config(options.config), transport=transport, **overrides))


def store_uri(options: DeviceOptions) -> str | None:
    """Return the URI of the store that the options or their configuration file name, None for a temporary file."""
    if options.backend is None and options.config is not None:
        return load_config(options.config).backend.uri
    return options.backend


def check_driver_cpus(options: DeviceOptions) -> None:
    """Refuse CPUs for the load that this machine does not have. Raises ConfigError."""
    for cpu in parse_cpu_list(options.driver_cpus) if options.driver_cpus else []:
        check_cpu(cpu, read_topology(), "driver_cpus")


def driver_cpus(options: DeviceOptions, worker_cpus: list[int], allowed: set[int]) -> list[int]:
    """Return the CPUs for the load: those asked for, else those no worker is pinned to, else all allowed."""
    if options.driver_cpus:
        return parse_cpu_list(options.driver_cpus)
    return sorted(allowed - set(worker_cpus)) or sorted(allowed)
