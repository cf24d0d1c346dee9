"""virtio-blk as both sides of a device see it: features, configuration space, requests.

Source: VIRTIO 1.3, 5.2 (block device). csrc/base/virtio_blk.h has the part for the data path.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vdusefast.transport import uapi

VIRTIO_BLK_T_IN = 0  # 5.2.6
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13
WRITE_ZEROES_UNMAP = 1
REQUEST_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
RANGE = struct.Struct("<QII")  # of a discard or write-zeroes: sector, sectors, flags
ID_BYTES = 20

# All features that a device of this version may have offered.
KNOWN_FEATURES = (
    uapi.VIRTIO_F_VERSION_1
    | uapi.VIRTIO_F_ACCESS_PLATFORM
    | uapi.VIRTIO_F_RING_PACKED
    | uapi.VIRTIO_F_IN_ORDER
    | uapi.VIRTIO_RING_F_INDIRECT_DESC
    | uapi.VIRTIO_RING_F_EVENT_IDX
    | uapi.VIRTIO_BLK_F_SIZE_MAX
    | uapi.VIRTIO_BLK_F_SEG_MAX
    | uapi.VIRTIO_BLK_F_RO
    | uapi.VIRTIO_BLK_F_BLK_SIZE
    | uapi.VIRTIO_BLK_F_FLUSH
    | uapi.VIRTIO_BLK_F_TOPOLOGY
    | uapi.VIRTIO_BLK_F_MQ
    | uapi.VIRTIO_BLK_F_DISCARD
    | uapi.VIRTIO_BLK_F_WRITE_ZEROES
)
# VIRTIO 1.3, 5.2.4: struct virtio_blk_config, 96 bytes, little-endian
CONFIG = struct.Struct(
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
CONFIG_BYTES = CONFIG.size
_CONFIG_FIELDS = (
    *("capacity", "size_max", "seg_max", "cylinders", "heads", "sectors", "blk_size"),
    *("physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size", "writeback", "unused0", "num_queues"),
    *("max_discard_sectors", "max_discard_seg", "discard_sector_alignment"),
    *("max_write_zeroes_sectors", "max_write_zeroes_seg", "write_zeroes_may_unmap"),
    *("max_secure_erase_sectors", "max_secure_erase_seg", "secure_erase_sector_alignment"),
    *("zone_sectors", "max_open_zones", "max_active_zones", "max_append_sectors", "write_granularity", "model"),
)


class Shown(NamedTuple):
    """The properties of a device that its driver was shown. They stay, whatever its store can do today."""

    offered_features: int
    config_space: bytes


def config_fields(config_space: bytes) -> dict[str, int]:
    """Return the fields of a configuration space by the names that struct virtio_blk_config has for them.

    Raises ValueError for one of another length.
    """
    if len(config_space) != CONFIG_BYTES:
        raise ValueError(f"a configuration space of {len(config_space)} bytes, expected {CONFIG_BYTES}")
    return dict(zip(_CONFIG_FIELDS, CONFIG.unpack(config_space), strict=True))
