"""Decode untrusted JSON and TOML: every fault in it raises the same kind of error."""

from __future__ import annotations

from typing import TypeVar

import msgspec

_T = TypeVar("_T")


def decode_json(text: bytes | msgspec.Raw, kind: type[_T]) -> _T:
    """Return the value of that type in `text`. Raises msgspec.DecodeError for every fault in it."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError:
        raise
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # not UTF-8, a number without end
        raise msgspec.DecodeError(str(error)) from None


def decode_toml(text: str, kind: type[_T]) -> _T:
    """Return the value of that type in a TOML `text`. Raises msgspec.DecodeError for every fault in it."""
    try:
        return msgspec.toml.decode(text, type=kind)
    except msgspec.DecodeError:
        raise
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:
        raise msgspec.DecodeError(str(error)) from None
