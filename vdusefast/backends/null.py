"""`null:SIZE`: drops writes, and leaves the buffer of a read unchanged; for measuring everything but storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vdusefast.backends import Store
from vdusefast.base.kinds import StoreKind
from vdusefast.units import SECTOR_BYTES, parse_size

if TYPE_CHECKING:
    from vdusefast.config import BackendConfig


def open_store(rest: str, backend: BackendConfig, read_only: bool, claim: bool = True) -> Store:
    """Return a store of size `rest`, without a descriptor. Raises ConfigError if that is no size."""
    return Store(
        uri=backend.uri,
        kind=StoreKind.NULL,
        fd=-1,
        size_bytes=parse_size(rest),
        block_size_bytes=SECTOR_BYTES,
        physical_block_size_bytes=SECTOR_BYTES,
        opt_io_size_bytes=0,
        read_only=read_only,
        can_discard=not read_only,
        can_write_zeroes=not read_only,
        zeroes_cheaply=True,
        direct_align=0,
        cache=backend.cache,
        rotational=0,
    )
