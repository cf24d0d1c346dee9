"""The sizes of a board (csrc/board/board.h), as a device asks for them."""

from __future__ import annotations

from vdusefast.driver._board import BOUNCE_MAX_BYTES, SEGMENTS_MAX, SLOTS_MAX, USERS_MAX
from vdusefast.transport import uapi
from vdusefast.transport.virtio_blk import config_fields
from vdusefast.units import SECTOR_BYTES


def board_words(space: bytes, features: int, queue_count: int, queue_size: int) -> dict[str, int]:
    """Return the sizes of a board for a device with this configuration space and these features accepted."""
    config = config_fields(space)

    def has(feature: int) -> bool:
        return features & feature == feature

    block = config["blk_size"] if has(uapi.VIRTIO_BLK_F_BLK_SIZE) else SECTOR_BYTES
    topology = has(uapi.VIRTIO_BLK_F_TOPOLOGY)
    size_max = config["size_max"] if has(uapi.VIRTIO_BLK_F_SIZE_MAX) else 1 << 30
    size_max -= size_max % block
    indirect = has(uapi.VIRTIO_RING_F_INDIRECT_DESC)
    segments = min(config["seg_max"] if has(uapi.VIRTIO_BLK_F_SEG_MAX) else 1, SEGMENTS_MAX) if indirect else 1
    discard = has(uapi.VIRTIO_BLK_F_DISCARD)
    zeroes = has(uapi.VIRTIO_BLK_F_WRITE_ZEROES)
    bounce = min(size_max, BOUNCE_MAX_BYTES)
    return {
        "capacity_bytes": config["capacity"] * SECTOR_BYTES,
        "discard_max_bytes": config["max_discard_sectors"] * SECTOR_BYTES if discard else 0,
        "discard_granularity_bytes": max(block, config["discard_sector_alignment"] * SECTOR_BYTES) if discard else 0,
        "write_zeroes_max_bytes": config["max_write_zeroes_sectors"] * SECTOR_BYTES if zeroes else 0,
        "block_bytes": block,
        "physical_block_bytes": block << config["physical_block_exp"] if topology else block,
        "io_min_bytes": config["min_io_size"] * block if topology else 0,
        "io_opt_bytes": config["opt_io_size"] * block if topology else 0,
        "size_max_bytes": size_max,
        "segments_max": max(1, segments),
        "bounce_bytes": bounce - bounce % block,
        "queue_count": queue_count,
        "queue_size": queue_size,
        "slot_count": min(SLOTS_MAX, max(1, queue_size // 2 if indirect else queue_size // 3)),
        "user_max": USERS_MAX - 1,
        "packed": has(uapi.VIRTIO_F_RING_PACKED),
        "event_idx": has(uapi.VIRTIO_RING_F_EVENT_IDX),
        "in_order": has(uapi.VIRTIO_F_IN_ORDER),
        "indirect": indirect,
        "read_only": has(uapi.VIRTIO_BLK_F_RO),
        "has_flush": has(uapi.VIRTIO_BLK_F_FLUSH),
    }
