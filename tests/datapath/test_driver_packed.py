"""The driver's side of a packed vq, against a device that follows VIRTIO 1.3, 2.8."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed_device import AVAIL, DESC, DISABLE, ENABLE, INDIRECT, NEXT, USED, WRITE, PackedRing
from ring_rig import RingRig

SIZE = 8
# Fresh; before the end of the ring, in the first round and in the second; and in the middle of the second
STARTS = [0x80008000, 0x80068006, 0x00060006, 0x00030003]


def packed(rig: RingRig) -> PackedRing:
    assert isinstance(rig.device, PackedRing)
    return rig.device


def all_places(size: int) -> list[int]:
    return [wrap << 31 | slot << 16 | wrap << 15 | slot for wrap in (1, 0) for slot in range(size)]


def test_descriptors_of_a_chain_lie_as_the_specification_says() -> None:
    with RingRig(SIZE) as rig:
        rig.add(16, -4096, -1)
        device = packed(rig)
        assert device.descriptor(0)[:2] == (0x1000, 16)
        assert not device.descriptor(0)[3] & (AVAIL | USED)  # held back, whatever else is there
        rig.ring.publish()
        assert device.descriptor(0)[3] == AVAIL | NEXT
        assert device.descriptor(1)[:2] + device.descriptor(1)[3:] == (0x2000, 4096, AVAIL | NEXT | WRITE)
        assert device.descriptor(2)[:2] + device.descriptor(2)[3:] == (0x3000, 1, AVAIL | WRITE)
        assert {device.descriptor(slot)[2] for slot in range(3)} == {0}  # one buffer ID


def test_flags_are_turned_round_behind_the_end_of_the_ring() -> None:
    with RingRig(SIZE, start=0x80068006) as rig:
        rig.add(16, -4096, -1)
        rig.ring.publish()
        flags = [packed(rig).descriptor(slot)[3] for slot in (6, 7, 0)]
        assert flags == [AVAIL | NEXT, AVAIL | NEXT | WRITE, USED | WRITE]
        assert rig.ring.position == 0x00010001
        rig.take(1)
        assert packed(rig).state == 0x80060001


def test_indirect_table_names_buffers_and_nothing_else() -> None:
    with RingRig(SIZE) as rig:
        rig.add(16, -4096, -1, indirect_at=0)
        rig.ring.publish()
        assert packed(rig).descriptor(0) == (rig.tables, 48, 0, AVAIL | INDIRECT)
        table = list(struct.iter_unpack("<QIHH", ctypes.string_at(rig.tables, 48)))
        assert table == [(0x1000, 16, 0, 0), (0x2000, 4096, 0, WRITE), (0x3000, 1, 0, WRITE)]


@pytest.mark.parametrize("start", STARTS)
def test_a_batch_is_shown_at_once_and_in_order(start: int) -> None:
    with RingRig(SIZE, start=start) as rig:
        wanted = [rig.add(16, -1, cookie=1), rig.add(-2, cookie=2, indirect_at=0), rig.add(7, -512, -1, cookie=3)]
        assert rig.device.pop() is None
        assert rig.ring.inflight == 0
        rig.ring.publish()
        assert rig.ring.inflight == 3
        wanted.append(rig.add(1, cookie=4))  # not shown yet
        taken = rig.take(3)
        assert [chain.buffers for chain, _ in taken] == wanted[:3]
        assert [chain.count for chain, _ in taken] == [2, 1, 3]
        assert rig.device.pop() is None
        rig.ring.publish()
        assert rig.take(1)[0][0].buffers == wanted[3]


@pytest.mark.parametrize("start", STARTS)
def test_chains_come_back_in_any_order(start: int) -> None:
    with RingRig(SIZE, start=start) as rig:
        for turn in range(10):
            for cookie, lengths in enumerate([(16, -4096, -1), (16, -1), (3,)]):
                rig.add(*lengths, cookie=10 * turn + cookie)
            rig.ring.publish()
            assert rig.ring.free_count == SIZE - 6
            first, second, third = rig.take(3)
            assert rig.reap() == []
            rig.device.push([third, first])
            assert rig.reap() == [(10 * turn + 2, 0), (10 * turn, 4097)]
            rig.device.push([second])
            assert rig.reap() == [(10 * turn + 1, 1)]
            assert rig.ring.free_count == SIZE
            assert rig.ring.inflight == 0
            assert packed(rig).state == rig.ring.position


def test_a_full_ring_takes_no_more_and_one_that_was_emptied_does() -> None:
    with RingRig(SIZE, start=0x80058005) as rig:
        for _ in range(3):
            for cookie in range(SIZE):
                rig.add(1, cookie=cookie)
            with pytest.raises(BlockingIOError):
                rig.add(1)
            with pytest.raises(BlockingIOError):
                rig.add(1, indirect_at=0)
            rig.ring.publish()
            rig.device.push(list(reversed(rig.take(SIZE))))
            assert [cookie for cookie, _ in rig.reap()] == list(reversed(range(SIZE)))
        rig.add(*[1] * SIZE)
        rig.ring.publish()
        assert rig.take(1)[0][0].count == SIZE


def test_buffer_ids_in_flight_are_different() -> None:
    with RingRig(SIZE) as rig:
        for _ in range(SIZE):
            rig.add(1)
        rig.ring.publish()
        assert sorted(chain.id for chain, _ in rig.take(SIZE)) == list(range(SIZE))


@pytest.mark.parametrize("start", [0x80088008, 0x80008001, 0x8000, 0x80000000, 0x7FFF7FFF])
def test_a_start_that_is_no_place_in_the_ring_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match="no place in the ring"):
        RingRig(SIZE, start=start)


def test_the_largest_ring() -> None:
    size = 32768
    with RingRig(size, start=0x7FFE7FFE) as rig:
        rig.add(16, -4096, -1, cookie=5)
        rig.ring.publish()
        rig.device.push(rig.take(1))
        assert rig.reap() == [(5, 4097)]
        assert rig.ring.position == 0x80018001 == packed(rig).state


# -- kicks


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize(("flags", "kicked"), [(ENABLE, True), (DISABLE, False)])
def test_kicks_are_for_those_who_want_them(event_idx: bool, flags: int, kicked: bool) -> None:
    with RingRig(SIZE, event_idx=event_idx) as rig:
        packed(rig).set_kicks(flags)
        for _ in range(3):
            rig.add(1)
            assert rig.ring.publish() is kicked
            assert rig.kicked() is kicked
            rig.device.push(rig.take(1))
            rig.reap()


@pytest.mark.parametrize("start", STARTS)
def test_a_kick_at_the_next_chain_is_the_only_one(start: int) -> None:
    with RingRig(SIZE, start=start) as rig:
        packed(rig).set_kicks(DESC)
        for turn in range(3 * SIZE):
            rig.add(1, 2)
            assert rig.ring.publish() is (turn % SIZE == 0)  # it lies behind, until the ring comes round again
            rig.device.push(rig.take(1))
            rig.reap()
            if turn % SIZE == SIZE - 1:
                packed(rig).set_kicks(DESC)


@given(
    place=st.sampled_from(all_places(SIZE)),
    event=st.sampled_from(all_places(SIZE)),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=SIZE).filter(lambda counts: sum(counts) <= SIZE),
)
def test_a_batch_kicks_when_it_passes_the_event(place: int, event: int, lengths: list[int]) -> None:
    with RingRig(SIZE, start=place) as rig:
        ctypes.c_uint32.from_address(packed(rig).device).value = DESC << 16 | event & 0xFFFF
        passed = []
        slot, wrap_counter = place & 0x7FFF, place >> 31
        for _ in range(sum(lengths)):
            passed.append(wrap_counter << 15 | slot)
            slot += 1
            if slot == SIZE:
                slot, wrap_counter = 0, wrap_counter ^ 1
        for count in lengths:
            rig.add(*[1] * count)
        assert rig.ring.publish() is (event & 0xFFFF in passed)


def test_an_event_is_nothing_that_a_device_without_event_idx_may_ask_for() -> None:
    with RingRig(SIZE, event_idx=False) as rig:
        ctypes.c_uint32.from_address(packed(rig).device).value = DESC << 16 | 0x8005
        rig.add(1)
        assert rig.ring.publish()  # one too many does no harm


# -- interrupts


@pytest.mark.parametrize("event_idx", [True, False])
def test_interrupts_are_asked_for_while_sleeping_alone(event_idx: bool) -> None:
    with RingRig(SIZE, start=0x80078007, event_idx=event_idx) as rig:
        seen: list[tuple[int, int]] = []

        def serve() -> None:
            deadline = time.monotonic() + 10
            while packed(rig).driver_event()[1] == DISABLE and time.monotonic() < deadline:
                time.sleep(0.001)
            seen.append(packed(rig).driver_event())
            rig.device.push(rig.take(1))
            if packed(rig).irq_wanted(2):
                os.eventfd_write(rig.irq_fd, 1)

        for turn in range(3):
            assert packed(rig).driver_event()[1] == DISABLE
            rig.add(16, -1, cookie=turn)
            rig.ring.publish()
            thread = threading.Thread(target=serve)
            thread.start()
            assert rig.ring.wait(10000)
            thread.join()
            assert rig.reap() == [(turn, 1)]
        assert rig.ring.counters()["irqs"] == 3
        if event_idx:
            assert seen == [(0x8007, DESC), (0x0001, DESC), (0x0003, DESC)]
        else:
            assert [flags for _off_wrap, flags in seen] == [ENABLE] * 3


def test_a_driver_does_not_sleep_over_what_has_been_finished_already() -> None:
    with RingRig(SIZE) as rig:
        rig.add(-1)
        rig.ring.publish()
        rig.device.push(rig.take(1))
        began = time.monotonic()
        assert rig.ring.wait(10000)
        assert time.monotonic() - began < 5
        rig.reap()
        assert not rig.ring.wait(1)


# -- devices that break the ring


@pytest.mark.parametrize("in_order", [False, True])
def test_a_used_descriptor_with_nothing_in_flight(in_order: bool) -> None:
    with RingRig(SIZE, in_order=in_order) as rig:
        packed(rig).write_used(0, 0)
        rig.reap_fails()
        rig.reap_fails()  # it does not go away
        assert rig.ring.free_count == SIZE


@pytest.mark.parametrize("in_order", [False, True])
def test_more_comes_back_than_is_in_flight(in_order: bool) -> None:
    with RingRig(SIZE, in_order=in_order) as rig:
        rig.add(16, -1, cookie=1)
        rig.ring.publish()
        (chain,) = rig.take(1)
        rig.device.push([chain, chain])
        assert rig.reap() == [(1, 1)]
        rig.reap_fails()


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("buffer_id", [2, 7, 8, 0x7FFF, 0xFFFF])
def test_a_buffer_id_that_is_not_in_flight(in_order: bool, buffer_id: int) -> None:
    with RingRig(SIZE, in_order=in_order) as rig:
        for cookie in range(2):
            rig.add(1, cookie=cookie)  # IDs 0 and 1
        rig.ring.publish()
        packed(rig).write_used(buffer_id, 0)
        rig.reap_fails()
        assert rig.ring.inflight == 2
        packed(rig).write_used(0, 0)  # a ring that was not made worse by it
        assert rig.reap() == [(0, 0)]


def test_a_chain_comes_back_that_was_not_shown_yet() -> None:
    with RingRig(SIZE) as rig:
        rig.add(1, cookie=1)
        packed(rig).write_used(0, 0)
        rig.reap_fails()
        rig.ring.publish()
        rig.device.push(rig.take(1))
        assert rig.reap() == [(1, 0)]


def test_a_driver_keeps_its_own_account_of_what_it_has_put_into_the_ring() -> None:
    """A device may write what it likes into descriptors of chains in flight."""
    with RingRig(SIZE) as rig:
        for cookie in range(2):
            rig.add(16, -4096, -1, cookie=cookie)
        rig.ring.publish()
        done = rig.take(2)
        for slot in range(1, 6):
            ctypes.memset(packed(rig).desc + 16 * slot, 0xFF, 14)
        rig.device.push(done)
        assert rig.reap() == [(0, 4097), (1, 4097)]
        assert rig.ring.free_count == SIZE
