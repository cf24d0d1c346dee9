"""`faulty:RULES:URI`: any other store, with errors and delays by rule; for testing what uses a disk.

RULES are separated by `+`; a rule is `key=value,...`:

| key | meaning |
|---|---|
| `op` | `read`, `write`, `flush`, `discard`, `write-zeroes`, several with `/`; all unless given |
| `error` | the name of an errno, such as `EIO` or `ENOSPC`: the request fails, and the store does not see it |
| `delay` | it waits first: `250us`, `20ms`, `1.5s` |
| `range` | only where it touches these bytes: `1M-2M`, the second not included |
| `skip` | so many are left alone first |
| `every` | then each one of so many |
| `count` | and no more than so many |
| `chance` | of those, `0.01` or `1%`; the same ones for the same `seed` |
| `seed` | of the whole; any number |
| `file` | only while there is such a file, which turns a rule on and off |

The first rule that fits a request, and whose turn it is, applies. Each queue counts by itself. A path with `,`, `+` or
`:` in it cannot be named.
"""

from __future__ import annotations

import errno
import json
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from vdusefast.errors import ConfigError

if TYPE_CHECKING:
    from vdusefast.backends import Store
    from vdusefast.config import BackendConfig

RULE_COUNT_MAX = 16  # VF_FAULT_MAX
PATH_MAX_BYTES = 255
DELAY_MAX_S = 3600.0
CHANCE_ONE = 1_000_000
OPS = {"read": 1, "write": 2, "flush": 4, "discard": 8, "write-zeroes": 16}  # 1 << enum vf_op
_UNITS = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}


class Fault(NamedTuple):
    """A rule, as `struct vf_fault` has it."""

    ops: int = sum(OPS.values())
    err: int = 0
    delay_ns: int = 0
    start: int = 0
    last: int = 2**64 - 1
    skip: int = 0
    every: int = 1
    limit: int = 0
    chance: int = CHANCE_ONE
    path: str = ""


def open_store(rest: str, backend: BackendConfig, read_only: bool, claim: bool = True) -> Store:
    """Open the store after the rules. Raises ConfigError for a rule, and as the store's own open_store."""
    import msgspec

    from vdusefast.backends import open_store as open_inner

    rules, inner = split(rest)
    faults = to_json(*parse(rules))
    if inner.startswith("faulty:"):
        raise ConfigError("backend.uri: faulty: twice; separate the rules of one by +")
    store = open_inner(msgspec.structs.replace(backend, uri=inner), read_only=read_only, claim=claim)
    store.faults = faults
    store.uri = backend.uri
    return store


def behind(uri: str) -> str:
    """Return the URI of the store after the rules; see backends.store_scheme. Raises ConfigError."""
    return split(uri.partition(":")[2])[1]


def absolute_uri(uri: str) -> str:
    """See backends.absolute_uri."""
    from vdusefast.backends import absolute_uri as absolute_inner

    scheme, _, rest = uri.partition(":")
    rules, inner = split(rest)
    parse(rules)
    rules = re.sub(r"(?<=file=)[^,+]+", lambda found: os.path.abspath(found[0]), rules)
    return f"{scheme}:{rules}:{absolute_inner(inner)}"


def to_json(faults: list[Fault], seed: int) -> str:
    """Return the rules as JSON for a worker, which reads it by `from_json`."""
    return json.dumps({"faults": faults, "seed": seed})


def from_json(text: str) -> tuple[list[Fault], int]:
    """Return the rules and the seed."""
    values = json.loads(text)
    return [Fault(*fields) for fields in values["faults"]], values["seed"]


def split(rest: str) -> tuple[str, str]:
    """Return rules and URI from the text after `faulty:`. Raises ConfigError."""
    rules, colon, inner = rest.partition(":")
    if not colon or "=" not in rules or not inner:
        raise ConfigError(
            f"backend.uri: 'faulty:{rest}' is not faulty:RULES:URI; write for example "
            "faulty:op=read,error=EIO,every=100:file:/srv/disk.img"
        )
    return rules, inner


def parse(rules: str) -> tuple[list[Fault], int]:
    """Return the rules and the seed in a text. Raises ConfigError that names the wrong part."""
    texts = rules.split("+")
    if len(texts) > RULE_COUNT_MAX:
        raise ConfigError(f"backend.uri: {len(texts)} rules for faults, at most {RULE_COUNT_MAX} are possible")
    faults, seed = [], 1
    for text in texts:
        given: dict[str, str] = {}
        for word in text.split(","):
            key, equals, value = word.partition("=")
            if not equals or (key != "seed" and key not in _READERS) or key in given:
                known = ", ".join([*_READERS, "seed"])
                raise ConfigError(f"backend.uri: rule {text!r}: {word!r} is no KEY=VALUE, or twice; keys are {known}")
            given[key] = value
        seed = _number(text, "seed", given.pop("seed", str(seed)))
        fault = Fault()
        for key, value in given.items():
            fault = fault._replace(**_READERS[key](text, key, value))
        if not fault.err and not fault.delay_ns:
            raise ConfigError(f"backend.uri: rule {text!r} does nothing: it needs an error= or a delay=")
        faults.append(fault)
    return faults, seed


def _bad(rule: str, key: str, value: str, wanted: str) -> ConfigError:
    return ConfigError(f"backend.uri: rule {rule!r}: {key}={value} is not {wanted}")


def _number(rule: str, key: str, value: str) -> int:
    if not value.isdecimal() or len(value) > 18:
        raise _bad(rule, key, value, "a number")
    return int(value)


def _read_ops(rule: str, key: str, value: str) -> dict[str, Any]:
    names = value.split("/")
    if any(name not in OPS for name in names):
        raise _bad(rule, key, value, f"one of {', '.join(OPS)}, or several with /")
    return {"ops": sum({OPS[name] for name in names})}


def _read_error(rule: str, key: str, value: str) -> dict[str, Any]:
    number = getattr(errno, value, None)
    if not isinstance(number, int) or not value.startswith("E"):
        raise _bad(rule, key, value, "the name of an errno, such as EIO")
    return {"err": number}


def _read_delay(rule: str, key: str, value: str) -> dict[str, Any]:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", value)
    if not match or float(match[1]) * _UNITS[match[2]] > DELAY_MAX_S * _UNITS["s"]:
        raise _bad(rule, key, value, f"a time up to {DELAY_MAX_S:g} s, such as 20ms")
    return {"delay_ns": int(float(match[1]) * _UNITS[match[2]])}


def _read_range(rule: str, key: str, value: str) -> dict[str, Any]:
    from vdusefast.units import parse_size

    low, dash, high = value.partition("-")
    start, end = (parse_size(low), parse_size(high)) if dash else (0, 0)
    if not start < end:
        raise _bad(rule, key, value, "a range of bytes, such as 1M-2M")
    return {"start": start, "last": end - 1}


def _read_count(rule: str, key: str, value: str) -> dict[str, Any]:
    number = _number(rule, key, value)
    if key == "every" and number == 0:
        raise _bad(rule, key, value, "1 or more")
    return {"limit" if key == "count" else key: number}


def _read_chance(rule: str, key: str, value: str) -> dict[str, Any]:
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)(%?)", value)
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise _bad(rule, key, value, "a share such as 0.01 or 1%")
    return {"chance": round(share * CHANCE_ONE)}


def _read_path(rule: str, key: str, value: str) -> dict[str, Any]:
    if not value or len(os.fsencode(value)) > PATH_MAX_BYTES:
        raise _bad(rule, key, value, f"a path of up to {PATH_MAX_BYTES} bytes")
    return {"path": value}


_READERS = {
    "op": _read_ops,
    "error": _read_error,
    "delay": _read_delay,
    "range": _read_range,
    "skip": _read_count,
    "every": _read_count,
    "count": _read_count,
    "chance": _read_chance,
    "file": _read_path,
}
