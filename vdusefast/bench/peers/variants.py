"""Variants of ourselves as peers of their own: what a setting is worth shows side by side in one run.

"base:;spin:poll_us=1000;deep:indirect=false,queue_size=1024" makes three. Keys are those of the configuration; those
of a queue go to all queues. A variant's store is the peer's file unless it says `uri=memory:` or `uri=null:`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from vdusefast.bench.peers import kinds as peer_kinds
from vdusefast.bench.peers.peer import Peer
from vdusefast.config import BackendConfig, DeviceConfig, QueueConfig, make_config, parse_size
from vdusefast.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,30}")
OWN_KEYS = ("name", "transport")  # these are the bench's to choose
STORES = ("file:", "memory:", "null:")

_FIELDS = {
    field.name: field.type
    for struct in (DeviceConfig, BackendConfig, QueueConfig)
    for field in msgspec.structs.fields(struct)
    if field.name not in OWN_KEYS
}


def parse_variants(text: str) -> tuple[type[peer_kinds.Vdusefast], ...]:
    """Return a kind of peer for each variant that `text` describes, in its order. Raises ConfigError."""
    kinds: list[type[peer_kinds.Vdusefast]] = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, _, settings = part.partition(":")
        name = name.strip()
        if not NAME.fullmatch(name) or name in peer_kinds.BY_NAME or any(kind.name == name for kind in kinds):
            raise ConfigError(f"--variants {part!r}: begin with a name of its own: base: or deep:queue_size=1024")
        kinds.append(_kind(name, settings.strip(), _overrides(part, settings)))
    if not kinds:
        raise ConfigError("--variants: there is none; write for example 'base:;deep:indirect=false,queue_size=1024'")
    return tuple(kinds)


def _kind(name: str, settings: str, overrides: dict[str, Any]) -> type[peer_kinds.Vdusefast]:
    on_file = str(overrides.get("uri", "file:")).startswith("file:")
    store = peer_kinds.Vdusefast.cache if on_file else str(overrides["uri"])
    facts = {
        "name": name,
        "title": f"vdusefast with {settings}" if settings else "vdusefast as it is",
        "overrides": overrides,
        "cache": overrides.get("cache", store),
        "keeps_data": on_file,
    }
    return type(f"Variant_{name}", (peer_kinds.Vdusefast,), facts)


def _overrides(part: str, settings: str) -> dict[str, Any]:
    """Return what `settings` says. Raises ConfigError."""
    overrides = parse_settings(f"--variants {part!r}", settings)
    uri = str(overrides.get("uri", "file:"))
    if uri not in STORES:
        raise ConfigError(f"--variants {part!r}: uri={uri}: write one of {', '.join(STORES)}; the size is the peers'")
    if uri == "file:":
        overrides.pop("uri", None)
    return overrides


def parse_settings(option: str, text: str) -> dict[str, Any]:
    """Return what `text` ("key=value,...") says, each value of its key's type. Raises ConfigError that names `option`.

    Keys are those of the configuration, but for a device's name and transport.
    """
    overrides: dict[str, Any] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        key, equals, value = word.partition("=")
        if not equals or key not in _FIELDS or key in overrides:
            raise ConfigError(f"{option}: {word!r}: write KEY=VALUE once; keys are {', '.join(_FIELDS)}")
        overrides[key] = _value(option, key, value)
    # The device's own checks, before anything is started.
    checked = overrides | {"uri": "null:64M", "transport": "kernel"}
    try:
        make_config(name="variant", **checked)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None
    return overrides


def _value(option: str, key: str, text: str) -> Any:
    try:
        if key.endswith("_bytes"):
            return parse_size(text)
        return msgspec.convert(text, type=_FIELDS[key], strict=False)
    except (ConfigError, msgspec.ValidationError) as error:
        raise ConfigError(f"{option}: {key}: {error}") from None


def kinds(peers: tuple[str, ...] | None, variants: str) -> list[type[Peer]]:
    """Return the kinds of peer that run: the variants, then those of `peers`; all kinds with neither of the two."""
    if variants:
        named = [peer for peer in peer_kinds.ALL if peer.name in (peers or ())]
        return [*parse_variants(variants), *named]
    return [peer for peer in peer_kinds.ALL if peers is None or peer.name in peers]


def base_of(names: list[str], variants: str) -> str:
    """Return whose IOPS the ratios are about: the first variant, ourselves, or the first peer without us."""
    ours = peer_kinds.Vdusefast.name
    return names[0] if names and (variants or ours not in names) else ours


def one_of(name: str, variants: str) -> str:
    """Return the text of the variant `name` alone, "" when it is none."""
    parts = (part.strip() for part in variants.split(";"))
    return next((part for part in parts if part.partition(":")[0].strip() == name), "")
