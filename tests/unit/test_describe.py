"""The lines of `show` about the path that requests take."""

from __future__ import annotations

import json

import pytest

from vdusefast.api import Device
from vdusefast.cli import render
from vdusefast.config import Config, QueueConfig, make_config
from vdusefast.control.device_info import ring_text
from vdusefast.transport import uapi
from vdusefast.transport.kernel import KernelOptions, KernelTransport

INDIRECT, EVENT_IDX, VERSION_1 = 1 << 28, 1 << 29, 1 << 32
PACKED, IN_ORDER = 1 << 34, 1 << 35


@pytest.mark.parametrize(
    ("acked_features", "text"),
    [
        (0, ""),
        (VERSION_1, "split"),
        (VERSION_1 | INDIRECT | EVENT_IDX, "split, EVENT_IDX, INDIRECT_DESC"),
        (VERSION_1 | PACKED, "packed"),
        (VERSION_1 | PACKED | IN_ORDER | EVENT_IDX, "packed, IN_ORDER, EVENT_IDX"),
    ],
)
def test_ring_format_is_told_by_the_features(acked_features: int, text: str) -> None:
    assert ring_text(acked_features) == text


def test_the_path_is_named_for_people_and_programs() -> None:
    config = make_config(name="d0", uri="null:1M", queues=2, poll_us=30, irq_delay_us=0)
    second = QueueConfig(poll_us=0, irq_delay_us=150)
    config = Config(device=config.device, backend=config.backend, queue=[config.queue[0], second])
    with Device(config) as device:
        assert device.info()["ring"] == ""  # no driver yet
        with device.driver() as driver:
            driver.write(0, bytes(512))
            info = json.loads(json.dumps(device.info()))
            stats = device.stats().to_dict()
    assert info["ring"] == "split, EVENT_IDX, INDIRECT_DESC"
    assert info["memory"] == "the driver's own"
    assert [(queue["engine"], queue["poll"], queue["irq_hold"]) for queue in info["queues"]] == [
        ("null", "adaptive, 30 us", "none"),
        ("null", "never", "up to 150 us"),
    ]
    assert [queue["cpu"] for queue in info["placement"]["queues"]] == [-1, -1]
    assert set(info["queues"][1]) == set(stats["queues"][1])
    assert stats["queues"][1]["poll"] == "never"
    text = render.show_text(info)
    assert "  ring        split, EVENT_IDX, INDIRECT_DESC\n" in text
    assert "  memory      the driver's own\n" in text
    row = next(line for line in text.splitlines() if "adaptive, 30 us" in line)
    assert row.split()[5:10] == ["null", "adaptive,", "30", "us", "none"]


def test_features_without_an_ack_have_no_ring() -> None:
    with Device(make_config(name="d0", uri="null:1M", event_idx=False, indirect=False)) as device:
        with device.driver():
            assert device.info()["ring"] == "split"
        assert device.info()["ring"] == ""


def test_memory_of_a_kernel_device_is_told_by_its_bus() -> None:
    assert KernelTransport().memory_text == "the kernel's bounce pages"
    assert KernelTransport(KernelOptions(bus="vhost")).memory_text == "the client's own"
    assert uapi.VIRTIO_RING_F_EVENT_IDX == EVENT_IDX
