"""VIRTIO_F_IN_ORDER as the driver sees it (VIRTIO 1.3, 2.7.9 and 2.8.9), and both formats against every schedule."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ring_rig import TABLES_MAX, RingRig, SplitRing, Taken

SIZE = 8
FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
LENGTHS = [(16, -4096, -1), (16, -1), (16, 512, -1)]
WRITABLE = [4097, 1, 1]


def start_of(packed: bool, slot: int) -> int:
    """Return a place `slot` after the beginning, in the second round of a packed ring."""
    return slot * 0x10001 if packed else slot


def shown(rig: RingRig, count: int) -> list[Taken]:
    """Add and show chains with the cookies 0, 1, ...; return them as the device has them."""
    for cookie in range(count):
        rig.add(*LENGTHS[cookie % 3], cookie=cookie)
    rig.ring.publish()
    return rig.take(count)


@FORMATS
@pytest.mark.parametrize("slot", [0, 5, 7])
def test_one_element_gives_back_a_batch(packed: bool, slot: int) -> None:
    with RingRig(SIZE, packed=packed, in_order=True, start=start_of(packed, slot)) as rig:
        for _ in range(10):
            rig.device.push_batch(shown(rig, 3))
            assert rig.reap() == list(enumerate(WRITABLE))
            assert (rig.ring.free_count, rig.ring.inflight) == (SIZE, 0)


@FORMATS
def test_the_last_of_a_batch_has_the_length_that_the_device_says(packed: bool) -> None:
    with RingRig(SIZE, packed=packed, in_order=True) as rig:
        first, second, third = shown(rig, 3)
        rig.device.push_batch([first, (second[0], 77)])
        assert rig.reap() == [(0, 4097), (1, 77)]
        rig.device.push_batch([(third[0], 0)])
        assert rig.reap() == [(2, 0)]


@FORMATS
def test_every_buffer_may_have_its_own_element(packed: bool) -> None:
    with RingRig(SIZE, packed=packed, in_order=True, start=start_of(packed, 3)) as rig:
        for _ in range(10):
            rig.device.push(shown(rig, 3))
            assert rig.reap() == list(enumerate(WRITABLE))


@FORMATS
def test_batches_of_several_sizes_follow_each_other(packed: bool) -> None:
    with RingRig(16, packed=packed, in_order=True, start=start_of(packed, 13)) as rig:
        for _ in range(10):
            taken = shown(rig, 5)
            rig.device.push_batch(taken[:2])
            rig.device.push_batch(taken[2:3])
            assert [cookie for cookie, _ in rig.reap()] == [0, 1, 2]
            rig.device.push_batch(taken[3:])
            assert [cookie for cookie, _ in rig.reap()] == [3, 4]


@FORMATS
def test_more_than_a_reap_takes_at_once(packed: bool) -> None:
    with RingRig(256, packed=packed, in_order=True, start=start_of(packed, 200)) as rig:
        for cookie in range(200):
            rig.add(-1, cookie=cookie)
        rig.ring.publish()
        rig.device.push_batch(rig.take(200))
        assert rig.reap() == [(cookie, 1) for cookie in range(200)]


@FORMATS
def test_indirect_chains_are_skipped_as_any(packed: bool) -> None:
    with RingRig(SIZE, packed=packed, in_order=True) as rig:
        for cookie in range(SIZE):
            rig.add(16, -100 * cookie, -1, cookie=cookie, indirect_at=cookie)
        rig.ring.publish()
        rig.device.push_batch(rig.take(SIZE))
        assert rig.reap() == [(cookie, 100 * cookie + 1) for cookie in range(SIZE)]


def test_descriptors_of_a_split_ring_are_used_in_their_order() -> None:
    """As VIRTIO 1.3, 2.7.5.1 asks of a driver with IN_ORDER: next is the following descriptor, and 0 after the last."""
    with RingRig(SIZE, packed=False, in_order=True) as rig:
        heads = []
        for _ in range(4):
            taken = shown(rig, 2)
            heads += [chain.id for chain, _ in taken]
            rig.device.push_batch(taken)
            rig.reap()
            assert isinstance(rig.device, SplitRing)
            for slot in range(SIZE):
                flags, following = (ctypes.c_uint16 * 2).from_address(rig.device.desc + 16 * slot + 12)
                assert not flags & 1 or following == (slot + 1) % SIZE
        assert heads == [0, 3, 5, 0, 2, 5, 7, 2]


# -- devices that answer out of order


def test_split_device_that_answers_out_of_order() -> None:
    with RingRig(SIZE, packed=False, in_order=True) as rig:
        first, second, _third = shown(rig, 3)
        rig.device.push([second])  # one index on, and the second chain
        rig.reap_fails()
        assert rig.ring.inflight == 3
        rig.device.write_used(first[0].id, 0, ahead=-1)
        assert rig.reap() == [(0, 0)]


def test_split_device_that_goes_back() -> None:
    with RingRig(SIZE, packed=False, in_order=True) as rig:
        first, second, _third = shown(rig, 3)
        rig.device.push([first])
        assert rig.reap() == [(0, 4097)]
        rig.device.push([first])
        rig.reap_fails()
        rig.device.write_used(second[0].id, 0, ahead=-1)
        assert rig.reap() == [(1, 0)]


@pytest.mark.parametrize("head", [1, 2, 8, 0xFFFFFFFF])
def test_split_device_that_names_what_is_no_head(head: int) -> None:
    with RingRig(SIZE, packed=False, in_order=True) as rig:
        shown(rig, 2)
        rig.device.write_used(head, 0)
        rig.device.skip(2)
        rig.reap_fails()
        assert (rig.ring.inflight, rig.ring.free_count) == (2, SIZE - 5)


@FORMATS
def test_a_chain_that_was_not_shown_yet_cannot_be_of_a_batch(packed: bool) -> None:
    with RingRig(SIZE, packed=packed, in_order=True) as rig:
        ((first, _),) = shown(rig, 1)
        hidden = rig.ring.add([(0x1000, 1, False)], 9)
        rig.device.write_used(hidden, 0)
        rig.device.skip(first.count if packed else 1)
        rig.reap_fails()


# -- every schedule, both formats, with and without order


class Schedule(NamedTuple):
    packed: bool
    in_order: bool
    size_bits: int
    place: int
    wrap_counter: bool


schedules = st.builds(Schedule, st.booleans(), st.booleans(), st.integers(1, 4), st.integers(0, 0xFFFF), st.booleans())


class Model:
    """A driver and a device that exchange requests, as lists."""

    def __init__(self, rig: RingRig, data: st.DataObject, *, in_order: bool):
        self.rig, self.data, self.in_order = rig, data, in_order
        self.cookie = 0
        self.used_tables: dict[int, int] = {}  # cookie -> table
        self.added: list[tuple[int, list[tuple[int, int, int]]]] = []
        self.shown: deque[tuple[int, list[tuple[int, int, int]]]] = deque()
        self.held: list[tuple[int, Taken]] = []  # by the device
        self.counts: dict[int, int] = {}  # cookie -> descriptors
        self.due: list[tuple[int, int]] = []  # what the driver has to find next

    def add(self) -> None:
        lengths = self.data.draw(st.lists(st.integers(-5, 5).filter(bool), min_size=1, max_size=5))
        free = next(i for i in range(TABLES_MAX) if i not in self.used_tables.values())
        table = free if self.data.draw(st.booleans()) else None
        count = 1 if table is not None else len(lengths)
        self.cookie += 1
        if count > self.rig.ring.size - sum(self.counts.values()):
            with pytest.raises(BlockingIOError):
                self.rig.add(*lengths, indirect_at=table)
            return
        self.added.append((self.cookie, self.rig.add(*lengths, cookie=self.cookie, indirect_at=table)))
        self.counts[self.cookie] = count
        if table is not None:
            self.used_tables[self.cookie] = table

    def publish(self) -> None:
        assert self.rig.ring.publish() is bool(self.added)  # nobody has said anything against kicks
        self.shown += self.added
        self.added = []

    def take(self) -> None:
        for _ in range(self.data.draw(st.integers(0, 4))):
            if not self.shown:
                assert self.rig.device.pop() is None
                return
            cookie, buffers = self.shown.popleft()
            (taken,) = self.rig.take(1)
            assert (taken[0].buffers, taken[0].count) == (buffers, self.counts[cookie])
            self.held.append((cookie, taken))

    def give_back(self) -> None:
        if not self.in_order:
            self.held = self.data.draw(st.permutations(self.held))
        count = self.data.draw(st.integers(0, len(self.held)))
        done, self.held = self.held[:count], self.held[count:]
        if not done:
            return
        said = self.data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
        taken = [(chain, words) for (_, (chain, _)), words in zip(done, said, strict=True)]
        if self.in_order and self.data.draw(st.booleans()):
            self.rig.device.push_batch(taken)
            said[:-1] = [written for _, (_, written) in done[:-1]]
        else:
            self.rig.device.push(taken)
        self.due += [(cookie, words) for (cookie, _), words in zip(done, said, strict=True)]

    def reap(self) -> None:
        assert self.rig.reap() == self.due
        for cookie, _written in self.due:
            del self.counts[cookie]
            self.used_tables.pop(cookie, None)
        self.due = []
        assert self.rig.ring.free_count == self.rig.ring.size - sum(self.counts.values())
        assert self.rig.ring.inflight == len(self.shown) + len(self.held)


@pytest.mark.slow
@given(schedule=schedules, data=st.data())
def test_driver_and_device_agree_on_every_schedule(schedule: Schedule, data: st.DataObject) -> None:
    size = 1 << schedule.size_bits
    start = schedule.place
    if schedule.packed:
        start = (schedule.place % size | schedule.wrap_counter << 15) * 0x10001
    with RingRig(size, packed=schedule.packed, in_order=schedule.in_order, event_idx=False, start=start) as rig:
        model = Model(rig, data, in_order=schedule.in_order)
        steps = st.sampled_from([model.add, model.add, model.publish, model.take, model.give_back, model.reap])
        for step in data.draw(st.lists(steps, max_size=60)):
            step()
        model.publish()
        while model.shown or model.held or model.due:
            model.take()
            model.give_back()
            model.reap()
        assert rig.ring.free_count == size
