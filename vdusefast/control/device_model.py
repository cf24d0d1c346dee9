"""The virtio-blk device as its driver sees it: offered features, configuration space, status machine.

Source: VIRTIO 1.3, 2.1 (status), 3.1 (initialisation), 5.2 (block device).
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import TYPE_CHECKING

from vdusefast.backends import block_size
from vdusefast.base.engines import ENGINES
from vdusefast.transport import DeviceSpec, uapi
from vdusefast.transport.virtio_blk import CONFIG, Shown, config_fields
from vdusefast.units import SECTOR_BYTES
from vdusefast.worker.protocol import RequestLimits

if TYPE_CHECKING:
    from vdusefast.backends import Store
    from vdusefast.config import BackendConfig, Config

# What one DISCARD or WRITE_ZEROES may ask for. A limit keeps one request from holding up a quiesce for long.
DISCARD_MAX_SECTORS = 1 << 22  # 2 GiB
DISCARD_MAX_SEG = 16
WRITE_ZEROES_MAX_SECTORS = 1 << 22
WRITE_ZEROES_SLOW_MAX_SECTORS = 1 << 15  # 16 MiB, where zeros may have to be written out

REQUIRED_FEATURES = uapi.VIRTIO_F_VERSION_1 | uapi.VIRTIO_F_ACCESS_PLATFORM


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
    """Return whether requests to `store` end in the order in which they were popped, with every engine.

    Those of io_uring do not, which "cached" has misses wait in, and "auto" tries one or the other for a file
    (worker._engine_order).
    """
    if store.faults or store.spec is not None:
        return False
    if backend.engine == "auto":
        return store.is_memory or store.is_null
    return ENGINES[backend.engine].completes_in_order


def find_emulated(config_space: bytes, store: Store, backend: BackendConfig | None = None) -> list[str]:
    """Return the features that the driver is offered and the store lacks, so that we emulate them; for people."""
    shown, unit_bytes = config_fields(config_space), max(store.block_size_bytes, store.granule_bytes)
    emulated = []
    if shown["blk_size"] < unit_bytes:
        emulated.append(
            f"blocks of {shown['blk_size']} bytes: the store's have {unit_bytes}, so that a smaller write reads, "
            "changes and writes a whole one"
        )
    if shown["max_discard_sectors"] and backend is not None and backend.discard == "ignore":
        emulated.append("discard: backend.discard says ignore by now, so that nothing is done")
    elif shown["max_discard_sectors"] and not store.can_discard:
        emulated.append("discard: the store cannot do it, so that nothing is done")
    if shown["max_write_zeroes_sectors"] > WRITE_ZEROES_SLOW_MAX_SECTORS and not store.zeroes_cheaply:
        emulated.append("write zeroes: the store cannot do it, so that zeroes are written out")
    return emulated


def _blocks(size_bytes: int, block_bytes: int, limit: int) -> int:
    """Return a size in blocks, 0 (not specified) for a size that is no number of blocks up to `limit`."""
    blocks, rest = divmod(size_bytes, block_bytes)
    return blocks if not rest and blocks <= limit else 0


class BlockDevice:
    """One virtio-blk device over one store. Knows nothing of workers, and never touches the store's bytes.

    `offered_features` is a mask of uapi.VIRTIO_*; `config_space` is what the driver reads; `limits` is
    what one request may be; sizes are in bytes, sectors of 512 bytes.
    """

    def __init__(self, config: Config, store: Store, shown: Shown | None = None):
        """Describe the device that `config` asks for over `store` (borrowed). Raises ConfigError where they differ.

        shown: what the driver of an adopted device has been shown; it stays the same.
        """
        device = config.device
        self.name = device.name
        self.serial = device.serial
        self.queue_count = device.queues
        self.queue_size = device.effective_queue_size
        self.rotational = store.rotational
        self.status = 0
        if shown is not None:
            self._repeat(shown)
            return
        self.read_only = device.read_only or store.read_only
        self.block_size_bytes = block_size(store, device.block_size_bytes)
        self.capacity_sectors = store.size_bytes // SECTOR_BYTES
        discard = store.can_discard and not self.read_only and config.backend.discard == "unmap"
        write_zeroes = store.can_write_zeroes and not self.read_only
        # Zeroes that have to be written out must not take longer than a quiesce may.
        zeroes_max_sectors = WRITE_ZEROES_MAX_SECTORS if store.zeroes_cheaply else WRITE_ZEROES_SLOW_MAX_SECTORS
        self.limits = RequestLimits(
            seg_max=device.effective_seg_max,
            size_max_bytes=device.size_max_bytes,
            discard_max_sectors=DISCARD_MAX_SECTORS if discard else 0,
            discard_max_seg=DISCARD_MAX_SEG if discard else 0,
            write_zeroes_max_sectors=zeroes_max_sectors if write_zeroes else 0,
            write_zeroes_max_seg=(DISCARD_MAX_SEG if store.zeroes_cheaply else 1) if write_zeroes else 0,
        )
        self.write_zeroes_may_unmap = discard and not config.backend.keeps_zeroes
        self.writeback = store.cache != "writethrough"
        self.offered_features = self._features(config, store)
        self.config_space = self._config_space(store)

    def _repeat(self, shown: Shown) -> None:
        """Be the device that was shown. Raises ValueError for a configuration space of another length."""
        self.offered_features, self.config_space = shown
        fields = config_fields(self.config_space)
        self.read_only = bool(self.offered_features & uapi.VIRTIO_BLK_F_RO)
        self.block_size_bytes = fields["blk_size"]
        self.capacity_sectors = fields["capacity"]
        self.limits = RequestLimits(
            seg_max=fields["seg_max"],
            size_max_bytes=fields["size_max"],
            discard_max_sectors=fields["max_discard_sectors"],
            discard_max_seg=fields["max_discard_seg"],
            write_zeroes_max_sectors=fields["max_write_zeroes_sectors"],
            write_zeroes_max_seg=fields["max_write_zeroes_seg"],
        )
        self.write_zeroes_may_unmap = bool(fields["write_zeroes_may_unmap"])
        self.writeback = bool(fields["writeback"])

    def spec(self) -> DeviceSpec:
        """Return what a transport creates the device with."""
        return DeviceSpec(
            name=self.name,
            offered_features=self.offered_features,
            config=self.config_space,
            queue_count=self.queue_count,
            queue_size_max=self.queue_size,
            rotational=self.rotational,
        )

    def set_capacity(self, capacity_sectors: int) -> bytes:
        """Give the device another size. Returns the bytes that change, at the start of the configuration space."""
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
            uapi.VIRTIO_BLK_F_DISCARD: self.limits.discard_max_sectors > 0,
            uapi.VIRTIO_BLK_F_WRITE_ZEROES: self.limits.write_zeroes_max_sectors > 0,
        }
        always = (
            uapi.VIRTIO_BLK_F_SIZE_MAX
            | uapi.VIRTIO_BLK_F_SEG_MAX
            | uapi.VIRTIO_BLK_F_BLK_SIZE
            | uapi.VIRTIO_BLK_F_TOPOLOGY
        )
        return REQUIRED_FEATURES | always | sum(bit for bit, offered in optional.items() if offered)

    def _config_space(self, store: Store) -> bytes:
        block, limits = self.block_size_bytes, self.limits
        physical = max(block, store.physical_block_size_bytes)
        discard_bytes = max(store.discard_granularity_bytes or physical, block)
        return CONFIG.pack(
            self.capacity_sectors,
            limits.size_max_bytes,
            limits.seg_max,
            *(0, 0, 0),  # geometry: not offered
            block,
            (physical // block).bit_length() - 1,
            _blocks(store.alignment_offset_bytes, block, 0xFF),
            _blocks(max(store.min_io_size_bytes, physical), block, 0xFFFF) or _blocks(physical, block, 0xFFFF),
            _blocks(store.opt_io_size_bytes, block, 0xFFFFFFFF),
            *(1 if self.writeback else 0, 0, self.queue_count),
            limits.discard_max_sectors,
            limits.discard_max_seg,
            discard_bytes // SECTOR_BYTES if limits.discard_max_sectors else 0,
            limits.write_zeroes_max_sectors,
            limits.write_zeroes_max_seg,
            1 if self.write_zeroes_may_unmap else 0,
            *(0, 0, 0),  # secure erase: not offered
            *(0, 0, 0, 0, 0, 0),  # zoned: not offered
        )
