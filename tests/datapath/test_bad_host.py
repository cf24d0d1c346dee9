"""Errors of the host become IOERR and are counted; memory that vanishes fails the queue and not the process."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from device_model import Params
from model import IOERR, OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, WRITE, Desc, Region, header, ranges
from rig import IN_IOVA, OUT_IOVA, Rig, file_engines, pattern

from vdusefast.state import shared_pages
from vdusefast.worker import _datapath

HERE = Path(__file__).parent
ENGINES = file_engines()
PAGE = 4096


@contextmanager
def opened(path: str | Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_full_store_is_an_error_and_counted(engine: str) -> None:
    with opened("/dev/full") as fd, Rig(engine=engine, store_fd=fd) as rig:
        assert rig.ask(rig.request(T_OUT, 0, pattern(512))) == (1, IOERR)
        assert (rig.counter("host_errors"), rig.counter("host_enospc")) == (1, 1)
        assert rig.counter("last_host_errno") == 28
        assert rig.counter("bad_requests") == 0
        # The queue still serves.
        assert rig.ask(rig.request(T_IN, 0, b"", 512)) == (513, OK)


@pytest.mark.parametrize("flags", [0, 1])
def test_full_store_without_fallocate_fails_to_write_zeroes(engine: str, flags: int) -> None:
    with opened("/dev/full") as fd, Rig(engine=engine, store_fd=fd) as rig:
        assert rig.ask(rig.request(T_WRITE_ZEROES, 0, ranges((0, 8, flags)))) == (1, IOERR)
        assert rig.counter("host_enospc") == 1


def test_discard_of_a_store_that_cannot_is_ok(engine: str) -> None:
    with opened("/dev/full") as fd, Rig(engine=engine, store_fd=fd) as rig:
        assert rig.ask(rig.request(T_DISCARD, 0, ranges((0, 8, 0)))) == (1, OK)
        assert rig.counter("host_errors") == 0


def test_eio_of_the_store_is_counted(engine: str) -> None:
    # Nothing is mapped at a process's lowest addresses, and its memory file answers EIO there.
    with opened("/proc/self/mem", os.O_RDONLY) as fd, Rig(engine=engine, store_fd=fd) as rig:
        assert rig.ask(rig.request(T_IN, 0, b"", 512)) == (0, IOERR)
        assert (rig.counter("host_errors"), rig.counter("host_eio"), rig.counter("last_host_errno")) == (1, 1, 5)


def test_write_to_a_store_opened_for_reading_is_counted(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.write_bytes(pattern(64 * 512))
    with opened(path, os.O_RDONLY) as fd, Rig(engine=engine, store_fd=fd) as rig:
        assert rig.ask(rig.request(T_OUT, 0, pattern(512, 4))) == (1, IOERR)
        assert (rig.counter("host_errors"), rig.counter("last_host_errno")) == (1, 9)
    assert path.read_bytes() == pattern(64 * 512)


@pytest.mark.parametrize("cut", [0, 512, 1000])
def test_store_that_became_shorter_is_an_error_and_counted(engine: str, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "store"
    path.write_bytes(pattern(64 * 512))
    with opened(path) as fd, Rig(engine=engine, store_fd=fd) as rig:
        os.truncate(path, cut)
        length, status = rig.ask(rig.request(T_IN, 0, b"", 2048))
        assert (length, status) == (cut, IOERR)
        assert (rig.counter("host_errors"), rig.counter("host_eio")) == (1, 1)
        assert rig.memory.read(OUT_IOVA, cut) == pattern(64 * 512)[:cut]


def test_file_size_limit_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.write_bytes(b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as fd, Rig(engine="sync", store_fd=fd) as rig:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # Python ignores SIGXFSZ
        try:
            answers = [rig.ask(rig.request(T_OUT, sector, pattern(512, 2))) for sector in (7, 8)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert answers == [(1, OK), (1, IOERR)]
        assert rig.counter("last_host_errno") == 27
    assert path.stat().st_size == 4096


def test_invalidated_range_is_refused_until_it_is_mapped_again() -> None:
    with Rig() as rig:
        assert rig.ask(rig.request(T_IN, 0, b"", 512)) == (513, OK)
        assert rig.queue.invalidate(OUT_IOVA + 100, OUT_IOVA + 200) == 1
        region = rig.memory.find(OUT_IOVA)
        assert region is not None
        before = rig.memory.read(OUT_IOVA, region.size)
        rig.ring.make_available(rig.ring.put_chain(rig.request(T_IN, 8, b"", 512)))
        assert rig.poll() == 1
        assert rig.ring.used_elem(1)[1] == 0
        assert rig.memory.read(OUT_IOVA, 512) == before[:512]
        rig.map(region)
        assert rig.ask(rig.request(T_IN, 8, b"", 512)) == (513, OK)
        assert rig.memory.read(OUT_IOVA, 512) == pattern(16 * 512)[4096:4608]
        assert rig.counter("invalidations") == 1


def test_range_remapped_to_other_memory_reaches_only_that() -> None:
    with Rig() as rig:
        assert rig.ask(rig.request(T_IN, 0, b"", 512)) == (513, OK)
        old = rig.memory.find(OUT_IOVA)
        assert old is not None
        rig.queue.invalidate(old.start, old.last)
        held = bytes(old.map)
        new = Region(old.start, old.size)
        rig.memory.regions[rig.memory.regions.index(old)] = new
        rig.map(new)
        assert rig.ask(rig.request(T_IN, 8, b"", 512)) == (513, OK)
        assert bytes(old.map) == held
        assert new.map[:512] == pattern(16 * 512)[4096:4608]
        old.close()


def test_requests_in_flight_end_before_a_range_goes(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.write_bytes(pattern(64 * 512))
    with opened(path) as fd, Rig(engine=ENGINES[-1], store_fd=fd, size=64) as rig:
        heads = [rig.ring.put_chain(rig.request(T_IN, 1, b"", 512)) for _ in range(20)]
        for head in heads:
            rig.ring.make_available(head)
        rig.queue.poll()
        rig.queue.invalidate(0, 2**64 - 1)
        assert rig.queue.inflight_count == 0
        assert rig.ring.used_idx == 20
        assert sorted(rig.ring.used_elem(i)[0] for i in range(20)) == sorted(heads)


@pytest.mark.parametrize("name", ["memory", *ENGINES])
def test_no_page_is_touched_that_no_descriptor_names(name: str) -> None:
    pages = 64
    regions = [Region(IN_IOVA, PAGE), Region(OUT_IOVA, PAGE * pages), Region(0x9000_0000, PAGE * pages)]
    with Rig(engine=name, regions=regions, params=Params(queue_size_max=16)) as rig:
        rig.memory.write(IN_IOVA, header(T_IN))
        data = OUT_IOVA + 5 * PAGE + 1024
        parts = [Desc(IN_IOVA, 16), Desc(data, 2 * PAGE, WRITE), Desc(OUT_IOVA + 40 * PAGE + 7, 1, WRITE)]
        rig.ring.make_available(rig.ring.put_chain(parts))
        assert rig.poll() == 1
        assert rig.ring.used_elem(0)[1] == 2 * PAGE + 1
        assert present_pages(regions[1]) == [5, 6, 7, 40]
        assert present_pages(regions[2]) == []


def present_pages(region: Region) -> list[int]:
    """Return which pages of a memfd exist, by its holes."""
    found: list[int] = []
    at = 0
    while at < region.size:
        try:
            start = os.lseek(region.fd, at, os.SEEK_DATA)
        except OSError:
            break  # ENXIO: only a hole is left
        at = os.lseek(region.fd, start, os.SEEK_HOLE)
        found += range(start // PAGE, (at + PAGE - 1) // PAGE)
    return found


VANISH = """
import os, sys
sys.path[:0] = [{here!r}, {root!r}]
from model import *
from rig import *
where, engine = {where!r}, {engine!r}
rig = Rig(engine=engine)
rig.queue.guard()
assert rig.ask(rig.request(T_IN, 0, b"", 512)) == (513, OK)
parts = rig.request(T_IN, 0, b"", 512)
rig.ring.make_available(rig.ring.put_chain(parts))
region = rig.memory.find({{"header": IN_IOVA, "data": OUT_IOVA, "desc": rig.ring.desc, "avail": rig.ring.avail,
    "used": rig.ring.used}}[where])
region.map.close()
os.ftruncate(region.fd, 0)
while (moved := rig.queue.poll()) > 0 or rig.queue.inflight_count:
    pass
print(moved, rig.reason.name, rig.counter("memory_faults") > 0, rig.queue.poll())
rig.queue.close()
"""


@pytest.mark.parametrize("name", ["memory", *ENGINES])
@pytest.mark.parametrize("where", ["header", "data", "desc", "avail", "used"])
def test_memory_that_vanishes_fails_the_queue(where: str, name: str) -> None:
    code = VANISH.format(here=str(HERE), root=str(HERE.parent.parent), where=where, engine=name)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["-1", "MEMORY_GONE", "True", "-1"]


VANISH_EARLY = """
import os, sys
sys.path[:0] = [{here!r}, {root!r}]
from rig import *
rig = Rig(start=False)
rig.queue.guard()
region = rig.memory.find(rig.ring.used)
region.map.close()
os.ftruncate(region.fd, 0)
rig.start()
print(rig.queue.poll(), rig.reason.name)
rig.queue.close()
"""


def test_memory_that_vanished_before_the_start_fails_the_queue() -> None:
    """The used index that a start reads is then nobody's: what is written there the driver never sees."""
    code = VANISH_EARLY.format(here=str(HERE), root=str(HERE.parent.parent))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["-1", "MEMORY_GONE"]


def test_fault_elsewhere_still_ends_the_process() -> None:
    code = f"""
import mmap, os, sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent.parent)!r}]
from rig import *
rig = Rig()
rig.queue.guard()
fd = os.memfd_create("other")
os.ftruncate(fd, 4096)
other = mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
print(other[0])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == -7, ended
    assert ended.stdout == ""


def test_flush_of_a_failing_store_is_an_error(engine: str) -> None:
    # fdatasync(2) of a pipe is EINVAL.
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        with Rig(engine=engine, store_fd=writer) as rig:
            assert rig.ask(rig.request(T_FLUSH)) == (1, IOERR)
            assert (rig.counter("host_errors"), rig.counter("last_host_errno")) == (1, 22)
    finally:
        os.close(reader)
        os.close(writer)


def test_memory_store_smaller_than_the_device_is_refused() -> None:
    pages = mmap.mmap(-1, shared_pages.QUEUE_STRIDE_BYTES)
    queue = _datapath.Queue(pages, queue_size=2, capacity_sectors=9)
    fd = os.memfd_create("store", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    try:
        with pytest.raises(ValueError, match="smaller than the device"):
            queue.open_engine("memory", store="memory", fd=fd, size_bytes=4096)
    finally:
        queue.close()
        pages.close()
        os.close(fd)


def test_interrupt_that_could_not_be_sent_is_tried_again_without_a_new_request(tmp_path: Path) -> None:
    """A descriptor opened for reading takes no write: the interrupt fails until the port has a good one."""
    path = tmp_path / "not-an-eventfd"
    path.write_bytes(b"")
    with Rig() as rig, opened(path, os.O_RDONLY) as bad_fd:
        rig.queue.set_port_none(bad_fd)
        rig.ring.make_available(rig.ring.put_chain(rig.request(T_FLUSH)))
        assert rig.queue.poll() == 1
        assert rig.counter("irqs") == 0
        assert rig.queue.poll() == 0
        assert rig.counter("irqs") == 0
        rig.queue.set_port_none(rig.irq_fd)
        assert rig.queue.poll() == 0
        assert rig.counter("irqs") == 1
        assert os.eventfd_read(rig.irq_fd) == 1
        assert rig.queue.poll() == 0
        assert rig.counter("irqs") == 1


@pytest.mark.parametrize("again", [False, True])
def test_refused_chain_counts_as_not_taken(again: bool) -> None:
    """GET_VQ_STATE must not skip it: a head outside the table, with and without a good chain before it."""
    with Rig() as rig:
        if again:
            assert rig.ask(rig.request(T_FLUSH)) == (1, OK)
        rig.ring.make_available(rig.ring.size)
        assert rig.queue.poll() == -1
        assert rig.queue.quiesce()[:2] == (int(again), int(again))
