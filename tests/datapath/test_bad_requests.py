"""A bad request is answered IOERR or UNSUPP and has no effect; the queue still serves."""

from __future__ import annotations

import pytest
from device_model import Params
from model import (
    F_DISCARD,
    F_WRITE_ZEROES,
    INDIRECT,
    IOERR,
    OK,
    RO,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    UNSUPP,
    WO,
    WRITE,
    Desc,
    Region,
    header,
    ranges,
    table,
)
from rig import IN_IOVA, OUT_IOVA, Rig, pattern

STATUS = Desc(OUT_IOVA, 1, WRITE)
BIG = pattern(4096, 5)


def refuse(rig: Rig, parts: list[Desc], status: int = IOERR) -> None:
    """Expect `status`, nothing else written, memory and store unchanged, and a queue that still serves."""
    memory, store = rig.memory.snapshot(), rig.store_bytes()
    bad = rig.counter("bad_requests") + rig.counter("unsupported")
    # The status counts in used.len only where nothing that was not written lies before it.
    writable = sum(part.len for part in parts if part.flags & WRITE)
    assert rig.ask(parts) == (int(writable == 1), status)
    assert rig.store_bytes() == store
    assert rig.counter("bad_requests") + rig.counter("unsupported") == bad + 1
    assert rig.counter("host_errors") == 0
    written = [p for p in parts if p.flags & WRITE and p.len][-1]
    at = written.addr + written.len - 1
    # All but rings and the status byte is untouched.
    for region, before in list(zip(rig.memory.regions, memory, strict=True))[3:]:
        if region.start <= at <= region.last:
            before[at - region.start] = status
        assert bytes(before) == rig.memory.read(region.start, region.size)
    assert rig.ask(rig.request(T_FLUSH)) == (1, OK)


@pytest.mark.parametrize("size", [0, 1, 8, 15])
def test_header_shorter_than_16_bytes(size: int) -> None:
    with Rig() as rig:
        refuse(rig, [Desc(IN_IOVA, size), STATUS])


def test_no_readable_descriptor_at_all() -> None:
    with Rig() as rig:
        refuse(rig, [STATUS])


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 17, 255, 0x8000_0000, 0xFFFF_FFFF])
def test_unknown_type_is_unsupported(kind: int) -> None:
    with Rig() as rig:
        refuse(rig, rig.request(kind), UNSUPP)
        assert rig.counter("unsupported") == 1


@pytest.mark.parametrize("missing", ["none", "empty", "readable"])
def test_missing_status(missing: str) -> None:
    tail = {"none": [], "empty": [Desc(OUT_IOVA, 0, WRITE)], "readable": [Desc(OUT_IOVA, 1)]}[missing]
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(T_OUT, 0) + BIG[:512])
        store = rig.store_bytes()
        length, _ = rig.ask([Desc(IN_IOVA, 528), *tail])
        assert length == 0
        assert rig.store_bytes() == store
        assert rig.counter("bad_requests") == 1
        assert rig.ask(rig.request(T_FLUSH)) == (1, OK)


@pytest.mark.parametrize("addr", [0, OUT_IOVA + 0x1_0000, 2**64 - 1])
def test_status_outside_the_memory(addr: int) -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(T_OUT, 0) + BIG[:512])
        store = rig.store_bytes()
        rig.ring.make_available(rig.ring.put_chain([Desc(IN_IOVA, 528), Desc(addr, 1, WRITE)]))
        assert rig.poll() == 1
        assert rig.ring.used_elem(0)[1] == 0
        assert rig.store_bytes() == store


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize("addr", [0, IN_IOVA - 512, IN_IOVA + 0x1_0000 - 511, OUT_IOVA + 0x1_0000, 2**63])
def test_data_outside_the_memory(kind: int, addr: int) -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(kind))
        refuse(rig, [Desc(IN_IOVA, 16), Desc(addr, 512, WRITE if kind == T_IN else 0), STATUS])


def test_second_segment_outside_the_memory_leaves_the_first_untouched() -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(T_IN))
        refuse(rig, [Desc(IN_IOVA, 16), Desc(OUT_IOVA + 512, 512, WRITE), Desc(0, 512, WRITE), STATUS])


def test_header_outside_the_memory() -> None:
    with Rig() as rig:
        refuse(rig, [Desc(IN_IOVA - 8, 16), STATUS])


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize(("addr", "length"), [(2**64 - 256, 512), (2**64 - 1, 0xFFFF_FE00), (IN_IOVA, 0xFFFF_FE00)])
def test_length_overflow(kind: int, addr: int, length: int) -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(kind))
        refuse(rig, [Desc(IN_IOVA, 16), Desc(addr, length, WRITE if kind == T_IN else 0), STATUS])


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_sum_of_lengths_beyond_32_bits(kind: int) -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(kind))
        part = Desc(IN_IOVA, 0xFFFF_FE00, WRITE if kind == T_IN else 0)
        refuse(rig, [Desc(IN_IOVA, 16), part, part, part, STATUS])


@pytest.mark.parametrize("sector", [2**64 - 1, 2**64 // 512, 2**64 // 512 - 1, 2**55, 2**63])
@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_sector_overflow(kind: int, sector: int) -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(kind, sector))
        data = Desc(OUT_IOVA + 512, 512, WRITE) if kind == T_IN else Desc(IN_IOVA + 16, 512)
        refuse(rig, [Desc(IN_IOVA, 16), data, STATUS])


@pytest.mark.parametrize(("sector", "sectors"), [(64, 1), (63, 2), (0, 65), (65, 1), (64, 8)])
@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_beyond_the_capacity(kind: int, sector: int, sectors: int) -> None:
    with Rig() as rig:
        payload = pattern(sectors * 512, 3) if kind == T_OUT else b""
        refuse(rig, rig.request(kind, sector, payload, 0 if payload else sectors * 512))


def test_last_sector_is_served() -> None:
    with Rig() as rig:
        assert rig.ask(rig.request(T_OUT, 63, BIG[:512])) == (1, OK)
        assert rig.ask(rig.request(T_IN, 63, b"", 512)) == (513, OK)
        assert rig.memory.read(OUT_IOVA, 512) == BIG[:512]


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize("size", [1, 511, 513, 1000])
def test_data_that_is_no_multiple_of_a_sector(kind: int, size: int) -> None:
    with Rig() as rig:
        payload = BIG[:size] if kind == T_OUT else b""
        refuse(rig, rig.request(kind, 0, payload, 0 if payload else size))


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize(("sector", "size"), [(1, 4096), (0, 512), (8, 512), (4, 4096)])
def test_misaligned_to_the_block_size(kind: int, sector: int, size: int) -> None:
    with Rig(Params(block_size=4096)) as rig:
        payload = BIG[:size] if kind == T_OUT else b""
        refuse(rig, rig.request(kind, sector, payload, 0 if payload else size))


def test_wrong_direction_of_the_data_of_a_read() -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(T_IN))
        refuse(rig, [Desc(IN_IOVA, 16), Desc(OUT_IOVA + 512, 512), STATUS])


def test_wrong_direction_of_the_data_of_a_write() -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(T_OUT) + BIG[:512])
        refuse(rig, [Desc(IN_IOVA, 16), Desc(OUT_IOVA + 512, 512, WRITE), STATUS])


def test_wrong_direction_of_the_header() -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(T_IN))
        refuse(rig, [Desc(IN_IOVA, 16, WRITE), STATUS])


def test_readable_behind_writable() -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(T_OUT) + BIG[:512])
        refuse(rig, [Desc(IN_IOVA, 16), STATUS, Desc(IN_IOVA + 16, 512)])


@pytest.mark.parametrize(("kind", "perm"), [(T_IN, RO), (T_OUT, WO)])
def test_permission_denied_for_data(kind: int, perm: int) -> None:
    with Rig(regions=[Region(IN_IOVA, 4096), Region(OUT_IOVA, 4096), Region(0x9000_0000, 4096, perm)]) as rig:
        rig.memory.write(IN_IOVA, header(kind))
        refuse(rig, [Desc(IN_IOVA, 16), Desc(0x9000_0000, 512, WRITE if kind == T_IN else 0), STATUS])


def test_permission_denied_for_the_header() -> None:
    with Rig(regions=[Region(IN_IOVA, 4096, WO), Region(OUT_IOVA, 4096)]) as rig:
        rig.memory.write(IN_IOVA, header(T_FLUSH))
        memory = rig.memory.read(IN_IOVA, 4096)
        assert rig.ask([Desc(IN_IOVA, 16), STATUS]) == (1, IOERR)
        assert rig.memory.read(IN_IOVA, 4096) == memory


def test_permission_denied_for_the_status() -> None:
    with Rig(regions=[Region(IN_IOVA, 4096), Region(OUT_IOVA, 4096, RO)]) as rig:
        rig.memory.write(IN_IOVA, header(T_OUT) + BIG[:512])
        store = rig.store_bytes()
        rig.ring.make_available(rig.ring.put_chain([Desc(IN_IOVA, 528), STATUS]))
        assert rig.poll() == 1
        assert rig.ring.used_elem(0)[1] == 0
        assert rig.memory.read(OUT_IOVA, 1) == b"\0"
        assert rig.store_bytes() == store


def test_zero_length_segments_count_for_nothing() -> None:
    with Rig() as rig:
        rig.memory.write(IN_IOVA, header(T_IN, 1))
        empty_in, empty_out = Desc(0, 0), Desc(2**64 - 1, 0, WRITE)
        data = [Desc(OUT_IOVA, 100, WRITE), empty_out, Desc(OUT_IOVA + 100, 412, WRITE)]
        parts = [empty_in, Desc(IN_IOVA, 7), empty_in, Desc(IN_IOVA + 7, 9), empty_out, *data]
        length, _ = rig.ask([*parts, Desc(OUT_IOVA + 1000, 1, WRITE), empty_out])
        assert (length, rig.memory.read(OUT_IOVA + 1000, 1)) == (513, b"\0")
        assert rig.memory.read(OUT_IOVA, 512) == pattern(1024)[512:]


def test_empty_read_and_empty_write_are_ok() -> None:
    with Rig() as rig:
        assert rig.ask(rig.request(T_IN, 3)) == (1, OK)
        assert rig.ask(rig.request(T_OUT, 64)) == (1, OK)
        refuse(rig, rig.request(T_IN, 65))


@pytest.mark.parametrize("kind", [T_OUT, T_DISCARD, T_WRITE_ZEROES])
def test_write_to_a_read_only_device(kind: int) -> None:
    with Rig(Params(read_only=True)) as rig:
        refuse(rig, rig.request(kind, 0, BIG[:512] if kind == T_OUT else ranges((0, 8, 0))))
        assert rig.ask(rig.request(T_IN, 0, b"", 512)) == (513, OK)


def test_get_id_without_room() -> None:
    with Rig() as rig:
        refuse(rig, rig.request(T_GET_ID))


@pytest.mark.parametrize("flags", [1, 2, 0x8000_0000])
def test_discard_with_a_flag_is_unsupported(flags: int) -> None:
    with Rig() as rig:
        refuse(rig, rig.request(T_DISCARD, 0, ranges((0, 8, 0), (8, 8, flags))), UNSUPP)


@pytest.mark.parametrize("flags", [2, 3, 0x8000_0001])
def test_write_zeroes_with_an_unknown_flag_is_unsupported(flags: int) -> None:
    with Rig() as rig:
        refuse(rig, rig.request(T_WRITE_ZEROES, 0, ranges((0, 8, 1), (8, 8, flags))), UNSUPP)


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes(15),
        bytes(17),
        ranges(*[(0, 8, 0)] * 3),  # more segments than the device takes
        ranges((0, 8, 0), (60, 8, 0)),  # the second is beyond the end
        ranges((0, 8, 0), (2**64 - 1, 8, 0)),
        ranges((0, 8, 0), (0, 17, 0)),  # more sectors than the device takes
        ranges((0, 8, 0), (0, 0xFFFF_FFFF, 0)),
        ranges((0, 8, 0), (8, 4, 0)),  # not a block
        ranges((0, 8, 0), (9, 8, 0)),
    ],
)
def test_bad_ranges_have_no_partial_effect(kind: int, payload: bytes) -> None:
    what = Params(
        block_size=4096,
        discard_max_seg=2,
        write_zeroes_max_seg=2,
        discard_max_sectors=16,
        write_zeroes_max_sectors=16,
    )
    with Rig(what) as rig:
        refuse(rig, rig.request(kind, 0, payload))


@pytest.mark.parametrize(("kind", "feature"), [(T_DISCARD, F_DISCARD), (T_WRITE_ZEROES, F_WRITE_ZEROES)])
def test_ranges_without_the_feature_are_unsupported(kind: int, feature: int) -> None:
    with Rig(Params(features=Params.features & ~feature)) as rig:
        refuse(rig, rig.request(kind, 0, ranges((0, 8, 0))), UNSUPP)


def test_several_ranges_take_effect() -> None:
    with Rig() as rig:
        assert rig.ask(rig.request(T_WRITE_ZEROES, 0, ranges((1, 1, 0), (4, 0, 0), (8, 8, 1)))) == (1, OK)
        zeroed = bytearray(pattern(64 * 512))
        zeroed[512:1024] = bytes(512)
        zeroed[4096:8192] = bytes(4096)
        assert rig.store_bytes() == zeroed


def test_more_pieces_than_a_request_can_have() -> None:
    """seg_max 1 allows few iovecs; a driver that does not keep to it gets an error, not an overrun."""
    with Rig(Params(seg_max=1)) as rig:
        rig.memory.write(IN_IOVA, header(T_IN))
        scattered = [Desc(OUT_IOVA + 1024 + 64 * i, 32, WRITE) for i in range(16)]
        parts = [Desc(IN_IOVA, 16), *scattered, STATUS]
        rig.memory.write(IN_IOVA + 0x4000, table(parts))
        rig.ring.make_available(rig.ring.put_chain([Desc(IN_IOVA + 0x4000, 16 * len(parts), INDIRECT)]))
        assert rig.poll() == 1
        assert rig.ring.used_elem(0)[1] == 0
        assert rig.memory.read(OUT_IOVA, 1) == bytes([IOERR])


@pytest.mark.parametrize("kind", [T_OUT, T_DISCARD, T_WRITE_ZEROES])
def test_header_and_ranges_in_single_bytes_are_served(kind: int) -> None:
    """Cut in any way, whatever seg_max: that limit is one of data (VIRTIO 1.3, 2.7.4)."""
    payload = pattern(512, 8) if kind == T_OUT else ranges((1, 1, 0), (2, 1, 0))
    with Rig(Params(seg_max=1)) as rig:
        whole = header(kind, 1) + payload
        single = 16 if kind == T_OUT else len(whole)
        parts = [Desc(IN_IOVA + 64 * i, 1) for i in range(single)]
        for part, byte in zip(parts, whole, strict=False):
            rig.memory.write(part.addr, bytes([byte]))
        if kind == T_OUT:
            rig.memory.write(IN_IOVA + 0x2000, payload)
            parts.append(Desc(IN_IOVA + 0x2000, 512))
        parts.append(STATUS)
        rig.memory.write(IN_IOVA + 0x4000, table(parts))
        rig.ring.make_available(rig.ring.put_chain([Desc(IN_IOVA + 0x4000, 16 * len(parts), INDIRECT)]))
        assert rig.poll() == 1
        assert rig.memory.read(OUT_IOVA, 1) == bytes([OK])
        stored = rig.store_bytes()
        assert stored[512:1024] == (pattern(512, 8) if kind == T_OUT else bytes(512))
