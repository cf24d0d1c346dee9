"""What a new size means for a store: whether it can be had, what it would cost, and giving the store that size.

The device itself learns of it from `Supervisor.resize`; between the two, nothing lies outside of the store.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from vdusefast.backends.identity import path_is_other
from vdusefast.errors import BackendError, ConfigError, VdusefastError
from vdusefast.units import SECTOR_BYTES, size_text

if TYPE_CHECKING:
    from vdusefast.backends import Store

SIZE_MAX_BYTES = (1 << 63) - SECTOR_BYTES  # an offset in a file is a signed 64-bit number


def present_bytes(store: Store) -> int:
    """Return how large the store is now; somebody may have changed it. Raises BackendError."""
    if store.spec is not None:
        return store.present_size_bytes
    try:
        if store.is_file:
            return os.fstat(store.fd).st_size
        if store.is_block_device:
            return os.lseek(store.fd, 0, os.SEEK_END)
    except OSError as error:
        raise BackendError(f"{store.uri}: {error.strerror}") from None
    return store.size_bytes


def refuse_other(store: Store) -> None:
    """Raise BackendError when the store's name stands for another one by now: the size would be of one not meant."""
    if store.fd < 0 or not store.path or not path_is_other(store.fd, store.path):
        return
    raise BackendError(
        f"{store.uri} is another store now than the one that is served, which has lost its name: nothing was resized; "
        "put that one back first"
    )


def choose_bytes(store: Store, device_bytes: int, block_bytes: int, wanted_bytes: int | None, *, force: bool) -> int:
    """Return the size in bytes that a device of `device_bytes` over `store` is to have.

    wanted_bytes: None for what the store has now. force: also when that is less. Nothing is changed. Raises
    ConfigError for a size that cannot be, VdusefastError for a smaller one without `force`, BackendError.
    """
    if store.is_memory:
        raise ConfigError(
            f"{store.uri} cannot be resized: its workers have mapped it once and for all; "
            "use a file on a tmpfs, or remove the device and add a larger one"
        )
    if store.is_null and store.faults:
        raise ConfigError(f"{store.uri} cannot be resized: its size is part of its name")
    present = present_bytes(store)
    size_bytes = present if wanted_bytes is None else wanted_bytes
    if not 0 < size_bytes <= SIZE_MAX_BYTES or size_bytes % block_bytes:
        nearest = max(block_bytes, min(size_bytes, SIZE_MAX_BYTES) // block_bytes * block_bytes)
        raise ConfigError(
            f"{store.uri}: a size of {size_bytes} bytes is no positive multiple of the block size {block_bytes}; "
            f"write for example {nearest}"
        )
    if size_bytes != present and store.spec is not None:
        raise ConfigError(
            f"{store.uri} has {present} bytes, and is not resized from here: do that by its own means; a device that "
            "does not follow by itself is then resized without a SIZE"
        )
    if size_bytes != present and store.is_block_device:
        raise ConfigError(
            f"{store.uri} has {present} bytes, and a block device is not resized from here: do that by its own means "
            "(lvextend, for example), then resize without a SIZE"
        )
    if size_bytes != present and store.read_only and store.is_file:
        raise ConfigError(f"{store.uri} is served read-only and has {present} bytes: resize it, then without a SIZE")
    before = max(device_bytes, present)  # a file that was made longer may hold something there
    if size_bytes < before and not force:
        raise VdusefastError(
            f"{store.uri}: shrinking from {size_text(before)} to {size_text(size_bytes)} loses all from byte "
            f"{size_bytes} to {before - 1}; shrink the file system on it first, then use --force"
        )
    return size_bytes


def set_bytes(store: Store, size_bytes: int) -> None:
    """Give the store that size, which `choose_bytes` has allowed; a file grows by a hole. Raises BackendError."""
    if present_bytes(store) != size_bytes and store.is_file:
        try:
            os.ftruncate(store.fd, size_bytes)
        except OSError as error:
            raise BackendError(f"{store.uri}: cannot have {size_bytes} bytes: {error.strerror}") from None
    store.size_bytes = size_bytes
    if store.is_null:
        store.uri = f"null:{size_bytes}"


def change_bytes(
    store: Store,
    before_bytes: int,
    size_bytes: int,
    *,
    note: Callable[[int, bool], None],
    show: Callable[[], None],
) -> None:
    """Change store and device to the size that `choose_bytes` has allowed, in the order that is safe at every step.

    before_bytes: the device's size. note: writes a size down for the next server, and whether a resize is under way.
    show: has the driver see the new size. Wherever this is interrupted, the next server finds a store that is at least
    as large as the size that is noted. It serves what the driver has been shown, and then shows the noted size.
    """
    present = present_bytes(store)
    grows = size_bytes >= before_bytes
    try:
        if size_bytes > present:
            set_bytes(store, size_bytes)
        note(size_bytes if grows else before_bytes, True)
        show()
    except BaseException:
        if grows:
            note(before_bytes, False)
        if size_bytes > present:
            set_bytes(store, present)
        raise
    note(size_bytes, False)
    set_bytes(store, size_bytes)
