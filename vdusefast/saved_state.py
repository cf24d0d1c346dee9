"""What a server writes down about its device, so that another one can go on with it: BASE/NAME/state.

The kernel keeps a device whose server has ended, and does not tell how it was made. Whoever takes it over has to serve
exactly that device: what differs is named, and refused before anything is touched.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vdusefast.backends.plugin import Description
from vdusefast.config import Config, DeviceConfig
from vdusefast.errors import ConfigError, VdusefastError
from vdusefast.transport import DeviceSpec, uapi

if TYPE_CHECKING:
    from vdusefast.device import BlockDevice
    from vdusefast.transport import Transport

VERSION = 1
STATE_MAX_BYTES = 1 << 20

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
    described: Description | None = None  # the store, where a module brings its engine: it may be away just now
    resizing: bool = False  # the driver may have been shown another size, but no larger one

    @property
    def capacity_sectors(self) -> int:
        """Return the size that the driver was shown."""
        from vdusefast.device import config_fields

        return config_fields(bytes.fromhex(self.config_space))["capacity"]


def make_state(
    config: Config, spec: DeviceSpec, transport: Transport, described: Description | None = None
) -> SavedState:
    """Return the state of a device that `transport` has created as `spec` says; the next server places "auto" anew.

    described: its store, of a backend whose module brings the engine.
    """
    api_version = vduse_features = 0
    if transport.kind == "kernel":
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
    )


def save(path: Path, state: SavedState) -> None:
    """Write the state file, mode 0600, in one step: whoever reads finds the old one or the new. Raises VdusefastError.

    It need not survive the machine, as the device does not: nothing is synced.
    """
    new = path.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(msgspec.json.encode(state))
        new.rename(path)
    except OSError as error:
        raise VdusefastError(f"{path.parent.name}: cannot write {path}: {error.strerror}") from None


def load(path: Path) -> SavedState | None:
    """Return what the last server has written, None when there is nothing.

    Raises VdusefastError for a file that is damaged, foreign or of another version.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, "rb") as file:
            text = file.read(STATE_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VdusefastError(f"{path.parent.name}: cannot read {path}: {error.strerror}") from None
    try:
        state = msgspec.json.decode(text, type=SavedState)
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
    """Write down another size. Nothing where no state is kept.

    config: what it is served by from now on. resizing: what the driver is shown is being changed; a server that goes
    on meanwhile shows it this size. Raises VdusefastError.
    """
    state = load(path)
    if state is not None:
        space = capacity_sectors.to_bytes(8, "little") + bytes.fromhex(state.config_space)[8:]
        save(path, msgspec.structs.replace(state, config=config, config_space=space.hex(), resizing=resizing))


def check_config(state: SavedState, config: Config, transport: str) -> None:
    """Check what can be told from a configuration alone: whether it is for the device that was left.

    transport: the kind. Raises ConfigError that names the first key that differs, with both values.
    """
    old, new = state.config.device, config.device
    _check(new.name, "device.transport", state.transport, transport)
    # The bus first: defaults of others come from it.
    keys = [*(["bus"] if transport == "kernel" else []), "queues", "effective_queue_size", "read_only"]
    keys += ["effective_bounce_size_bytes"] if transport == "kernel" and new.bus == "virtio" else []
    for key in keys:
        _check(new.name, f"device.{key.removeprefix('effective_')}", getattr(old, key), getattr(new, key))
    # A driver keeps a cache of its own in mind, or none.
    old_cache, new_cache = state.config.backend.cache, config.backend.cache
    if "writethrough" in (old_cache, new_cache):
        _check(new.name, "backend.cache", old_cache, new_cache)
    # The same size does not make it the same disk.
    _check(new.name, "backend.uri", state.config.backend.uri, config.backend.uri)


def adopt(state: SavedState, model: BlockDevice, *, checked: bool = True) -> None:
    """Check that the device is the one that was left, now that its store is open, and give it what is kept from then.

    A store that has grown, and a feature that newer code would offer, are no differences: the device goes on with the
    size and the features that its driver was shown. checked: else whatever differs is taken from then. Raises
    ConfigError that names what differs, with both values.
    """
    if checked:
        _check_model(state, model)
    model.offered_features = state.offered_features
    model.config_space = bytes.fromhex(state.config_space)
    model.set_capacity(state.capacity_sectors)


def _check_model(state: SavedState, model: BlockDevice) -> None:
    from vdusefast.device import config_fields

    spec = model.spec()
    wanted, found = config_fields(bytes.fromhex(state.config_space)), config_fields(spec.config)
    if found["capacity"] > wanted["capacity"]:
        _log.warning("%s: its store has grown: `vdusefast resize %s` lets the driver know", model.name, model.name)
        found["capacity"] = wanted["capacity"]
    _check(model.name, "device.queues", state.queue_count, spec.queue_count)
    _check(model.name, "device.queue_size", state.queue_size_max, spec.queue_size_max)
    for field, value in wanted.items():
        _check(model.name, _FIELD_NAMES.get(field, field), value, found[field])
    missing = state.offered_features & ~spec.offered_features
    _check(model.name, "features", uapi.feature_names(missing) or "none", "none of it" if missing else "none")


# What a person calls the fields of the configuration space that come from a key.
_FIELD_NAMES = {
    "capacity": "size in sectors",
    "size_max": "device.size_max_bytes",
    "seg_max": "device.seg_max",
    "blk_size": "device.block_size_bytes",
    "num_queues": "device.queues",
}
assert {"size_max_bytes", "seg_max", "block_size_bytes", "queues"} <= set(DeviceConfig.__struct_fields__)


def _check(name: str, key: str, old: object, new: object) -> None:
    if old != new:
        raise ConfigError(
            f"{name}: {key}: the device that its last server has left was made with {_text(old)}, and would now get "
            f"{_text(new)}; {_advice(name)}"
        )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _advice(name: str) -> str:
    return f"go on with what it was made with (vdusefast recover {name}), or remove it first (vdusefast del {name})"
