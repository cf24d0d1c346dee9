"""The options of `bench peers`, checked; the run is here, or in a guest."""

from __future__ import annotations

from pathlib import Path

from vdusefast.bench.fio.jobs import parse_seconds
from vdusefast.bench.peers import kinds as peer_kinds
from vdusefast.bench.peers import variants as peers_variants
from vdusefast.bench.peers.session import PeersOptions, parse_job, run_peers, standard_jobs
from vdusefast.config import parse_size
from vdusefast.errors import ConfigError

MIB = 1 << 20
SIZE_MIN_BYTES = 4 * MIB


def run_command(
    *,
    jobs: tuple[str, ...],
    peers: str | None,
    variants: str,
    runtime: str | None,
    ramp: str | None,
    rounds: int | None,
    size: str | None,
    backing: Path | None,
    queues: int | None,
    server_cpus: str,
    driver_cpus: str,
    ioengine: str | None,
    load_modules: bool,
    json_path: Path | None,
    plot: Path | None,
    markdown: bool,
    vm: str | None,
    icount: bool,
    note: str,
    keep_awake: bool,
) -> int:
    """Run `bench peers` and return its exit status. Raises VdusefastError."""
    from vdusefast.bench.peers import in_guest as peers_vm

    if icount and vm is None:
        raise ConfigError("--icount counts the instructions of an emulator: give --vm 6.12 or --vm 7.3, too")
    if variants:
        peers_variants.parse_variants(variants)
    defaults = peers_vm.ICOUNT_DEFAULTS if icount else PeersOptions(jobs=standard_jobs())
    options = PeersOptions(
        jobs=tuple(parse_job(text) for text in jobs) or defaults.jobs,
        peers=_peers(peers) if peers is not None else None if variants else defaults.peers,
        variants=variants,
        runtime_s=_seconds("--runtime", runtime, defaults.runtime_s),
        ramp_s=_seconds("--ramp", ramp, defaults.ramp_s),
        rounds=rounds or defaults.rounds,
        size_bytes=_size(size) if size is not None else defaults.size_bytes,
        backing=backing,
        queues=queues or 0,
        server_cpus=server_cpus,
        driver_cpus=driver_cpus,
        ioengine=ioengine,
        load_modules=load_modules,
        json=json_path,
        plot=plot,
        markdown=markdown,
        note=note,
        keep_awake=keep_awake,
    )
    if options.runtime_s <= 0:
        raise ConfigError("--runtime: it must be more than 0")
    return peers_vm.run_in_guest(options, vm, icount=icount) if vm is not None else run_peers(options)


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in peer_kinds.BY_NAME]
    if unknown or not names:
        raise ConfigError(f"--peers {text!r}: no such peer; there are {', '.join(peer_kinds.BY_NAME)}")
    return names


def _seconds(option: str, text: str | None, default_s: float) -> float:
    if text is None:
        return default_s
    try:
        return parse_seconds(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None


def _size(text: str) -> int:
    size_bytes = parse_size(text)
    if size_bytes < SIZE_MIN_BYTES or size_bytes % MIB:
        raise ConfigError(f"--size {text}: give a whole number of MiB, at least {SIZE_MIN_BYTES // MIB}")
    return size_bytes
