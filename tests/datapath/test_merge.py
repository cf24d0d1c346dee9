"""Adjacent requests of a batch are carried out by one call, and each is answered as if it had been alone."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from device_model import Params
from model import IOERR, OK, T_FLUSH, T_IN, T_OUT, WRITE, Desc, Region, header
from rig import IN_IOVA, OUT_IOVA, Rig, pattern, store_on_disk

from vdusefast.state import shared_pages

PAGE = 4096
STORE_BYTES = 64 * PAGE
PARAMS = Params(capacity_sectors=STORE_BYTES // 512, queue_size_max=256)
DATA_PAGES = 80  # then headers, or status bytes
REGIONS = [Region(IN_IOVA, (DATA_PAGES + 1) * PAGE), Region(OUT_IOVA, (DATA_PAGES + 1) * PAGE)]
LOG_AT = shared_pages.INFLIGHT_OFFSET + shared_pages.INFLIGHT_HEADER_BYTES
ENGINES = ["sync", "cached"]


@pytest.fixture
def path() -> Iterator[Path]:
    with store_on_disk(STORE_BYTES) as path:
        yield path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def rig_of(engine: str, fd: int, **options: bool) -> Rig:
    regions = [Region(region.start, region.size) for region in REGIONS]
    return Rig(PARAMS, size=256, engine=engine, store_fd=fd, regions=regions, **options)


def offer(rig: Rig, requests: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Make requests (type, page, data) of a page available. Returns their heads."""
    heads = []
    for place, (kind, page, data) in enumerate(requests):
        head, data_at = IN_IOVA + DATA_PAGES * PAGE + 16 * place, IN_IOVA + PAGE * place
        status = Desc(OUT_IOVA + DATA_PAGES * PAGE + place, 1, WRITE)
        rig.memory.write(head, header(kind, page * PAGE // 512))
        rig.memory.write(status.addr, b"\xff")
        parts = [Desc(head, 16)]
        if kind == T_OUT:
            rig.memory.write(data_at, data)
            parts.append(Desc(data_at, PAGE))
        elif kind == T_IN:
            parts.append(Desc(OUT_IOVA + PAGE * place, PAGE, WRITE))
        heads.append(rig.ring.put_chain([*parts, status]))
        rig.ring.make_available(heads[-1])
    return heads


def answers(rig: Rig, count: int) -> list[int]:
    """Return the status bytes of what was offered."""
    return list(rig.memory.read(OUT_IOVA + DATA_PAGES * PAGE, count))


def batch(rig: Rig, requests: Sequence[tuple[int, int, bytes]]) -> tuple[list[int], int]:
    """Have requests served in one batch.

    Returns their status bytes and how many were in flight behind the first round.
    """
    offer(rig, requests)
    assert rig.queue.poll() == len(requests)
    inflight = rig.queue.inflight_count
    rig.poll()
    return answers(rig, len(requests)), inflight


def read_at(rig: Rig, place: int) -> bytes:
    return rig.memory.read(OUT_IOVA + PAGE * place, PAGE)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("count", "held"), [(2, 1), (8, 7), (33, 32), (40, 38)])
def test_reads_in_a_row(fd: int, engine: str, count: int, held: int) -> None:
    """One call takes 32; the first request and the one that finds it full go by themselves."""
    with rig_of(engine, fd) as rig:
        stored = pattern(STORE_BYTES)
        os.pread(fd, STORE_BYTES, 0)
        statuses, inflight = batch(rig, [(T_IN, 3 + i, b"") for i in range(count)])
        assert (statuses, inflight) == ([OK] * count, held)
        assert all(read_at(rig, i) == stored[(3 + i) * PAGE : (4 + i) * PAGE] for i in range(count))


@pytest.mark.parametrize("engine", ENGINES)
def test_writes_in_a_row(path: Path, fd: int, engine: str) -> None:
    with rig_of(engine, fd) as rig:
        data = [bytes([65 + i]) * PAGE for i in range(10)]
        statuses, inflight = batch(rig, [(T_OUT, 5 + i, data[i]) for i in range(10)])
        assert (statuses, inflight) == ([OK] * 10, 9)
        assert path.read_bytes()[5 * PAGE : 15 * PAGE] == b"".join(data)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_comes_behind_is_done_behind(path: Path, fd: int, engine: str) -> None:
    """Writes that were held back come before one to the same place, and before a flush and a read."""
    with rig_of(engine, fd) as rig:
        pages = [(T_OUT, 1 + i, bytes([65 + i]) * PAGE) for i in range(4)]
        again = [(T_OUT, 2, b"z" * PAGE), (T_IN, 2, b""), (T_FLUSH, 0, b""), (T_OUT, 3, b"y" * PAGE)]
        assert batch(rig, [*pages, *again, (T_OUT, 3, b"x" * PAGE)])[0] == [OK] * 9
        assert read_at(rig, 5) == b"z" * PAGE
        assert path.read_bytes()[PAGE : 5 * PAGE] == b"A" * PAGE + b"z" * PAGE + b"x" * PAGE + b"D" * PAGE


@pytest.mark.parametrize("engine", ENGINES)
def test_each_has_its_own_error(path: Path, fd: int, engine: str) -> None:
    with rig_of(engine, fd) as rig:
        os.truncate(path, 6 * PAGE)
        statuses, inflight = batch(rig, [(T_IN, 2 + i, b"") for i in range(8)])
        assert statuses == [OK] * 4 + [IOERR] * 4
        assert inflight >= 7
        assert rig.counter("host_errors") == 4
        assert all(read_at(rig, i) == pattern(STORE_BYTES)[(2 + i) * PAGE : (3 + i) * PAGE] for i in range(4))


def test_full_store_fails_each_of_them() -> None:
    full = os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)
    try:
        with rig_of("sync", full) as rig:
            assert batch(rig, [(T_OUT, i, b"w" * PAGE) for i in range(5)])[0] == [IOERR] * 5
            assert rig.counter("host_enospc") == 5
    finally:
        os.close(full)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_after_the_other_is_not_held_back_for_long(fd: int, engine: str) -> None:
    with rig_of(engine, fd) as rig:
        os.pread(fd, STORE_BYTES, 0)
        held = [batch(rig, [(T_IN, page, b"")])[1] for page in range(32)]
        assert held == [0, 1, *[0] * 30]


@pytest.mark.parametrize("engine", ENGINES)
def test_neighbours_alone_are_held_back(fd: int, engine: str) -> None:
    with rig_of(engine, fd) as rig:
        os.pread(fd, STORE_BYTES, 0)
        assert batch(rig, [(T_IN, page, b"") for page in (1, 3, 2, 9, 8, 8)]) == ([OK] * 6, 0)
    with rig_of(engine, fd, merge=False) as rig:
        assert batch(rig, [(T_IN, page, b"") for page in range(8)]) == ([OK] * 8, 0)


def test_mapped_reads_need_no_merging() -> None:
    memory = os.memfd_create("store", os.MFD_CLOEXEC)
    os.pwrite(memory, pattern(STORE_BYTES), 0)
    try:
        with rig_of("sync", memory) as rig:
            assert batch(rig, [(T_IN, page, b"") for page in range(8)]) == ([OK] * 8, 0)
            assert batch(rig, [(T_OUT, page, b"m" * PAGE) for page in range(8)]) == ([OK] * 8, 7)
        assert os.pread(memory, 8 * PAGE, 0) == b"m" * 8 * PAGE
    finally:
        os.close(memory)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_write_is_told_before_an_older_one_that_would_be_repeated(path: Path, fd: int, engine: str) -> None:
    """The second of two writes to a page is published with the first, which was held back: no death undoes it."""
    with rig_of(engine, fd) as rig:
        writes = [(T_OUT, page, bytes([65 + i]) * PAGE) for i, page in enumerate((4, 5, 5, 20, 30, 40, 50))]
        offer(rig, writes)
        assert rig.queue.poll() == len(writes)
        rig.replace_worker()
        rig.poll()
        assert set(path.read_bytes()[5 * PAGE : 6 * PAGE]) == {ord("C")}
        assert answers(rig, len(writes)) == [OK] * len(writes)
        assert rig.ring.used_idx == len(writes)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_ring_left_by_a_worker_is_merged_again_in_its_order(path: Path, fd: int, engine: str) -> None:
    """More than one round of requests, most of them held back, are replayed at once by the next worker."""
    count = 75
    with rig_of(engine, fd) as rig:
        heads = offer(rig, [(T_OUT, i % 60, bytes([1 + i]) * PAGE) for i in range(count)])
        for order, head in enumerate(heads, start=1):
            struct.pack_into("<Q", rig.pages, LOG_AT + shared_pages.INFLIGHT_ENTRY_BYTES * head, order)
        rig.replace_worker()
        assert rig.queue.inflight_count > 64
        rig.poll()
        assert rig.ring.used_idx == count
        assert answers(rig, count) == [OK] * count
        stored = path.read_bytes()
        assert [stored[PAGE * page] for page in range(60)] == [1 + page + 60 * (page < 15) for page in range(60)]
