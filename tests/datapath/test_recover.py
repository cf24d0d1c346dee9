"""A queue continues where a dead worker stood, by the in-flight log and the ring; and the engine that only fails."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from device_model import Params
from model import SECTOR_BYTES, WRITE, Desc, header
from rig import DATA_IOVA, IN_IOVA, OUT_IOVA, Rig

from vdusefast.state import shared_pages
from vdusefast.worker._datapath import RingError

T_OUT = 1
DOES_NOT_COUNT = 12345  # of a split ring that continues by its log
HEADER_BYTES = shared_pages.INFLIGHT_HEADER_BYTES
ENTRY_BYTES = shared_pages.INFLIGHT_ENTRY_BYTES
LOGGED = 256  # entries: the largest queue size of a rig
HEADER_WRITE_BYTES = 16 + SECTOR_BYTES
LOG_HEADER = struct.Struct("<8sIHHIIIII")


class Crashed(Rig):
    """Five writes, each to the sector of its number, in the log of a worker that died."""

    COUNT = 5

    def __init__(
        self,
        *,
        used: list[int],
        logged: dict[int, int],
        noted_used_idx: int = 0,
        start_idx: int = 0,
        working: int | None = None,
        deaths: dict[int, int] | None = None,
        **rig: Any,
    ) -> None:
        """used: which of the writes were shown as done. logged, deaths: order and deaths by write. working: a write."""
        super().__init__(start_idx=start_idx, start=False, **rig)
        self.heads = self.offer_writes(self.COUNT)
        for place, number in enumerate(used):
            slot = (start_idx + place) % self.ring.size
            self.memory.write(self.ring.used + 4 + 8 * slot, struct.pack("<II", self.heads[number], 1))
        self.ring.put_u16(self.ring.used + 2, start_idx + len(used))
        at = shared_pages.INFLIGHT_OFFSET
        place = (start_idx + noted_used_idx) & 0xFFFF
        at_work = 0 if working is None else self.heads[working] + 1
        self.put_log_header(
            b"VDUSELOG",
            2,
            0,
            ENTRY_BYTES,
            max(self.params.queue_size_max, self.ring.size),
            shared_pages.LogState.VALID,
            place,
            place,
            at_work,
        )
        for number, order in logged.items():
            entry = at + HEADER_BYTES + ENTRY_BYTES * self.heads[number]
            self.pages[entry : entry + 12] = struct.pack("<QI", order, (deaths or {}).get(number, 0))

    def put_log_header(self, *fields: Any) -> None:
        at = shared_pages.INFLIGHT_OFFSET
        self.pages[at : at + LOG_HEADER.size] = LOG_HEADER.pack(*fields)

    def recover(self) -> list[int]:
        """Start from the log; the writes completed by that, in order."""
        before = self.ring.used_idx
        self.queue.start(**self.start_words(DOES_NOT_COUNT), recover=True)
        return self.given_back(before)

    def given_back(self, since: int) -> list[int]:
        count = (self.ring.used_idx - since) & 0xFFFF
        return [self.heads.index(self.ring.used_elem((since + i) & 0xFFFF)[0]) for i in range(count)]

    def statuses(self) -> bytes:
        return self.memory.read(OUT_IOVA, self.COUNT)

    def log(self) -> list[int]:
        at = shared_pages.INFLIGHT_OFFSET + HEADER_BYTES
        return [order for order, _ in struct.iter_unpack("<Q8s", self.pages[at : at + ENTRY_BYTES * self.ring.size])]

    def deaths(self) -> list[int]:
        at = shared_pages.INFLIGHT_OFFSET + HEADER_BYTES
        all_deaths = [
            dead for _, dead in struct.iter_unpack("<QI4x", self.pages[at : at + ENTRY_BYTES * self.ring.size])
        ]
        return [all_deaths[head] for head in self.heads]


@pytest.mark.parametrize("start_idx", [0, 65534, 65535])
def test_requests_in_flight_are_done_again_in_the_order_they_were_taken(start_idx: int) -> None:
    with Crashed(used=[], logged={0: 30, 1: 9, 2: 12}, start_idx=start_idx) as rig:
        assert rig.recover() == [1, 2, 0]
        stood = rig.ring.used_idx
        assert rig.queue.poll() == 2
        assert rig.given_back(stood) == [3, 4]
        assert rig.statuses() == bytes(5)
        assert rig.irqs() > 0
        assert rig.log() == [0] * 16
        for number in range(rig.COUNT):
            sector = rig.store_bytes()[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]
            assert sector == bytes([0x40 + number]) * SECTOR_BYTES


def test_heads_beyond_the_size_that_was_offered_are_done_again() -> None:
    with Crashed(used=[], logged={2: 1, 4: 2, 3: 3}, params=Params(queue_size_max=8), size=16) as rig:
        assert max(rig.heads) >= 8
        assert rig.recover() == [2, 4, 3]
        assert rig.log() == [0] * 16


@pytest.mark.parametrize("start_idx", [0, 65535])
def test_a_batch_that_was_shown_but_is_still_logged_is_not_done_again(start_idx: int) -> None:
    with Crashed(used=[2, 0], logged={0: 1, 1: 2, 2: 3}, start_idx=start_idx) as rig:
        assert rig.recover() == [1]
        stood = rig.ring.used_idx
        assert rig.queue.poll() == 2
        assert rig.given_back(stood) == [3, 4]
        assert rig.statuses() == bytes([255, 0, 255, 0, 0])  # the first two were answered by the worker that died


def test_a_request_taken_but_not_yet_logged_is_taken_again() -> None:
    with Crashed(used=[0], logged={1: 2}, noted_used_idx=1) as rig:
        assert rig.recover() == [1]
        stood = rig.ring.used_idx
        assert rig.queue.poll() == 3
        assert rig.given_back(stood) == [2, 3, 4]


def test_an_empty_log_goes_on_where_the_ring_says() -> None:
    with Crashed(used=[0, 1, 2], logged={}, noted_used_idx=3) as rig:
        assert rig.recover() == []
        stood = rig.ring.used_idx
        assert rig.queue.poll() == 2
        assert rig.given_back(stood) == [3, 4]


def test_new_requests_are_logged_behind_those_done_again() -> None:
    with Crashed(used=[], logged={0: 100}) as rig:
        rig.recover()
        assert rig.queue.poll() == 4
        rig.queue.quiesce()
        assert rig.log() == [0] * 16


def test_a_log_that_does_not_fit_the_ring_is_refused() -> None:
    with Crashed(used=[], logged={}) as rig:
        rig.ring.put_u16(rig.ring.used + 2, 17)  # more completed than the ring holds
        with pytest.raises(RingError, match="in-flight log"):
            rig.recover()


def test_a_log_of_more_requests_than_were_made_available_is_refused() -> None:
    with Crashed(used=[], logged={0: 1, 1: 2}) as rig:
        rig.ring.put_u16(rig.ring.avail + 2, 1)
        with pytest.raises(RingError, match="does not fit the ring"):
            rig.recover()


@pytest.mark.parametrize(
    "header",
    [
        (b"FOREIGN!", 2, 0, ENTRY_BYTES, LOGGED, 1, 0, 0, 0),
        (b"VDUSELOG", 1, 0, ENTRY_BYTES, LOGGED, 1, 0, 0, 0),
        (b"VDUSELOG", 2, 1, ENTRY_BYTES, LOGGED, 1, 0, 0, 0),
        (b"VDUSELOG", 2, 0, 8, LOGGED, 1, 0, 0, 0),
        (b"VDUSELOG", 2, 0, ENTRY_BYTES, 8, 1, 0, 0, 0),
        (b"VDUSELOG", 2, 0, ENTRY_BYTES, 32769, 1, 0, 0, 0),
        (b"VDUSELOG", 2, 0, ENTRY_BYTES, LOGGED, 1, 0, 65536, 0),
        (b"VDUSELOG", 2, 0, ENTRY_BYTES, LOGGED, 1, 0, 0, LOGGED + 1),
    ],
    ids=["magic", "version", "format", "entry size", "smaller than the ring", "larger than any", "index", "working"],
)
def test_a_foreign_log_is_refused_unless_nothing_is_outstanding(header: tuple[Any, ...]) -> None:
    with Crashed(used=[], logged={0: 1}) as rig:
        rig.put_log_header(*header)
        with pytest.raises(RingError, match="none, or of another version"):
            rig.recover()
    with Crashed(used=[0, 1, 2, 3, 4], logged={0: 1}) as rig:
        rig.put_log_header(*header)
        assert rig.recover() == []
        assert "no request was outstanding" in rig.queue.note
        assert rig.log() == [0] * 16
        assert rig.ask([Desc(IN_IOVA, HEADER_WRITE_BYTES), Desc(OUT_IOVA, 1, WRITE)])[1] == 0


def test_a_void_log_starts_at_the_used_index() -> None:
    with Crashed(used=[0, 1], logged={2: 5}) as rig:
        rig.put_log_header(b"VDUSELOG", 2, 0, ENTRY_BYTES, LOGGED, shared_pages.LogState.VOID, 0, 0, 0)
        assert rig.recover() == []
        assert rig.queue.note == ""
        rig.queue.poll()
        assert rig.statuses() == bytes([255, 255, 0, 0, 0])


def test_two_requests_of_one_order_are_refused() -> None:
    with Crashed(used=[], logged={0: 7, 1: 7}) as rig:
        rig.recover()
        assert "does not fit" in rig.queue.failure


def test_a_replay_keeps_the_order_so_that_the_next_one_has_it() -> None:
    with Crashed(used=[], logged={0: 30, 1: 9, 2: 12}, engine="uring") as rig:
        rig.queue.start(**rig.start_words(DOES_NOT_COUNT), recover=True)
        assert [rig.log()[head] for head in rig.heads[:3]] == [30, 9, 12]
        while rig.queue.inflight_count:
            rig.queue.poll()


def test_the_death_is_counted_for_the_request_that_the_worker_was_at() -> None:
    with Crashed(used=[], logged={0: 1, 1: 2}, working=1, deaths={1: 1}, engine="uring") as rig:
        rig.queue.start(**rig.start_words(DOES_NOT_COUNT), recover=True)
        assert rig.deaths() == [0, 2, 0, 0, 0]
        while rig.queue.inflight_count:
            rig.queue.poll()


def test_the_third_death_answers_the_request_with_an_error_and_the_others_are_done() -> None:
    with Crashed(used=[], logged={0: 1, 1: 2, 2: 3}, working=1, deaths={1: 2}) as rig:
        before = rig.store_bytes()[SECTOR_BYTES : 2 * SECTOR_BYTES]
        assert rig.recover() == [0, 1, 2]
        assert rig.statuses() == bytes([0, 1, 0, 255, 255])
        assert "has ended 3 workers: answered with IOERR" in rig.queue.note
        assert "(write at byte 512)" in rig.queue.note
        assert rig.store_bytes()[SECTOR_BYTES : 2 * SECTOR_BYTES] == before
        rig.queue.poll()
        assert rig.statuses() == bytes([0, 1, 0, 0, 0])


def test_a_request_that_kills_even_when_refused_stops_the_queue() -> None:
    with (
        Crashed(used=[], logged={0: 1}, working=0, deaths={0: 5}) as rig,
        pytest.raises(RingError, match="one request has killed"),
    ):
        rig.recover()


def test_a_head_that_was_given_back_is_not_blamed() -> None:
    with Crashed(used=[0], logged={0: 1, 1: 2}, working=0) as rig:
        assert rig.recover() == [1]
        assert rig.deaths() == [0] * 5


def test_a_new_request_starts_without_the_deaths_of_the_one_before() -> None:
    with Crashed(used=[], logged={0: 1}, deaths={0: 2}, working=0) as rig:
        rig.recover()
        rig.queue.poll()
        rig.memory.write(OUT_IOVA, b"\xff")
        rig.ring.make_available(rig.heads[0])
        rig.queue.poll()
        assert rig.statuses()[0] == 0


def test_a_logged_chain_that_is_bad_by_now_stops_the_queue_behind_the_good_ones() -> None:
    with Crashed(used=[], logged={0: 2, 1: 1}) as rig:
        rig.ring.put_desc(rig.heads[0], Desc(DATA_IOVA, 16, 1, 99))
        assert rig.recover() == [1]
        assert "next field" in rig.queue.failure
        assert rig.queue.poll() == -1


def test_the_engine_that_fails_answers_everything_with_an_error() -> None:
    with Rig(engine="fail") as rig:
        parts = [Desc(IN_IOVA, 16), Desc(OUT_IOVA, 512, WRITE), Desc(OUT_IOVA + 512, 1, WRITE)]
        for kind in (0, T_OUT, 4):
            rig.memory.write(IN_IOVA, header(kind, 0))
            chain = (
                parts if kind == 0 else [parts[0], Desc(IN_IOVA + 16, 512), parts[2]] if kind == T_OUT else parts[::2]
            )
            assert rig.ask(chain)[1] == 1
        assert rig.counter("host_errors") == 3
