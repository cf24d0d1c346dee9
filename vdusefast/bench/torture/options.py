"""The options of `bench torture`, checked."""

from __future__ import annotations

from pathlib import Path

from vdusefast.bench.fio.jobs import parse_seconds
from vdusefast.bench.torture.plan import TortureOptions, parse_kills
from vdusefast.config import parse_size
from vdusefast.errors import ConfigError

SIZE_MIN_BYTES = 256 << 10


def run_command(
    *,
    transport: str,
    kills: str | None,
    seed: int,
    queues: int,
    ring: str,
    engine: str,
    cache: str,
    backend: str | None,
    size: str | None,
    depth: int,
    load: str | None,
    duration: str | None,
    give_up: str | None,
    json_path: Path | None,
    keep_going: bool,
) -> int:
    """Run `bench torture` and return its exit status. Raises VdusefastError."""
    from vdusefast.bench.torture.command import run_torture

    defaults = TortureOptions()
    if backend is not None and backend.startswith(("null:", "faulty:")):
        raise ConfigError(f"--backend {backend}: the store must keep its data, and fail no request")
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_path}: there is no directory {json_path.absolute().parent}")
    return run_torture(
        TortureOptions(
            transport=transport,
            kills=parse_kills(kills) if kills is not None else defaults.kills,
            seed=seed,
            queues=queues,
            ring=ring,
            engine=engine,
            cache=cache,
            backend=backend,
            size_bytes=_size(size) if size is not None else defaults.size_bytes,
            depth=depth,
            run_s=_seconds("--load", load, defaults.run_s),
            duration_s=_seconds("--duration", duration, defaults.duration_s),
            give_up_s=_seconds("--give-up", give_up, defaults.give_up_s),
            json=json_path,
            keep_going=keep_going,
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
