"""The options of `bench peers`, checked; the run is here, or in a guest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vdusefast.bench.common.device_options import parse_seconds
from vdusefast.bench.peers import kinds as peer_kinds
from vdusefast.bench.peers import variants as peers_variants
from vdusefast.bench.peers.session import PeersOptions, parse_job, run_peers, standard_jobs
from vdusefast.config import parse_size
from vdusefast.errors import ConfigError

MIB = 1 << 20
SIZE_MIN_BYTES = 4 * MIB


@dataclass(frozen=True, kw_only=True)
class PeersArguments:
    """The options of the command line as click gives them; None and "" mean that one was not given."""

    jobs: tuple[str, ...]
    peers: str | None
    variants: str
    runtime: str | None
    ramp: str | None
    rounds: int | None
    size: str | None
    backing: Path | None
    queues: int | None
    server_cpus: str
    driver_cpus: str
    ioengine: str | None
    load_modules: bool
    json_path: Path | None
    plot: Path | None
    markdown: bool
    vm: str | None
    icount: bool
    note: str
    keep_awake: bool


def run_command(given: PeersArguments) -> int:
    """Run `bench peers` and return its exit status. Raises VdusefastError."""
    from vdusefast.bench.peers import in_guest as peers_vm

    if given.icount and given.vm is None:
        raise ConfigError("--icount counts the instructions of an emulator: give --vm 6.12 or --vm 7.3, too")
    if given.variants:
        peers_variants.parse_variants(given.variants)
    defaults = peers_vm.ICOUNT_DEFAULTS if given.icount else PeersOptions(jobs=standard_jobs())
    options = PeersOptions(
        jobs=tuple(parse_job(text) for text in given.jobs) or defaults.jobs,
        peers=_peers(given.peers) if given.peers is not None else None if given.variants else defaults.peers,
        variants=given.variants,
        runtime_s=_seconds("--runtime", given.runtime, defaults.runtime_s),
        ramp_s=_seconds("--ramp", given.ramp, defaults.ramp_s),
        rounds=given.rounds or defaults.rounds,
        size_bytes=_size(given.size) if given.size is not None else defaults.size_bytes,
        backing=given.backing,
        queues=given.queues or 0,
        server_cpus=given.server_cpus,
        driver_cpus=given.driver_cpus,
        ioengine=given.ioengine,
        load_modules=given.load_modules,
        json=given.json_path,
        plot=given.plot,
        markdown=given.markdown,
        note=given.note,
        keep_awake=given.keep_awake,
    )
    if options.runtime_s <= 0:
        raise ConfigError("--runtime: it must be more than 0")
    return peers_vm.run_in_guest(options, given.vm, icount=given.icount) if given.vm is not None else run_peers(options)


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
