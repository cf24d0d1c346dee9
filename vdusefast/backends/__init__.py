"""Stores: what holds a device's bytes.

A backend is one module with `open_store(rest, backend, read_only) -> Store`, found by the scheme of the URI. The
worker does the I/O itself on the store's descriptor; a backend only opens, checks and describes it.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Literal

from vdusefast.config import BackendConfig
from vdusefast.errors import ConfigError

SECTOR_BYTES = 512

# Scheme -> (module, an example).
BACKENDS = {
    "file": ("vdusefast.backends.file", "file:/srv/disk.img"),
    "memory": ("vdusefast.backends.memory", "memory:64M"),
    "null": ("vdusefast.backends.null", "null:1G"),
}


@dataclass
class Store:
    """An open store. Owns its descriptor; `close` is idempotent."""

    uri: str
    kind: Literal["file", "blockdev", "memory", "null"]
    fd: int  # -1 for null and once closed
    size_bytes: int
    block_size_bytes: int  # the smallest unit it takes
    physical_block_size_bytes: int
    opt_io_size_bytes: int  # 0 = unknown
    read_only: bool
    can_discard: bool
    can_write_zeroes: bool  # a worker can always write zeros itself, so: unless read-only
    zeroes_cheaply: bool  # whether the store knows a way that does not write them out, with and without UNMAP
    direct_align: int  # alignment that O_DIRECT needs of offset, length and memory; 0 = not O_DIRECT
    cache: str

    def close(self) -> None:
        """Close the descriptor, and with the last copy of it give up the lock. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self.fd >= 0:
            warnings.warn(f"store {self.uri} was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()


def open_store(backend: BackendConfig, *, read_only: bool = False) -> Store:
    """Open the store that `backend.uri` names.

    Raises ConfigError for a URI or an engine that cannot be, BackendError when the store cannot be used,
    DeviceBusyError when somebody else uses it.
    """
    scheme, colon, rest = backend.uri.partition(":")
    if not colon or scheme not in BACKENDS:
        examples = ", ".join(example for _, example in BACKENDS.values())
        raise ConfigError(f"backend.uri: {backend.uri!r} names no known kind of store; write for example {examples}")
    if not rest:
        raise ConfigError(f"backend.uri: {backend.uri!r} is not complete; write for example {BACKENDS[scheme][1]}")
    _check_engine(backend, scheme)
    store: Store = import_module(BACKENDS[scheme][0]).open_store(rest, backend, read_only)
    try:
        _check_size(store)
    except ConfigError:
        store.close()
        raise
    return store


def block_size(store: Store, wanted_bytes: int = 0) -> int:
    """Return the block size to offer: what was wanted, or the store's when that is 0.

    Raises ConfigError when the store cannot take blocks that small, or its size is no multiple of them.
    """
    if not wanted_bytes:
        return store.block_size_bytes
    if wanted_bytes < store.block_size_bytes:
        raise ConfigError(
            f"device.block_size_bytes: {wanted_bytes}, but {store.uri} takes no blocks below {store.block_size_bytes}"
        )
    _check_multiple(store, wanted_bytes)
    return wanted_bytes


def _check_engine(backend: BackendConfig, scheme: str) -> None:
    """Check that the engine can serve such a store."""
    if backend.engine in ("memory", "null") and backend.engine != scheme:
        raise ConfigError(f"backend.engine: {backend.engine!r} serves {backend.engine}: stores, not {backend.uri}")
    if scheme == "null" and backend.engine not in ("auto", "null"):
        raise ConfigError(f"backend.engine: {backend.engine!r} needs a descriptor, and {backend.uri} has none")


def _check_size(store: Store) -> None:
    if store.size_bytes <= 0:
        raise ConfigError(f"backend.uri: {store.uri} is empty; give it a size first, for example by truncate -s 1G")
    _check_multiple(store, store.block_size_bytes)


def _check_multiple(store: Store, block_bytes: int) -> None:
    surplus = store.size_bytes % block_bytes
    if surplus:
        raise ConfigError(
            f"backend.uri: {store.uri} has {store.size_bytes} bytes, no multiple of the block size {block_bytes}; "
            f"make it {store.size_bytes - surplus + block_bytes}"
        )
