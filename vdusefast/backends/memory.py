"""`memory:SIZE`: zeroed memory that ends with the device."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from vdusefast.backends import Store
from vdusefast.base.kinds import StoreKind
from vdusefast.errors import BackendError
from vdusefast.units import SECTOR_BYTES, parse_size

if TYPE_CHECKING:
    from vdusefast.config import BackendConfig


def open_store(rest: str, backend: BackendConfig, read_only: bool, claim: bool = True) -> Store:
    """Return a store on a memfd of size `rest`, sealed to it. Raises ConfigError, BackendError."""
    size_bytes = parse_size(rest)
    fd = os.memfd_create("vdusefast-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        # A worker maps it whole: a size that cannot change is a mapping that cannot fault.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise BackendError(f"{backend.uri}: cannot be created: {error.strerror}") from None
    return Store(
        uri=backend.uri,
        kind=StoreKind.MEMORY,
        fd=fd,
        size_bytes=size_bytes,
        block_size_bytes=SECTOR_BYTES,
        physical_block_size_bytes=4096,
        opt_io_size_bytes=0,
        read_only=read_only,
        can_discard=not read_only,
        can_write_zeroes=not read_only,
        zeroes_cheaply=True,
        direct_align=0,
        cache=backend.cache,
        persistent=False,
        rotational=0,
    )
