"""The state that a server saves about its device, so that another server can adopt it: BASE/NAME/state.

The kernel keeps a device whose server has ended, but does not report how it was made. The server that adopts it has to
serve exactly that device. A difference is named, and refused before anything is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vdusefast.backends import store_scheme
from vdusefast.backends.identity import Identity, is_same, text_of
from vdusefast.backends.plugin import Description
from vdusefast.base.decoding import decode_json
from vdusefast.base.kinds import CacheMode, StoreKind, TransportKind
from vdusefast.config import Config
from vdusefast.errors import BackendError, ConfigError, VdusefastError
from vdusefast.state import state_file
from vdusefast.transport import DeviceSpec, uapi
from vdusefast.units import SECTOR_BYTES

if TYPE_CHECKING:
    from vdusefast.backends import Store
    from vdusefast.transport import Transport
    from vdusefast.transport.virtio_blk import Shown

VERSION = 1

_log = logging.getLogger("vdusefast")


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """One device as it was created, and the configuration that it is served by."""

    version: int = VERSION
    config: Config
    transport: str  # the kind
    offered_features: int
    config_space: str  # in hexadecimal digits
    queue_count: int
    queue_size_max: int
    api_version: int = 0  # of VDUSE, where the transport has one
    vduse_features: int = 0
    described: Description | None = None  # a plugin's description of its store, which may be unreachable now
    identity: dict[str, str] = {}  # of the store, as backends.identity has it; empty: any store is adopted
    resizing: bool = False  # the driver may have been shown a smaller size

    @property
    def shown(self) -> Shown:
        """Return the properties that the driver was shown."""
        from vdusefast.transport.virtio_blk import Shown

        return Shown(self.offered_features, bytes.fromhex(self.config_space))

    @property
    def capacity_sectors(self) -> int:
        """Return the size that the driver was shown."""
        from vdusefast.transport.virtio_blk import config_fields

        return config_fields(bytes.fromhex(self.config_space))["capacity"]


def make_state(
    config: Config,
    spec: DeviceSpec,
    transport: Transport,
    described: Description | None = None,
    identity: Identity | None = None,
) -> SavedState:
    """Return the state of a device that `transport` has created from `spec`; the next server places "auto" again.

    described: its store, if a module has the engine. identity: of its store.
    """
    api_version = vduse_features = 0
    if transport.kind == TransportKind.KERNEL:
        from vdusefast.transport.kernel import KernelTransport

        if isinstance(transport, KernelTransport):
            api_version, vduse_features = transport.api_version, transport.vduse_features
    return SavedState(
        config=config,
        transport=transport.kind,
        offered_features=spec.offered_features,
        config_space=spec.config.hex(),
        queue_count=spec.queue_count,
        queue_size_max=spec.queue_size_max,
        api_version=api_version,
        vduse_features=vduse_features,
        described=described,
        identity=identity or {},
    )


def save(path: Path, state: SavedState) -> None:
    """Write the state file atomically, even if the disk is full, once the file exists. Raises VdusefastError.

    It need not survive a reboot, as the device does not: nothing is synced.
    """
    try:
        state_file.write(path, msgspec.json.encode(state))
    except OSError as error:
        raise VdusefastError(f"{path.parent.name}: cannot write {path}: {error.strerror}") from None


def load(path: Path) -> SavedState | None:
    """Return the state that the last server has saved, None when there is none.

    Raises VdusefastError for a file that is damaged, foreign or of another version.
    """
    try:
        text = state_file.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VdusefastError(f"{path.parent.name}: cannot read {path}: {error.strerror}") from None
    try:
        state = decode_json(text, SavedState)
        if state.version != VERSION:
            raise ValueError(f"version {state.version}, expected {VERSION}")
        if state.capacity_sectors < 0 or state.config.device.name != path.parent.name:
            raise ValueError(f"it is that of {state.config.device.name!r}")
    except (msgspec.DecodeError, ValueError) as error:
        raise VdusefastError(
            f"{path.parent.name}: {path} is not the state of this device, as this version writes it: {error}"
        ) from None
    return state


def note_size(path: Path, capacity_sectors: int, config: Config, *, resizing: bool) -> None:
    """Save another size. Does nothing where no state is kept.

    config: the new configuration. resizing: the size that the driver is shown is being changed; a server that adopts
    the device meanwhile shows it this size. Raises VdusefastError.
    """
    state = load(path)
    if state is not None:
        space = capacity_sectors.to_bytes(8, "little") + bytes.fromhex(state.config_space)[8:]
        save(path, msgspec.structs.replace(state, config=config, config_space=space.hex(), resizing=resizing))


@contextmanager
def any_store(path: Path) -> Iterator[None]:
    """Let the next server adopt the device with any store. If that fails, the saved state is unchanged."""
    state = load(path)
    if state is None or not state.identity:
        yield
        return
    save(path, msgspec.structs.replace(state, identity={}))
    try:
        yield
    except BaseException:
        now = load(path)
        if now is not None and not now.identity:
            save(path, msgspec.structs.replace(now, identity=state.identity))
        raise


def check_store(state: SavedState, store: Store) -> None:
    """Check that an open store is the one that was served. Raises BackendError that names both."""
    if is_same(state.identity, store.identity):
        return
    name = state.config.device.name
    raise BackendError(
        f"{name}: {store.uri} is another store than the one that was served: that was {text_of(state.identity)}, "
        f"this is {text_of(store.identity)}; put the old one back; or adopt the device with this one, which lacks the "
        f"driver's data: vdusefast recover {name} --other-store; or remove the device: vdusefast del {name} --force"
    )


def as_made(state: SavedState, config: Config) -> Config:
    """Return a configuration with the ring size that the device was made with, if it leaves that open.

    The default may have been another one then.
    """
    if config.device.queue_size:
        return config
    device = msgspec.structs.replace(config.device, queue_size=state.queue_size_max)
    return msgspec.structs.replace(config, device=device)


def check_config(state: SavedState, config: Config, transport: str) -> None:
    """Check by the configuration alone whether it is for the orphaned device.

    transport: the kind. Raises ConfigError that names the first key that differs, with both values.
    """
    state = msgspec.structs.replace(state, config=as_made(state, state.config))
    config = as_made(state, config)
    old, new = state.config.device, config.device
    _check(new.name, "device.transport", state.transport, transport)
    # The bus first: defaults of others come from it.
    in_kernel = transport == TransportKind.KERNEL
    keys = [*(["bus"] if in_kernel else []), "queues", "effective_queue_size", "read_only"]
    keys += ["effective_bounce_size_bytes"] if in_kernel and new.bus.copies_data else []
    for key in keys:
        _check(new.name, f"device.{key.removeprefix('effective_')}", getattr(old, key), getattr(new, key))
    _check_keys(state, config)
    # The driver relies on the cache mode that it was shown.
    old_cache, new_cache = state.config.backend.cache, config.backend.cache
    if CacheMode.WRITETHROUGH in (old_cache, new_cache):
        _check(new.name, "backend.cache", old_cache, new_cache)
    # Another store of the same size is another disk.
    old_uri, new_uri = state.config.backend.uri, config.backend.uri
    if _without_format(old_uri) != _without_format(new_uri):
        _check(new.name, "backend.uri", old_uri, new_uri)


def _without_format(uri: str) -> str:
    """Return a URI without the parts that matter only when a device is made."""
    from vdusefast.backends.image_format import RAW

    return uri.removesuffix(RAW) if store_scheme(uri) == StoreKind.FILE else uri


def check_shown(state: SavedState, store: Store) -> None:
    """Check that an orphaned device can be served as its driver was shown, now that its store is open.

    Only differences that would corrupt data are refused; others are emulated. Raises ConfigError that names them, with
    both values; BackendError.
    """
    from vdusefast.transport.virtio_blk import KNOWN_FEATURES, config_fields

    name, sectors = state.config.device.name, store.size_bytes // SECTOR_BYTES
    shown = config_fields(bytes.fromhex(state.config_space))
    unknown = state.offered_features & ~KNOWN_FEATURES
    _check(name, "features", uapi.feature_names(unknown) or "none", "none of it" if unknown else "none")
    _check(name, "size in sectors", shown["capacity"], min(sectors, shown["capacity"]))
    if store.read_only and not state.offered_features & uapi.VIRTIO_BLK_F_RO:
        raise BackendError(f"{name}: {store.uri} is read-only now, but the driver was shown a writable device")
    if sectors >= shown["capacity"] + max(1, store.granule_bytes // SECTOR_BYTES):  # else it is the end of a block
        _log.warning("%s: its store has grown: `vdusefast resize %s` lets the driver know", name, name)


# The driver has been shown the values of these keys; a configuration with other values is refused.
_SHOWN_KEYS = ("size_max_bytes", "effective_seg_max")
_RING_KEYS = ("packed", "in_order", "event_idx", "effective_indirect")


def _check_keys(state: SavedState, config: Config) -> None:
    """Check the keys that a driver sees. A feature that was not offered then may be configured, and stays off."""
    from vdusefast.transport.virtio_blk import config_fields

    old, new = state.config.device, config.device
    block_bytes = config_fields(bytes.fromhex(state.config_space))["blk_size"]
    _check(new.name, "device.block_size_bytes", block_bytes, new.block_size_bytes or block_bytes)
    for key in (*_SHOWN_KEYS, *(key for key in _RING_KEYS if getattr(old, key))):
        _check(new.name, f"device.{key.removeprefix('effective_')}", getattr(old, key), getattr(new, key))


def _check(name: str, key: str, old: object, new: object) -> None:
    if old != new:
        raise ConfigError(
            f"{name}: {key}: the orphaned device was made with {_text(old)}, and would now get "
            f"{_text(new)}; {_advice(name)}"
        )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _advice(name: str) -> str:
    return f"keep its old configuration (vdusefast recover {name}), or remove it first (vdusefast del {name})"
