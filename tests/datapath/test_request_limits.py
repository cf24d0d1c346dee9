"""A request is held to what the driver was told, and a reset does not wait for many large ones."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from device_model import Params
from model import F_INDIRECT, IOERR, OK, T_IN, T_OUT, WRITE, Desc, Region, header
from rig import IN_IOVA, OUT_IOVA, Rig, file_engines

import vdusefast

KIB, MIB = 1 << 10, 1 << 20
F_SIZE_MAX, F_SEG_MAX = 1 << 1, 1 << 2
BOTH = F_SIZE_MAX | F_SEG_MAX
SEG_MAX, SIZE_MAX = 4, 16 * KIB

pytestmark = pytest.mark.timeout(120)


def limited(features: int, **options: object) -> Rig:
    """A device that offers requests of 4 segments of 16 KiB, to a driver that has acknowledged `features`."""
    params = Params(capacity_sectors=1024, seg_max=SEG_MAX, features=F_INDIRECT | 1 << 9 | features)
    regions = [Region(IN_IOVA, MIB // 2), Region(OUT_IOVA, MIB // 2)]
    return Rig(params, size=64, regions=regions, size_max_bytes=SIZE_MAX, **options)


def cut(at: int, pieces: list[int], flags: int) -> list[Desc]:
    found = []
    for size in pieces:
        found.append(Desc(at, size, flags))
        at += size
    return found


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize(
    ("features", "pieces", "status"),
    [
        (BOTH, [SIZE_MAX] * SEG_MAX, OK),
        (BOTH, [SIZE_MAX // 2] * 2 * SEG_MAX, OK),  # more segments, of which no driver sends too many bytes
        (BOTH, [SIZE_MAX * SEG_MAX], OK),
        (BOTH, [SIZE_MAX] * SEG_MAX + [512], IOERR),
        (BOTH, [SIZE_MAX * SEG_MAX + 512], IOERR),  # by the fast path, for which the first request is the model
        (F_SIZE_MAX, [SIZE_MAX * SEG_MAX + 512], OK),
        (0, [SIZE_MAX * SEG_MAX * 2], OK),  # as EDK2, which knows of no limit
    ],
)
def test_total_of_a_request(kind: int, features: int, pieces: list[int], status: int) -> None:
    with limited(features) as rig:
        rig.memory.write(IN_IOVA, header(kind, 0))
        total = sum(pieces)
        for size in ([512], pieces):
            if kind == T_IN:
                data, last = cut(OUT_IOVA, size, WRITE), Desc(OUT_IOVA + total, 1, WRITE)
            else:
                data, last = cut(IN_IOVA + 512, size, 0), Desc(OUT_IOVA, 1, WRITE)
            rig.memory.write(last.addr, b"\xff")
            answer = rig.ask([Desc(IN_IOVA, 16), *data, last])
        assert answer[1] == status
        assert rig.counter("bad_requests") == (status == IOERR)


BIG = 2 * MIB
INFLIGHT_BYTES_MAX = 32 * MIB


def big_rig(engine: str, **options: object) -> Rig:
    params = Params(capacity_sectors=BIG // 512, seg_max=SEG_MAX, features=F_INDIRECT | 1 << 9)
    return Rig(
        params, size=256, engine=engine, regions=[Region(IN_IOVA, MIB), Region(2 * OUT_IOVA, 2 * BIG)], **options
    )


def offer_reads(rig: Rig, count: int, size: int) -> None:
    rig.memory.write(IN_IOVA, header(T_IN, 0))
    for _ in range(count):
        parts = [Desc(IN_IOVA, 16), Desc(2 * OUT_IOVA, size, WRITE), Desc(2 * OUT_IOVA + BIG, 1, WRITE)]
        rig.ring.make_available(rig.ring.put_chain(parts))


@pytest.mark.parametrize("engine", ["memory", "sync"])
def test_a_big_request_ends_its_round(engine: str) -> None:
    """So that the control word is looked at before the next one."""
    with big_rig(engine) as rig:
        offer_reads(rig, 20, BIG)
        assert [rig.queue.poll() for _ in range(3)] == [1, 1, 1]
        assert rig.counter("requests") == 3


@pytest.mark.parametrize(("engine", "batch"), [("memory", 8), ("sync", 4)])
def test_a_message_ends_the_round(engine: str, batch: int) -> None:
    """A message to a worker does not wait for the rest of the round."""
    with big_rig(engine) as rig:
        offer_reads(rig, 60, 4 * KIB)
        rig.pages[0:4] = (1).to_bytes(4, "little")  # vf_shm_ctl.ctl_seq
        assert rig.queue.poll() == batch
        rig.queue.control_seen()
        assert rig.queue.poll() == 60 - batch


@pytest.mark.skipif("uring" not in file_engines(), reason="this kernel refuses io_uring")
def test_bytes_in_flight_are_bounded() -> None:
    """A reset waits for all that is in flight."""
    with big_rig("uring") as rig:
        offer_reads(rig, 80, 512 * KIB)
        assert rig.queue.poll() == INFLIGHT_BYTES_MAX // (512 * KIB)
        deadline = time.monotonic() + 60
        while rig.counter("requests") < 80 and time.monotonic() < deadline:
            rig.queue.poll()
            assert rig.queue.inflight_count <= INFLIGHT_BYTES_MAX // (512 * KIB)
        assert rig.counter("requests") == 80
        assert rig.counter("bad_requests") == 0


def test_reset_in_the_midst_of_requests_that_are_too_large() -> None:
    """64 reads of 64 MiB each, eight times what the driver was told."""
    config = vdusefast.make_config(name="reset", uri="memory:64M", seg_max=64)
    with vdusefast.Device(config) as device, device.driver() as driver:
        head, data, tables, ring = (
            driver.add_region(8192),
            driver.add_region(MIB),
            driver.add_region(64 * 2048),
            driver.ring(0),
        )
        for i in range(64):
            struct.pack_into("<IIQ", head.buf, 64 * i, T_IN, 0, 0)
            head.buf[64 * i + 32] = 0xFF
            chain = [
                (head.iova + 64 * i, 16, False),
                *[(data.iova, MIB, True)] * 64,
                (head.iova + 64 * i + 32, 1, True),
            ]
            ring.add_indirect(chain, tables.address + 2048 * i, tables.iova + 2048 * i, i)
        ring.publish()
        ring.kick()
        answered = 0
        deadline = time.monotonic() + 60
        while answered < 64 and time.monotonic() < deadline:
            ring.wait(100)
            answered += len(ring.reap())
        assert [head.buf[64 * i + 32] for i in range(64)] == [IOERR] * 64
        driver.bus.set_status(0)
        assert device.failure is None


SLEEPER = """
import time
import vdusefast


class Disk(vdusefast.Backend):
    size_bytes = 1 << 20
    shareable = {shareable}

    def pread(self, buffer, offset_bytes):
        time.sleep(60 if offset_bytes else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("store", ["class", "relay", "file"])
def test_reset_does_not_wait_for_the_requests_that_it_ends(store: str, tmp_path: Path) -> None:
    """No driver waits for them after a reset, and one request may be as large, or its storage as slow, as it likes."""
    if store == "file":
        (tmp_path / "disk").write_bytes(bytes(MIB))
        uri = f"faulty:op=read,delay=60s,skip=1:file:{tmp_path}/disk"
    else:
        (tmp_path / "disk.py").write_text(SLEEPER.format(shareable=store == "class"))
        uri = f"python:{tmp_path}/disk.py:Disk"
    config = vdusefast.make_config(name="reset", uri=uri, queues=2)
    with vdusefast.Device(config) as device, device.driver() as driver:
        assert len(driver.read(0, 512)) == 512
        head, data, ring = driver.add_region(4096), driver.add_region(4096), driver.ring(0)
        struct.pack_into("<IIQ", head.buf, 0, T_IN, 0, 8)
        head.buf[32] = 0xFF
        ring.add([(head.iova, 16, False), (data.iova, 4096, True), (head.iova + 32, 1, True)], 0)
        ring.publish()
        ring.kick()
        deadline = time.monotonic() + 30
        while device.stats().queues[0].requests < 1 or not device._pages.has_inflight(0):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        began = time.monotonic()
        driver.bus.set_status(0)
        took_s = time.monotonic() - began
        assert took_s < 8  # 0.75 s, and the end of a process; it was 10 s and that
        assert head.buf[32] == 0xFF
        assert device.failure is None
        assert device.queues()[0].restarts == 1
