"""The virtio-blk device as its driver sees it: offered features, configuration space, status machine.

Source: VIRTIO 1.3, 2.1 (status), 3.1 (initialisation), 5.2 (block device).
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import TYPE_CHECKING

from vdusefast.backends import block_size
from vdusefast.transport import DeviceSpec, uapi

if TYPE_CHECKING:
    from vdusefast.backends import Store
    from vdusefast.config import BackendConfig, Config

SECTOR_BYTES = 512

# What one DISCARD or WRITE_ZEROES may ask for. A limit keeps one request from holding up a quiesce for long.
DISCARD_MAX_SECTORS = 1 << 22  # 2 GiB
DISCARD_MAX_SEG = 16
WRITE_ZEROES_MAX_SECTORS = 1 << 22
WRITE_ZEROES_SLOW_MAX_SECTORS = 1 << 15  # 16 MiB, where zeros may have to be written out

REQUIRED_FEATURES = uapi.VIRTIO_F_VERSION_1 | uapi.VIRTIO_F_ACCESS_PLATFORM

# VIRTIO 1.3, 5.2.4: struct virtio_blk_config, 96 bytes, little-endian
_CONFIG = struct.Struct(
    "<Q"  # capacity
    "II"  # size_max, seg_max
    "HBB"  # geometry: cylinders, heads, sectors
    "I"  # blk_size
    "BBHI"  # topology: physical_block_exp, alignment_offset, min_io_size, opt_io_size
    "BBH"  # writeback, unused0, num_queues
    "III"  # max_discard_sectors, max_discard_seg, discard_sector_alignment
    "IIB3x"  # max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
    "III"  # max_secure_erase_sectors, max_secure_erase_seg, secure_erase_sector_alignment
    "IIIIIB3x"  # zoned: zone_sectors, max_open, max_active, max_append_sectors, write_granularity, model
)
CONFIG_BYTES = _CONFIG.size
_CONFIG_FIELDS = (
    *("capacity", "size_max", "seg_max", "cylinders", "heads", "sectors", "blk_size"),
    *("physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size", "writeback", "unused0", "num_queues"),
    *("max_discard_sectors", "max_discard_seg", "discard_sector_alignment"),
    *("max_write_zeroes_sectors", "max_write_zeroes_seg", "write_zeroes_may_unmap"),
    *("max_secure_erase_sectors", "max_secure_erase_seg", "secure_erase_sector_alignment"),
    *("zone_sectors", "max_open_zones", "max_active_zones", "max_append_sectors", "write_granularity", "model"),
)


class StatusChange(Enum):
    """What a new device status asks for."""

    RESET = "reset"
    FEATURES_OK = "features_ok"  # the driver has chosen its features
    DRIVER_OK = "driver_ok"  # serve the ready queues; also asked again while running
    GAVE_UP = "gave_up"  # the driver set FAILED
    NOTHING = "nothing"


class StatusRefusedError(Exception):
    """The device cannot take that status; the message says why."""


def completes_in_order(backend: BackendConfig, store: Store) -> bool:
    """Return whether requests to `store` end in the order in which they were taken, whichever engine it will be.

    Those of io_uring do not, which "cached" has misses wait in, and "auto" tries one or the other for a file
    (worker._engine_order).
    """
    if store.faults or store.spec is not None:
        return False
    if backend.engine == "auto":
        return store.kind in ("memory", "null")
    return backend.engine not in ("uring", "cached")


def config_fields(config_space: bytes) -> dict[str, int]:
    """Return the fields of a configuration space by the names that struct virtio_blk_config has for them.

    Raises ValueError for one of another length.
    """
    if len(config_space) != CONFIG_BYTES:
        raise ValueError(f"a configuration space of {len(config_space)} bytes, expected {CONFIG_BYTES}")
    return dict(zip(_CONFIG_FIELDS, _CONFIG.unpack(config_space), strict=True))


class BlockDevice:
    """One virtio-blk device over one store. Knows nothing of workers, and never touches the store's bytes.

    `offered_features` is a mask of uapi.VIRTIO_*; `config_space` is what the driver reads; sizes are in bytes,
    sectors of 512 bytes.
    """

    def __init__(self, config: Config, store: Store):
        """Describe the device that `config` asks for over `store` (borrowed). Raises ConfigError where they differ."""
        device = config.device
        self.name = device.name
        self.serial = device.serial
        self.queue_count = device.queues
        self.queue_size = device.effective_queue_size
        self.read_only = device.read_only or store.read_only
        self.block_size_bytes = block_size(store, device.block_size_bytes)
        self.capacity_sectors = store.size_bytes // SECTOR_BYTES
        self.size_max_bytes = device.size_max_bytes
        self.seg_max = device.effective_seg_max
        discard = store.can_discard and not self.read_only
        write_zeroes = store.can_write_zeroes and not self.read_only
        self.discard_max_sectors = DISCARD_MAX_SECTORS if discard else 0
        self.discard_max_seg = DISCARD_MAX_SEG if discard else 0
        # What has to be written out must not take longer than a quiesce may.
        zeroes_max_sectors = WRITE_ZEROES_MAX_SECTORS if store.zeroes_cheaply else WRITE_ZEROES_SLOW_MAX_SECTORS
        self.write_zeroes_max_sectors = zeroes_max_sectors if write_zeroes else 0
        self.write_zeroes_max_seg = (DISCARD_MAX_SEG if store.zeroes_cheaply else 1) if write_zeroes else 0
        self.write_zeroes_may_unmap = discard
        self.writeback = store.cache != "writethrough"
        self.offered_features = self._features(config, store)
        self.config_space = self._config_space(store)
        self.status = 0

    def spec(self) -> DeviceSpec:
        """Return what a transport creates the device with."""
        return DeviceSpec(
            name=self.name,
            offered_features=self.offered_features,
            config=self.config_space,
            queue_count=self.queue_count,
            queue_size_max=self.queue_size,
        )

    def set_capacity(self, capacity_sectors: int) -> bytes:
        """Give the device another size. Returns what changes: the first bytes of the configuration space."""
        capacity = struct.pack("<Q", capacity_sectors)
        self.config_space = capacity + self.config_space[len(capacity) :]
        self.capacity_sectors = capacity_sectors
        return capacity

    def judge_status(self, status: int) -> StatusChange:
        """Return what going to `status` asks for; nothing is changed, `status` is to be assigned once it is done.

        Raises StatusRefusedError for a step that a driver may not take (VIRTIO 1.3, 3.1.1).
        """
        if status == 0:
            return StatusChange.RESET
        taken_back = self.status & ~status
        if taken_back:
            raise StatusRefusedError(f"status {status:#x} takes back {taken_back:#x} without a reset")
        added = status & ~self.status
        if added & uapi.VIRTIO_CONFIG_S_FAILED:
            return StatusChange.GAVE_UP
        begun = uapi.VIRTIO_CONFIG_S_ACKNOWLEDGE | uapi.VIRTIO_CONFIG_S_DRIVER
        if added & (uapi.VIRTIO_CONFIG_S_FEATURES_OK | uapi.VIRTIO_CONFIG_S_DRIVER_OK) and status & begun != begun:
            raise StatusRefusedError(f"status {status:#x} comes before ACKNOWLEDGE and DRIVER")
        if status & uapi.VIRTIO_CONFIG_S_DRIVER_OK:
            if not self.status & uapi.VIRTIO_CONFIG_S_FEATURES_OK:
                raise StatusRefusedError(f"status {status:#x} comes before FEATURES_OK")
            return StatusChange.DRIVER_OK
        if added & uapi.VIRTIO_CONFIG_S_FEATURES_OK:
            return StatusChange.FEATURES_OK
        return StatusChange.NOTHING

    def judge_features(self, acked_features: int) -> None:
        """Raise StatusRefusedError unless the device can serve exactly `acked_features`."""
        surplus = acked_features & ~self.offered_features
        if surplus:
            raise StatusRefusedError(f"the driver accepted what was not offered: {uapi.feature_names(surplus)}")
        missing = REQUIRED_FEATURES & ~acked_features
        if missing:
            raise StatusRefusedError(f"the driver did not accept {uapi.feature_names(missing)}")

    def _features(self, config: Config, store: Store) -> int:
        optional = {
            uapi.VIRTIO_RING_F_INDIRECT_DESC: config.device.effective_indirect,
            uapi.VIRTIO_RING_F_EVENT_IDX: config.device.event_idx,
            uapi.VIRTIO_F_RING_PACKED: config.device.packed,
            uapi.VIRTIO_F_IN_ORDER: config.device.in_order and completes_in_order(config.backend, store),
            uapi.VIRTIO_BLK_F_FLUSH: self.writeback,
            uapi.VIRTIO_BLK_F_RO: self.read_only,
            uapi.VIRTIO_BLK_F_MQ: self.queue_count > 1,
            uapi.VIRTIO_BLK_F_DISCARD: self.discard_max_sectors > 0,
            uapi.VIRTIO_BLK_F_WRITE_ZEROES: self.write_zeroes_max_sectors > 0,
        }
        always = (
            uapi.VIRTIO_BLK_F_SIZE_MAX
            | uapi.VIRTIO_BLK_F_SEG_MAX
            | uapi.VIRTIO_BLK_F_BLK_SIZE
            | uapi.VIRTIO_BLK_F_TOPOLOGY
        )
        return REQUIRED_FEATURES | always | sum(bit for bit, offered in optional.items() if offered)

    def _config_space(self, store: Store) -> bytes:
        block = self.block_size_bytes
        physical = max(block, store.physical_block_size_bytes)
        return _CONFIG.pack(
            self.capacity_sectors,
            self.size_max_bytes,
            self.seg_max,
            *(0, 0, 0),  # geometry: not offered
            block,
            (physical // block).bit_length() - 1,
            0,
            min(physical // block, 0xFFFF),
            min(store.opt_io_size_bytes // block, 0xFFFFFFFF),
            *(1 if self.writeback else 0, 0, self.queue_count),
            self.discard_max_sectors,
            self.discard_max_seg,
            physical // SECTOR_BYTES if self.discard_max_sectors else 0,
            self.write_zeroes_max_sectors,
            self.write_zeroes_max_seg,
            1 if self.write_zeroes_may_unmap else 0,
            *(0, 0, 0),  # secure erase: not offered
            *(0, 0, 0, 0, 0, 0),  # zoned: not offered
        )
