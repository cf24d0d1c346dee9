"""The options of `bench torture`, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vdusefast.bench.common.device_options import parse_seconds
from vdusefast.bench.torture.plan import TortureOptions, parse_kills
from vdusefast.config import parse_size
from vdusefast.errors import ConfigError

SIZE_MIN_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class TortureArguments:
    """The options of the command line as click gives them; None means that one was not given."""

    transport: str
    kills: str | None
    seed: int
    queues: int
    ring: str
    engine: str
    cache: str
    backend: str | None
    size: str | None
    depth: int
    load: str | None
    duration: str | None
    give_up: str | None
    json_path: Path | None
    keep_going: bool


def run_command(given: TortureArguments) -> int:
    """Run `bench torture` and return its exit status. Raises VdusefastError."""
    from vdusefast.bench.torture.command import run_torture

    defaults = TortureOptions()
    if given.backend is not None and given.backend.startswith(("null:", "faulty:")):
        raise ConfigError(f"--backend {given.backend}: the store must keep its data, and fail no request")
    if given.json_path is not None and not given.json_path.absolute().parent.is_dir():
        raise ConfigError(f"--json {given.json_path}: there is no directory {given.json_path.absolute().parent}")
    return run_torture(
        TortureOptions(
            transport=given.transport,
            kills=parse_kills(given.kills) if given.kills is not None else defaults.kills,
            seed=given.seed,
            queues=given.queues,
            ring=given.ring,
            engine=given.engine,
            cache=given.cache,
            backend=given.backend,
            size_bytes=_size(given.size) if given.size is not None else defaults.size_bytes,
            depth=given.depth,
            run_s=_seconds("--load", given.load, defaults.run_s),
            duration_s=_seconds("--duration", given.duration, defaults.duration_s),
            give_up_s=_seconds("--give-up", given.give_up, defaults.give_up_s),
            json=given.json_path,
            keep_going=given.keep_going,
        )
    )


def _seconds(option: str, text: str | None, default: float) -> float:
    if text is None:
        return default
    try:
        seconds = parse_seconds(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None
    if seconds <= 0:
        raise ConfigError(f"{option} {text}: it must be more than 0")
    return seconds


def _size(text: str) -> int:
    size = parse_size(text)
    if size < SIZE_MIN_BYTES:
        raise ConfigError(f"--size {text}: at least {SIZE_MIN_BYTES} bytes, for something to be in flight")
    return size
