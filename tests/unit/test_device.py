"""The virtio-blk device as its driver sees it."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from vdusefast.backends import Store
from vdusefast.config import make_config
from vdusefast.control.device_model import BlockDevice, StatusChange, StatusRefusedError
from vdusefast.errors import ConfigError
from vdusefast.transport import uapi
from vdusefast.transport.virtio_blk import config_fields
from vdusefast.worker import main as worker
from vdusefast.worker.protocol import WorkerSpec

MIB = 1 << 20


def make_device(store: dict[str, Any] | None = None, **config: object) -> BlockDevice:
    values: dict[str, Any] = {
        "uri": "memory:8M",
        "kind": "memory",
        "fd": -1,
        "size_bytes": 8 * MIB,
        "block_size_bytes": 512,
        "physical_block_size_bytes": 4096,
        "opt_io_size_bytes": 65536,
        "read_only": False,
        "can_discard": True,
        "can_write_zeroes": True,
        "zeroes_cheaply": True,
        "direct_align": 0,
        "cache": "writeback",
    }
    values.update(store or {})
    return BlockDevice(make_config(name="d0", uri="memory:8M", **config), Store(**values))


def config_field(device: BlockDevice, offset_bytes: int, kind: str) -> int:
    value: int = struct.unpack_from("<" + kind, device.config_space, offset_bytes)[0]
    return value


def test_config_space_lies_as_the_specification_says() -> None:
    device = make_device(queues=3, queue_size=64, block_size_bytes=1024)
    assert len(device.config_space) == 96
    fields = {
        "capacity": (0, "Q", 8 * MIB // 512),
        "size_max": (8, "I", 131072),
        "seg_max": (12, "I", 62),
        "blk_size": (20, "I", 1024),
        "physical_block_exp": (24, "B", 2),
        "min_io_size": (26, "H", 4),
        "opt_io_size": (28, "I", 64),
        "writeback": (32, "B", 1),
        "num_queues": (34, "H", 3),
        "max_discard_sectors": (36, "I", 1 << 22),
        "max_discard_seg": (40, "I", 16),
        "discard_sector_alignment": (44, "I", 8),
        "max_write_zeroes_sectors": (48, "I", 1 << 22),
        "max_write_zeroes_seg": (52, "I", 16),
        "write_zeroes_may_unmap": (56, "B", 1),
        "max_secure_erase_sectors": (60, "I", 0),
        "zoned.model": (92, "B", 0),
    }
    found = {name: config_field(device, offset, kind) for name, (offset, kind, _) in fields.items()}
    assert found == {name: value for name, (_, _, value) in fields.items()}


@pytest.mark.parametrize(
    ("store", "wanted"),
    [
        # A stripe of four disks with 64 KiB each, of which 1 MiB is freed at a time.
        (
            {"min_io_size_bytes": 65536, "opt_io_size_bytes": 262144, "discard_granularity_bytes": MIB},
            {"min_io_size": 128, "opt_io_size": 512, "discard_sector_alignment": 2048, "alignment_offset": 0},
        ),
        ({"alignment_offset_bytes": 3584}, {"alignment_offset": 7, "min_io_size": 8}),
        ({"alignment_offset_bytes": 100 * 4096}, {"alignment_offset": 0}),  # a byte, which that does not fit into
        ({"min_io_size_bytes": 64 * MIB}, {"min_io_size": 8}),  # 16 bits, as little
        ({"min_io_size_bytes": 65536 + 100}, {"min_io_size": 8}),  # no number of blocks
        ({"opt_io_size_bytes": 1000}, {"opt_io_size": 0}),
        ({"opt_io_size_bytes": 768 << 10}, {"opt_io_size": 1536}),
        ({"discard_granularity_bytes": 192 << 10}, {"discard_sector_alignment": 384}),  # as dm-thin may have it
        ({"discard_granularity_bytes": 512}, {"discard_sector_alignment": 1}),
        ({}, {"discard_sector_alignment": 8, "min_io_size": 8}),
        ({"can_discard": False, "discard_granularity_bytes": MIB}, {"discard_sector_alignment": 0}),
    ],
)
def test_topology_is_that_of_the_store(store: dict[str, Any], wanted: dict[str, int]) -> None:
    fields = config_fields(make_device(store).config_space)
    assert {name: fields[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("store", "config", "bit", "offered"),
    [
        ({}, {}, uapi.VIRTIO_BLK_F_FLUSH, True),
        ({"cache": "writethrough"}, {}, uapi.VIRTIO_BLK_F_FLUSH, False),
        ({}, {}, uapi.VIRTIO_BLK_F_RO, False),
        ({}, {"read_only": True}, uapi.VIRTIO_BLK_F_RO, True),
        ({"read_only": True}, {}, uapi.VIRTIO_BLK_F_RO, True),
        ({}, {"read_only": True}, uapi.VIRTIO_BLK_F_DISCARD, False),
        ({}, {}, uapi.VIRTIO_BLK_F_DISCARD, True),
        ({"can_discard": False}, {}, uapi.VIRTIO_BLK_F_DISCARD, False),
        ({}, {"discard": "ignore"}, uapi.VIRTIO_BLK_F_DISCARD, False),
        ({}, {"discard": "ignore"}, uapi.VIRTIO_BLK_F_WRITE_ZEROES, True),
        ({}, {"write_zeroes": "thick"}, uapi.VIRTIO_BLK_F_DISCARD, True),
        ({"can_discard": False}, {}, uapi.VIRTIO_BLK_F_WRITE_ZEROES, True),
        ({"can_write_zeroes": False}, {}, uapi.VIRTIO_BLK_F_WRITE_ZEROES, False),
        ({}, {"queues": 1}, uapi.VIRTIO_BLK_F_MQ, False),
        ({}, {"queues": 2}, uapi.VIRTIO_BLK_F_MQ, True),
        ({}, {"event_idx": False}, uapi.VIRTIO_RING_F_EVENT_IDX, False),
        ({}, {"indirect": False}, uapi.VIRTIO_RING_F_INDIRECT_DESC, False),
        ({}, {}, uapi.VIRTIO_F_RING_PACKED, False),
        ({}, {"packed": True}, uapi.VIRTIO_F_RING_PACKED, True),
        ({}, {}, uapi.VIRTIO_F_IN_ORDER, False),
        ({}, {"in_order": True}, uapi.VIRTIO_F_IN_ORDER, True),
        ({}, {}, uapi.VIRTIO_BLK_F_CONFIG_WCE, False),
        ({}, {}, uapi.VIRTIO_F_VERSION_1, True),
        ({}, {}, uapi.VIRTIO_F_ACCESS_PLATFORM, True),
    ],
)
def test_features_follow_store_and_configuration(
    store: dict[str, Any], config: dict[str, object], bit: int, offered: bool
) -> None:
    assert bool(make_device(store, **config).offered_features & bit) is offered


@pytest.mark.parametrize("engine", ["auto", "sync", "cached", "uring"])
@pytest.mark.parametrize("direct_align", [0, 512])
def test_in_order_is_offered_where_no_engine_that_is_tried_reorders(engine: str, direct_align: int) -> None:
    store = {"kind": "file", "uri": "file:disk.img", "direct_align": direct_align}
    device = make_device(store, in_order=True, engine=engine)
    spec = WorkerSpec("d0", 0, 256, 1, -1, -1, -1, store="file", engine=engine, direct_align=direct_align)
    reorders = not {"uring", "cached"}.isdisjoint(worker._engine_order(spec))
    assert bool(device.offered_features & uapi.VIRTIO_F_IN_ORDER) is not reorders


def test_zeros_that_have_to_be_written_come_in_smaller_pieces() -> None:
    slow = make_device({"zeroes_cheaply": False})
    assert slow.limits.write_zeroes_max_sectors < make_device().limits.write_zeroes_max_sectors
    assert slow.limits.write_zeroes_max_seg == 1


def test_block_smaller_than_the_stores_is_refused() -> None:
    with pytest.raises(ConfigError, match="block_size_bytes"):
        make_device({"block_size_bytes": 4096}, block_size_bytes=512)


def test_features_that_were_not_offered_are_refused() -> None:
    device = make_device()
    with pytest.raises(StatusRefusedError, match="RING_PACKED"):
        device.judge_features(device.offered_features | uapi.VIRTIO_F_RING_PACKED)


@pytest.mark.parametrize("name", ["VERSION_1", "ACCESS_PLATFORM"])
def test_features_that_the_device_cannot_do_without_are_required(name: str) -> None:
    device = make_device()
    with pytest.raises(StatusRefusedError, match=name):
        device.judge_features(device.offered_features & ~getattr(uapi, f"VIRTIO_F_{name}"))


def test_smallest_feature_set_is_served() -> None:
    make_device().judge_features(uapi.VIRTIO_F_VERSION_1 | uapi.VIRTIO_F_ACCESS_PLATFORM)


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        (0, 1, StatusChange.NOTHING),
        (1, 3, StatusChange.NOTHING),
        (3, 0xB, StatusChange.FEATURES_OK),
        (0xB, 0xF, StatusChange.DRIVER_OK),
        (0xF, 0xF, StatusChange.DRIVER_OK),
        (0xF, 0x8F, StatusChange.GAVE_UP),
        (0, 0, StatusChange.RESET),
        (0x8F, 0, StatusChange.RESET),
    ],
)
def test_status_steps_of_a_driver_are_understood(old: int, new: int, change: StatusChange) -> None:
    device = make_device()
    device.status = old
    assert device.judge_status(new) is change


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (3, 1, "takes back 0x2"),
        (0, 8, "before ACKNOWLEDGE"),
        (3, 7, "before FEATURES_OK"),
        (3, 0xF, "before FEATURES_OK"),
    ],
)
def test_status_steps_out_of_order_are_refused(old: int, new: int, why: str) -> None:
    device = make_device()
    device.status = old
    with pytest.raises(StatusRefusedError, match=why):
        device.judge_status(new)
    assert device.status == old
