"""A broken ring stops its queue with a named reason, and nothing else happens."""

from __future__ import annotations

import pytest
from device_model import Params
from model import (
    F_INDIRECT,
    F_PACKED,
    INDIRECT,
    NEXT,
    OK,
    RO,
    RW,
    T_FLUSH,
    T_IN,
    T_OUT,
    WO,
    WRITE,
    Desc,
    Reason,
    Region,
    table,
)
from rig import IN_IOVA, OUT_IOVA, RING_IOVA, Rig, pattern

from vdusefast.worker._datapath import Queue, RingError

TABLE = IN_IOVA + 0x8000


def fail(rig: Rig, head: int) -> Reason:
    """Make a head available, expect failure without a used entry; the reason."""
    before, store = rig.ring.used_idx, rig.store_bytes()
    rig.ring.make_available(head)
    reason = rig.break_ring()
    assert rig.ring.used_idx == before
    assert rig.store_bytes() == store
    return reason


def test_loop_of_two_descriptors() -> None:
    with Rig() as rig:
        rig.ring.put_desc(0, Desc(IN_IOVA, 16, NEXT, 1))
        rig.ring.put_desc(1, Desc(IN_IOVA, 16, NEXT, 0))
        assert fail(rig, 0) == Reason.CHAIN_TOO_LONG


def test_descriptor_that_is_its_own_next() -> None:
    with Rig(size=2, params=Params(queue_size_max=2)) as rig:
        rig.ring.put_desc(1, Desc(IN_IOVA, 16, NEXT, 1))
        assert fail(rig, 1) == Reason.CHAIN_TOO_LONG


def test_loop_in_an_indirect_table() -> None:
    with Rig() as rig:
        rig.memory.write(TABLE, Desc(IN_IOVA, 16, NEXT, 1).pack() + Desc(IN_IOVA, 16, NEXT, 0).pack())
        assert fail(rig, rig.ring.put_chain([Desc(TABLE, 32, INDIRECT)])) == Reason.CHAIN_TOO_LONG


def test_indirect_chain_longer_than_the_queue() -> None:
    with Rig(Params(queue_size_max=16, seg_max=4)) as rig:
        parts = [Desc(IN_IOVA, 1)] * 17
        rig.memory.write(TABLE, table(parts))
        assert fail(rig, rig.ring.put_chain([Desc(TABLE, 16 * 17, INDIRECT)])) == Reason.CHAIN_TOO_LONG


def test_direct_descriptors_and_table_together_longer_than_the_queue() -> None:
    with Rig(Params(queue_size_max=16, seg_max=4)) as rig:
        rig.memory.write(TABLE, table([Desc(IN_IOVA, 1)] * 10))
        direct = [Desc(IN_IOVA, 1)] * 7
        assert fail(rig, rig.ring.put_chain([*direct, Desc(TABLE, 160, INDIRECT)])) == Reason.CHAIN_TOO_LONG


def test_chain_of_the_whole_queue_is_served() -> None:
    with Rig() as rig:
        parts = [*[Desc(IN_IOVA, 0)] * 14, *rig.request(T_FLUSH)]
        assert rig.ask(parts) == (1, OK)


def test_indirect_in_indirect() -> None:
    with Rig() as rig:
        rig.memory.write(TABLE, table([Desc(IN_IOVA, 16), Desc(TABLE + 64, 16, INDIRECT)]))
        assert fail(rig, rig.ring.put_chain([Desc(TABLE, 32, INDIRECT)])) == Reason.INDIRECT_NESTED


@pytest.mark.parametrize("size", [0, 8, 15, 17, 33, 16 * 32769, 0xFFFF_FFF0])
def test_indirect_of_odd_size(size: int) -> None:
    with Rig() as rig:
        rig.memory.write(TABLE, table(rig.request(T_FLUSH)))
        assert fail(rig, rig.ring.put_chain([Desc(TABLE, size, INDIRECT)])) == Reason.INDIRECT_SIZE


def test_next_with_indirect() -> None:
    with Rig() as rig:
        rig.memory.write(TABLE, table(rig.request(T_FLUSH)))
        rig.ring.put_desc(0, Desc(TABLE, 32, INDIRECT | NEXT, 1))
        assert fail(rig, 0) == Reason.INDIRECT_NEXT


def test_indirect_without_the_feature() -> None:
    with Rig(Params(features=Params.features & ~F_INDIRECT)) as rig:
        rig.memory.write(TABLE, table(rig.request(T_FLUSH)))
        assert fail(rig, rig.ring.put_chain([Desc(TABLE, 32, INDIRECT)])) == Reason.INDIRECT_NOT_OFFERED


def test_write_flag_of_an_indirect_descriptor_is_ignored() -> None:
    with Rig() as rig:
        rig.memory.write(TABLE, table(rig.request(T_FLUSH)))
        rig.ring.make_available(rig.ring.put_chain([Desc(TABLE, 32, INDIRECT | WRITE)]))
        assert rig.poll() == 1
        assert rig.ring.used_elem(0) == (0, 1)


@pytest.mark.parametrize("iova", [0, IN_IOVA + 0x1_0000 - 16, 2**64 - 16, 2**64 - 32])
def test_indirect_table_outside_the_memory(iova: int) -> None:
    with Rig() as rig:
        parts = [Desc(IN_IOVA, 16), Desc(OUT_IOVA, 1, WRITE)]
        rig.memory.write(iova, table(parts))
        assert fail(rig, rig.ring.put_chain([Desc(iova, 32, INDIRECT)])) == Reason.INDIRECT_UNMAPPED


def test_indirect_table_without_read_permission() -> None:
    with Rig(regions=[Region(IN_IOVA, 4096), Region(OUT_IOVA, 4096, WO)]) as rig:
        rig.memory.write(OUT_IOVA, table(rig.request(T_FLUSH)))
        assert fail(rig, rig.ring.put_chain([Desc(OUT_IOVA, 32, INDIRECT)])) == Reason.INDIRECT_UNMAPPED


@pytest.mark.parametrize("start_idx", [0, 65535])
@pytest.mark.parametrize("ahead", [17, 256, 32768, 65535])
def test_avail_index_running_ahead(start_idx: int, ahead: int) -> None:
    with Rig(start_idx=start_idx) as rig:
        rig.ring.put_u16(rig.ring.avail + 2, start_idx + ahead)
        assert rig.break_ring() == Reason.AVAIL_OVERRUN
        assert rig.ring.used_idx == start_idx


def test_avail_index_going_backwards() -> None:
    with Rig() as rig:
        assert rig.ask(rig.request(T_FLUSH)) == (1, OK)
        rig.ring.put_u16(rig.ring.avail + 2, 0)
        assert rig.break_ring() == Reason.AVAIL_OVERRUN


def test_avail_index_a_whole_queue_ahead_is_served() -> None:
    with Rig(start_idx=65530) as rig:
        parts = rig.request(T_FLUSH)
        heads = [rig.ring.put_chain(parts) for _ in range(8)]
        for head in heads:
            rig.ring.make_available(head)
        assert rig.poll() == 8
        assert [rig.ring.used_elem(65530 + i)[0] for i in range(8)] == heads


@pytest.mark.parametrize("head", [16, 17, 255, 65535])
def test_head_out_of_range(head: int) -> None:
    with Rig() as rig:
        assert fail(rig, head) == Reason.HEAD_RANGE


@pytest.mark.parametrize("following", [16, 255, 65535])
def test_next_out_of_range(following: int) -> None:
    with Rig() as rig:
        rig.ring.put_desc(3, Desc(IN_IOVA, 16, NEXT, following))
        assert fail(rig, 3) == Reason.NEXT_RANGE


def test_next_out_of_range_of_an_indirect_table() -> None:
    with Rig() as rig:
        rig.memory.write(TABLE, Desc(IN_IOVA, 16, NEXT, 2).pack() + Desc(OUT_IOVA, 1, WRITE).pack())
        assert fail(rig, rig.ring.put_chain([Desc(TABLE, 32, INDIRECT)])) == Reason.NEXT_RANGE


def test_head_that_is_in_flight_is_made_available_again() -> None:
    with Rig() as rig:
        head = rig.ring.put_chain(rig.request(T_OUT, 0, pattern(512, 7)))
        rig.ring.make_available(head)
        rig.ring.make_available(head)
        assert rig.break_ring() == Reason.HEAD_BUSY
        # The first was taken and is answered; the second is not.
        assert rig.ring.used_idx == 1
        assert rig.ring.used_elem(0) == (head, 1)


def test_head_may_be_used_again_once_it_was_given_back() -> None:
    with Rig() as rig:
        head = rig.ring.put_chain(rig.request(T_FLUSH))
        for _ in range(3):
            rig.ring.make_available(head)
            assert rig.poll() == 1
        assert rig.ring.used_idx == 3


def test_chains_ahead_of_a_broken_one_are_answered() -> None:
    with Rig() as rig:
        good = rig.ring.put_chain(rig.request(T_OUT, 2, pattern(512, 3)))
        rig.ring.make_available(good)
        rig.ring.make_available(16)
        assert rig.break_ring() == Reason.HEAD_RANGE
        assert rig.ring.used_idx == 1
        assert rig.store_bytes()[1024:1536] == pattern(512, 3)


@pytest.mark.parametrize("area", [0, 1, 2])
def test_ring_area_not_mapped(area: int) -> None:
    with Rig(start=False) as rig:
        rig.queue.invalidate(RING_IOVA + area * 0x10_0000, RING_IOVA + area * 0x10_0000)
        with pytest.raises(RingError, match="not mapped"):
            rig.start()


@pytest.mark.parametrize("perms", [(WO, RO, RW), (RO, WO, RW), (RO, RO, RO), (RO, RO, WO)])
def test_ring_area_without_its_permissions(perms: tuple[int, int, int]) -> None:
    with Rig(start=False, ring_perms=perms) as rig, pytest.raises(RingError, match="not mapped"):
        rig.start()


@pytest.mark.parametrize(("desc", "avail", "used"), [(8, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 2), (0, 0, 1)])
def test_ring_area_misaligned(desc: int, avail: int, used: int) -> None:
    with Rig(start=False) as rig:
        rig.ring.desc += desc
        rig.ring.avail += avail
        rig.ring.used += used
        with pytest.raises(RingError, match="not aligned"):
            rig.start()


def test_ring_area_reaching_beyond_its_region() -> None:
    with Rig(start=False) as rig:
        rig.ring.desc += 16
        with pytest.raises(RingError, match="not mapped"):
            rig.start()


def test_ring_area_at_the_end_of_the_address_space() -> None:
    with Rig(start=False) as rig:
        rig.ring.desc = 2**64 - 16
        with pytest.raises(RingError, match="not mapped"):
            rig.start()


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_packed_ring_of_any_size_is_served_for_some_laps(size: int) -> None:
    with Rig(Params(queue_size_max=16, features=Params.features | F_PACKED), size=size) as rig:
        parts = rig.request(T_FLUSH)
        rig.memory.write(TABLE, table(parts))
        chain = parts if size > len(parts) else [Desc(TABLE, 16 * len(parts), INDIRECT)]
        for _ in range(5 * size + 2):
            head = rig.ring.put_chain(chain)
            rig.ring.make_available(head)
            assert rig.poll() == 1
            ((answered, _),) = rig.ring.reap(in_order=False)
            assert answered == head


def test_split_ring_of_one_descriptor_is_served() -> None:
    with Rig(size=1) as rig:
        parts = rig.request(T_FLUSH)
        rig.memory.write(TABLE, table(parts))
        for _ in range(3):
            head = rig.ring.put_chain([Desc(TABLE, 16 * len(parts), INDIRECT)])
            rig.ring.make_available(head)
            assert rig.poll() == 1
            assert rig.ring.reap(in_order=False) == [(0, 1)]


def test_chain_of_a_whole_ring_that_is_larger_than_offered_is_served() -> None:
    with Rig(Params(queue_size_max=8, seg_max=4), size=256) as rig:
        assert rig.ask([*[Desc(IN_IOVA, 0)] * 254, *rig.request(T_FLUSH)]) == (1, OK)
        rig.ring.reap(in_order=False)
        rig.ring.put_desc(0, Desc(IN_IOVA, 0, NEXT, 0))
        assert fail(rig, 0) == Reason.CHAIN_TOO_LONG


@pytest.mark.parametrize("size", [0, 3, 24, 65536])
def test_queue_size_that_is_not_allowed(size: int) -> None:
    with Rig(start=False) as rig:
        rig.ring.size = size
        with pytest.raises((OSError, RingError)):
            rig.start()


def test_ring_areas_gone_after_an_invalidation() -> None:
    with Rig() as rig:
        assert rig.ask(rig.request(T_FLUSH)) == (1, OK)
        assert rig.queue.invalidate(rig.ring.used, rig.ring.used) == 1
        rig.ring.make_available(rig.ring.put_chain(rig.request(T_FLUSH)))
        for _ in range(3):  # nothing is touched, and nothing has failed: the driver may be changing its map
            assert rig.queue.poll() == 0
        assert rig.queue.failure == ""
        assert rig.counter("requests") == 1
        for region in rig.memory.regions:
            if region.start <= rig.ring.used <= region.last:
                rig.map(region)
        assert rig.queue.poll() == 1
        assert rig.counter("requests") == 2


def test_ring_areas_mapped_again_after_an_invalidation() -> None:
    with Rig() as rig:
        assert rig.ask(rig.request(T_FLUSH)) == (1, OK)
        assert rig.queue.invalidate(0, 2**64 - 1) == len(rig.memory.regions)
        assert rig.queue.region_count == 0
        for region in rig.memory.regions:
            rig.map(region)
        assert rig.ask(rig.request(T_IN, 1, b"", 512)) == (513, OK)
        assert rig.memory.read(OUT_IOVA, 512) == pattern(1024)[512:]


def test_failed_queue_starts_again_once_the_driver_has_reset_it() -> None:
    with Rig() as rig:
        assert fail(rig, 99) == Reason.HEAD_RANGE
        rig.ring.avail_idx = 0
        rig.ring.put_u16(rig.ring.avail + 2, 0)
        rig.start()
        assert rig.queue.failure == ""
        assert rig.reason == Reason.NONE
        assert rig.ask(rig.request(T_FLUSH)) == (1, OK)


def test_queue_refuses_to_poll_before_it_is_started() -> None:
    with Rig(start=False) as rig:
        queue: Queue = rig.queue
        with pytest.raises(ValueError, match="not started"):
            queue.poll()
