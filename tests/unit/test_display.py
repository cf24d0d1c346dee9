"""The tables and lines that the commands print about devices."""

from __future__ import annotations

import pytest

from vdusefast import units
from vdusefast.cli import render


def test_table_is_aligned() -> None:
    assert render.table([["A", "BB"], ["xyz", 1], ["x", 10]], left=(0,)) == "A    BB\nxyz   1\nx    10"


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"), (1 << 60, "1024 PiB")]
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert units.size_text(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90061, "1 d 1 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert units.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("state", "failure", "queue", "shown"),
    [
        ("running", "", "running", "running"),
        ("running", "queue 0: bad", "running", "failed"),
        ("running", "", "failed", "failed"),
        ("stopping", "queue 0: bad", "failed", "stopping"),
    ],
)
def test_list_shows_what_has_failed(state: str, failure: str, queue: str, shown: str) -> None:
    info = {"name": "vd0", "state": state, "failure": failure, "queues": [{"state": "running"}, {"state": queue}]}
    assert render.list_text([info]).splitlines()[1].split()[:2] == ["vd0", shown]


def test_show_has_what_keeps_a_store_allocated() -> None:
    info = {"name": "vd0", "state": "running", "backend": "file:d", "cache": "none", "queues": []}
    for key, value, shown in (
        ("discard", "ignore", True),
        ("write_zeroes", "thick", True),
        ("discard", "unmap", False),
    ):
        assert (f", {key} {value}" in " ".join(render.show_text({**info, key: value}).split())) is shown


def test_queues_that_wait_for_their_storage_are_named() -> None:
    queues = [{"index": 0, "waiting_s": 0.0}, {"index": 1, "waiting_s": 12.3}, {"index": 2, "waiting_s": 75.0}]
    info = {"name": "vd0", "state": "running", "queues": queues}
    assert "  running, queue 1 waits 12 s, queue 2 waits 1 min 15 s  " in render.list_text([info])
    info["queues"] = [{"state": "running", **queue} for queue in queues]
    text = " ".join(render.show_text(info).split())  # it is broken into lines
    assert "queue 1 waits for its storage since 12 s; queue 2 waits for its storage since 1 min 15 s" in text


def test_show_has_what_a_kernel_device_has() -> None:
    queue = {"index": 0, "pid": 5, "cpu": 0, "irq_cpu": -1, "size": 256, "engine": "sync", "state": "failed"}
    queue |= {"poll": "always", "irq_hold": "none"}
    counters = {"requests": 10, "bytes_read": 4096, "bytes_written": 0, "errors": 2, "kicks": 3, "irqs": 4}
    text = render.show_text(
        {
            "name": "vd0",
            "state": "running",
            "bus": "virtio",
            "driver": "virtio_vdpa",
            "node": "/dev/vdb",
            "transport": "kernel",
            "api_version": 1,
            "vduse_features": ["SUSPEND"],
            "msg_timeout_s": 90,
            "bounce_size_bytes": 64 << 20,
            "memory": "the kernel's bounce pages",
            "ring": "packed, IN_ORDER",
            "offered_features": ["FLUSH", "MQ"],
            "acked_features": ["FLUSH"],
            "status": 15,
            "status_names": ["DRIVER_OK"],
            "failure": "queue 0: bad",
            "queues": [{**queue, "reason": "bad", **counters}],
        }
    )
    lines = {line.strip().split("  ")[0].strip(): line for line in text.splitlines()}
    assert lines["node"].endswith("/dev/vdb (driver virtio_vdpa)")
    assert lines["transport"].endswith("kernel, VDUSE API 1 with SUSPEND")
    assert lines["acked"].endswith("FLUSH")
    assert lines["not acked"].endswith("MQ")
    assert lines["memory"].endswith("  the kernel's bounce pages")
    assert lines["ring"].endswith("  packed, IN_ORDER")
    assert lines["limits"].endswith("messages 90 s, bounce pages 64 MiB")
    last = text.splitlines()[-1].split()
    assert last == [*"050-", "256", "sync", "always", "none", "failed:", "bad", "10", "4", "KiB", "0", "B", *"234"]


def test_stats_show_latencies_of_what_was_done() -> None:
    ops = {
        "read": {"requests": 3, "bytes": 12, "errors": 0, "latency_ns": {"p50": 1500.0, "p99": 2000.0}},
        "write": {"requests": 0, "bytes": 0, "errors": 0, "latency_ns": {"p50": 0.0, "p99": 0.0}},
    }
    queue = {"index": 0, "pid": 5, "cpu": 0, "engine": "sync", "state": "running", "reason": "", "requests": 3}
    text = render.stats_text({"queues": [{**queue, "ops": ops}], "total": {"requests": 3, "ops": ops}})
    assert text.splitlines()[0].split() == ["queue", "0", "total"]
    assert text.splitlines()[-1].split() == ["read", "3", "12", "0", "1.5", "2.0"]
