"""A packed ring, and one with IN_ORDER, go on where a worker that died stood."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from device_model import Params
from model import F_IN_ORDER, F_PACKED, NEXT, SECTOR_BYTES, WRITE, Desc
from packed_model import AVAIL, USED
from rig import IN_IOVA, OUT_IOVA, Rig

from vdusefast.state import shared_pages
from vdusefast.worker._datapath import RingError

COUNT = 5
LOG_HEADER = struct.Struct("<8sIHHIIIIII")
PACKED, SPLIT_IN_ORDER = 1, 2  # enum vf_log_format
SECOND_LAP = 0  # slot 0, wrap counter 0


class Crashed(Rig):
    """Five writes of three descriptors each, in the second lap of a ring of 16, and the log of a worker that died."""

    def __init__(self, *, shown: int = 0, noted: int = 0, announced: int | None = None, working: int = -1) -> None:
        """shown, noted, announced: writes whose elements the driver has, the log noted, the log announced."""
        super().__init__(Params(features=Params.features | F_PACKED), start=False, start_idx=SECOND_LAP)
        self.offer_writes(COUNT)
        for number in range(shown):
            self.memory.write(self.ring.desc + 48 * number + 8, struct.pack("<IHH", 1, number, WRITE))
        for number in range(shown if announced is None else announced):
            self.put_entry(number, order=3)
        at_work = 0 if working < 0 else 3 * working + 1
        self.put_log(noted=3 * noted, announced=3 * (shown if announced is None else announced), working=at_work)

    def put_log(self, *, noted: int, announced: int, working: int = 0, **other: Any) -> None:
        fields = {"magic": b"VDUSELOG", "version": 2, "format": PACKED, "state": shared_pages.LogState.VALID, **other}
        head = (fields["magic"], fields["version"], fields["format"], shared_pages.INFLIGHT_ENTRY_BYTES)
        LOG_HEADER.pack_into(
            self.pages,
            shared_pages.INFLIGHT_OFFSET,
            *(*head, self.params.queue_size_max, fields["state"], noted, noted, working, announced),
        )

    def put_entry(self, number: int, *, order: int = 0, deaths: int = 0) -> None:
        at = (
            shared_pages.INFLIGHT_OFFSET
            + shared_pages.INFLIGHT_HEADER_BYTES
            + shared_pages.INFLIGHT_ENTRY_BYTES * 3 * number
        )
        self.pages[at : at + 12] = struct.pack("<QI", order, deaths)

    def deaths(self, number: int) -> int:
        at = (
            shared_pages.INFLIGHT_OFFSET
            + shared_pages.INFLIGHT_HEADER_BYTES
            + shared_pages.INFLIGHT_ENTRY_BYTES * 3 * number
        )
        return int(struct.unpack_from("<I", self.pages, at + 8)[0])

    def recover(self) -> None:
        self.queue.start(**self.start_words(SECOND_LAP), recover=True)

    def statuses(self) -> bytes:
        return self.memory.read(OUT_IOVA, COUNT)


def undone(done: int) -> bytes:
    """The statuses when all but the first `done` writes were carried out."""
    return b"\xff" * done + bytes(COUNT - done)


@pytest.mark.parametrize("noted", [0, 1, 2])
def test_what_was_shown_is_not_done_again_and_all_else_is(noted: int) -> None:
    with Crashed(shown=2, noted=noted) as rig:
        rig.recover()
        assert rig.queue.poll() == 3
        assert rig.statuses() == undone(2)
        assert [buffer_id for buffer_id, _ in rig.ring.reap()] == [0, 1, 2, 3, 4]
        assert rig.irqs() > 0


def test_an_element_that_was_announced_and_never_written_is_done_again() -> None:
    with Crashed(shown=1, announced=2) as rig:
        rig.recover()
        assert rig.queue.poll() == 4
        assert rig.statuses() == undone(1)


def test_leftovers_of_the_lap_before_are_not_taken_for_elements() -> None:
    with Crashed(shown=COUNT, noted=COUNT - 1) as rig:
        # After the last chain, a descriptor of the first lap has the USED bit that a used element would have.
        assert not rig.memory.read(rig.ring.desc + 48 * COUNT + 14, 2)[1] & USED >> 8
        rig.recover()
        assert rig.queue.poll() == 0
        assert rig.queue.quiesce()[0] == 0x000F_000F  # slot 15, wrap counter 0, both


def test_slots_made_available_again_count_as_given_back() -> None:
    with Crashed(shown=1) as rig:
        for i, part in enumerate((Desc(0, 16), Desc(0, 512), Desc(0, 1, WRITE))):  # as of the third lap
            rig.ring.put_desc(i, Desc(part.addr, part.len, part.flags | AVAIL | (NEXT if i < 2 else 0), 9))
        rig.recover()
        assert rig.queue.poll() == 4
        assert rig.statuses() == undone(1)


@pytest.mark.parametrize("length", [0, 17, 1 << 40])
def test_an_element_of_an_impossible_length_is_refused(length: int) -> None:
    with Crashed(shown=2) as rig:
        rig.put_entry(0, order=length)
        with pytest.raises(RingError, match="does not fit the ring"):
            rig.recover()


@pytest.mark.parametrize(
    "other",
    [{"magic": b"FOREIGN!"}, {"version": 1}, {"format": 0}, {"format": SPLIT_IN_ORDER}, {"announced": 1 << 16}],
    ids=["magic", "version", "split", "split in order", "position"],
)
def test_a_foreign_log_is_refused_as_a_packed_ring_has_no_index(other: dict[str, Any]) -> None:
    with Crashed() as rig:
        rig.put_log(**{"noted": 0, "announced": 0, **other})
        with pytest.raises(RingError, match="none, or of another version"):
            rig.recover()


def test_a_void_log_starts_where_the_ring_began() -> None:
    with Crashed(shown=2) as rig:
        rig.put_log(noted=6, announced=6, state=shared_pages.LogState.VOID)
        rig.ring.put_desc(0, Desc(IN_IOVA, 16, NEXT | USED, 0))  # nothing was completed
        rig.recover()
        assert rig.queue.note == ""
        assert rig.queue.poll() > 0
        assert rig.statuses()[0] == 0


def test_the_third_death_answers_the_request_with_an_error_and_the_others_are_done() -> None:
    with Crashed(working=1) as rig:
        rig.put_entry(1, deaths=2)
        rig.recover()
        assert "has ended 3 workers: answered with IOERR" in rig.queue.note
        rig.queue.poll()
        assert rig.statuses() == bytes([0, 1, 0, 0, 0])
        assert rig.store_bytes()[SECTOR_BYTES : 2 * SECTOR_BYTES] != b"\x41" * SECTOR_BYTES
        assert rig.deaths(1) == 0  # what comes to that slot next begins again


def test_a_second_death_is_no_reason_yet() -> None:
    with Crashed(working=1) as rig:
        rig.put_entry(1, deaths=1)
        rig.recover()
        assert rig.queue.note == ""
        assert rig.statuses() == bytes(COUNT)  # served at once, so that it is known what became of it
        assert rig.deaths(1) == 0


def test_a_request_that_was_given_back_is_not_blamed() -> None:
    with Crashed(shown=2, working=1) as rig:
        rig.recover()
        assert rig.deaths(1) == 0
        assert rig.queue.poll() == 3


def test_a_request_that_kills_even_when_refused_stops_the_queue() -> None:
    with Crashed(working=0) as rig:
        rig.put_entry(0, deaths=5)
        with pytest.raises(RingError, match="one request has killed"):
            rig.recover()


def test_a_packed_ring_that_others_left_in_flight_is_refused() -> None:
    with (
        Rig(Params(features=Params.features | F_PACKED), start=False) as rig,
        pytest.raises(RingError, match="in flight"),
    ):
        rig.queue.start(**rig.start_words(0x8000_8003))


@pytest.mark.parametrize("start_idx", [0, 65534])
@pytest.mark.parametrize("cleared", [0, 1, 2])
def test_a_run_that_was_shown_but_is_still_logged_is_not_done_again(start_idx: int, cleared: int) -> None:
    """With IN_ORDER the used ring has the last head of a run alone; some of its entries may be cleared already."""
    with Rig(Params(features=Params.features | F_IN_ORDER), start_idx=start_idx, start=False) as rig:
        heads = rig.offer_writes(COUNT)
        rig.memory.write(rig.ring.used + 4 + 8 * (start_idx % 16), struct.pack("<II", heads[2], 1))
        rig.ring.put_u16(rig.ring.used + 2, start_idx + 3)
        head = (b"VDUSELOG", 2, SPLIT_IN_ORDER, shared_pages.INFLIGHT_ENTRY_BYTES, rig.params.queue_size_max)
        place = (shared_pages.LogState.VALID, start_idx, start_idx, 0, start_idx)
        LOG_HEADER.pack_into(rig.pages, shared_pages.INFLIGHT_OFFSET, *head, *place)
        for number in range(cleared, 4):  # the fourth was taken
            at = (
                shared_pages.INFLIGHT_OFFSET
                + shared_pages.INFLIGHT_HEADER_BYTES
                + shared_pages.INFLIGHT_ENTRY_BYTES * heads[number]
            )
            struct.pack_into("<Q", rig.pages, at, (1 << 16) + start_idx + number)
        rig.queue.start(**rig.start_words(0), recover=True)
        assert rig.memory.read(OUT_IOVA, COUNT) == bytes([255, 255, 255, 0, 255])
        assert rig.queue.poll() == 1
        assert [head for head, _ in rig.ring.reap(in_order=True)] == heads
