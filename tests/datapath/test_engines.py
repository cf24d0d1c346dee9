"""The specialities of engines with an io_uring: page cache first, registered buffers, submission by the kernel."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from device_model import Params
from model import OK, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, WRITE, Desc, header, ranges
from rig import IN_IOVA, OUT_IOVA, Rig, pattern, store_on_disk

from vdusefast.api import Device
from vdusefast.config import make_config
from vdusefast.errors import ConfigError, KernelSupportError
from vdusefast.worker.main import Worker

HERE = Path(__file__).parent
PAGE = 4096
TRIES_MAX = 50
STORE_BYTES = 64 * PAGE
REGION_BYTES = 0x1_0000  # of each of the rig's two
PARAMS = Params(capacity_sectors=STORE_BYTES // 512, discard_max_sectors=64, write_zeroes_max_sectors=64)


@pytest.fixture
def path() -> Iterator[Path]:
    with store_on_disk(STORE_BYTES) as path:
        yield path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def direct_fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    yield fd
    os.close(fd)


def evict(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def start(rig: Rig, sector: int, size: int) -> int:
    """Have one read started, and return how many are in flight after that round."""
    rig.ring.make_available(rig.ring.put_chain(rig.request(T_IN, sector, b"", size)))
    assert rig.queue.poll() == 1
    return rig.queue.inflight_count


def finish(rig: Rig, sector: int, size: int) -> None:
    rig.poll()
    assert rig.memory.read(OUT_IOVA, size) == pattern(STORE_BYTES)[sector * 512 : sector * 512 + size]
    assert rig.memory.read(OUT_IOVA + size, 1) == bytes([OK])


# -- cached


def until_missed(attempt: Callable[[], bool]) -> None:
    """Try until the cache lacks what is read: the kernel reads it by itself, and a quick disk is done at once."""
    assert any(attempt() for _ in range(TRIES_MAX)), f"the cache had everything, {TRIES_MAX} times"


def test_what_is_cached_takes_no_ring_and_what_is_not_does(fd: int) -> None:
    with Rig(PARAMS, engine="cached", store_fd=fd) as rig:

        def attempt() -> bool:
            evict(fd)
            missed = start(rig, 8, PAGE) == 1
            finish(rig, 8, PAGE)
            assert start(rig, 8, PAGE) == 0
            finish(rig, 8, PAGE)
            return missed

        for _ in range(3):
            until_missed(attempt)


def test_read_that_is_cached_in_part_goes_on_in_the_ring(fd: int) -> None:
    with Rig(PARAMS, engine="cached", store_fd=fd) as rig:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead

        def attempt() -> bool:
            evict(fd)
            os.pread(fd, PAGE, 0)
            missed = start(rig, 0, 2 * PAGE) == 1
            finish(rig, 0, 2 * PAGE)
            return missed

        until_missed(attempt)


def test_everything_but_reads_by_the_cached_engine(fd: int) -> None:
    with Rig(PARAMS, engine="cached", store_fd=fd) as rig:
        assert rig.ask(rig.request(T_OUT, 8, b"w" * PAGE)) == (1, OK)
        assert os.pread(fd, PAGE, PAGE) == b"w" * PAGE
        assert rig.ask(rig.request(T_FLUSH)) == (1, OK)
        assert rig.ask(rig.request(T_DISCARD, 0, ranges((8, 8, 0)))) == (1, OK)
        assert rig.ask(rig.request(T_WRITE_ZEROES, 0, ranges((16, 8, 0)))) == (1, OK)
        assert rig.ask(rig.request(T_IN, 8, b"", 2 * PAGE)) == (2 * PAGE + 1, OK)
        assert rig.memory.read(OUT_IOVA, 2 * PAGE) == bytes(2 * PAGE)


def test_read_that_is_cached_overtakes_one_that_is_not(fd: int) -> None:
    stored = pattern(STORE_BYTES)
    with Rig(PARAMS, engine="cached", store_fd=fd) as rig:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead

        def attempt() -> bool:
            evict(fd)
            os.pread(fd, PAGE, 5 * PAGE)
            heads, before = [], rig.ring.used_idx
            for place, sector in enumerate((8, 40)):
                rig.memory.write(IN_IOVA + 64 * place, header(T_IN, sector))
                data = OUT_IOVA + 2 * PAGE * place
                parts = [Desc(IN_IOVA + 64 * place, 16), Desc(data, PAGE, WRITE), Desc(data + PAGE, 1, WRITE)]
                heads.append(rig.ring.put_chain(parts))
                rig.ring.make_available(heads[-1])
            assert rig.queue.poll() == 2
            given_back, missed = rig.ring.used_idx - before, rig.queue.inflight_count
            rig.poll()
            order = [rig.ring.used_elem(before + i)[0] for i in range(2)]
            assert (given_back, order) == ((1, heads[::-1]) if missed else (2, heads))
            for place, sector in enumerate((8, 40)):
                assert rig.memory.read(OUT_IOVA + 2 * PAGE * place, PAGE) == stored[sector * 512 : sector * 512 + PAGE]
            return missed == 1

        until_missed(attempt)


@pytest.mark.parametrize(("engine", "cache", "wanted"), [("auto", "writeback", "cached"), ("auto", "none", "uring")])
def test_auto_on_a_disk(path: Path, engine: str, cache: str, wanted: str) -> None:
    with Device(make_config(name="auto", uri=f"file:{path}", engine=engine, cache=cache)) as device:
        assert device.queues()[0].engine == wanted


def test_cached_engine_is_not_for_tmpfs() -> None:
    memory = os.memfd_create("store", os.MFD_CLOEXEC)
    os.ftruncate(memory, STORE_BYTES)
    config = make_config(name="tmpfs", uri=f"file:/proc/self/fd/{memory}", engine="cached")
    try:
        with pytest.raises(KernelSupportError, match="cannot be read without waiting"):
            Device(config).start()
    finally:
        os.close(memory)


# -- registered buffers


def populate(rig: Rig) -> None:
    """Bring all pages of the regions into being, and map them again."""
    for iova in (IN_IOVA, OUT_IOVA):
        rig.memory.write(iova, bytes(REGION_BYTES))
        rig.queue.invalidate(iova, iova + REGION_BYTES - 1)
        region = rig.memory.find(iova)
        assert region is not None
        rig.map(region)


def test_only_memory_that_exists_is_registered(direct_fd: int) -> None:
    with Rig(PARAMS, engine="uring", store_fd=direct_fd, cache="none", direct_align=PAGE) as rig:
        before = rig.queue.fixed_buffers[0]
        assert before < REGION_BYTES
        populate(rig)
        assert rig.queue.fixed_buffers == (before + 2 * REGION_BYTES, 0)
        rig.queue.invalidate(OUT_IOVA, OUT_IOVA)
        assert rig.queue.fixed_buffers == (before + REGION_BYTES, 0)


def test_registered_memory_is_written_and_read(direct_fd: int, fd: int) -> None:
    with Rig(PARAMS, engine="uring", store_fd=direct_fd, cache="none", direct_align=PAGE) as rig:
        populate(rig)
        assert start(rig, 16, 2 * PAGE) == 1
        finish(rig, 16, 2 * PAGE)
        # Header and data lie apart: the rig's plain request has its data behind the header, where it is not aligned.
        assert rig.ask(rig.request(T_OUT, 16, b"r" * PAGE)) == (1, OK)
        assert os.pread(fd, PAGE, 2 * PAGE) == b"r" * PAGE
        populate(rig)  # other buffers in the places of the old ones
        assert rig.ask(rig.request(T_IN, 16, b"", PAGE)) == (PAGE + 1, OK)
        assert rig.memory.read(OUT_IOVA, PAGE) == b"r" * PAGE


def test_nothing_is_registered_where_it_does_not_pay(fd: int) -> None:
    with Rig(PARAMS, engine="uring", store_fd=fd) as rig:
        populate(rig)
        assert rig.queue.fixed_buffers == (0, 0)


MEMLOCK = """
import os, resource, sys
sys.path[:0] = [{here!r}, {root!r}]
from test_engines import *
fd = os.open({path!r}, os.O_RDWR | os.O_DIRECT)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)  # without CAP_IPC_LOCK
rig = Rig(PARAMS, engine="uring", store_fd=fd, cache="none", direct_align=PAGE)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
populate(rig)
print(rig.queue.fixed_buffers[1], rig.ask(rig.request(T_IN, 0, b"", PAGE)))
rig.close()
"""


def test_limit_of_locked_memory_costs_speed_alone(path: Path) -> None:
    code = MEMLOCK.format(here=str(HERE), root=str(HERE.parent.parent), path=str(path))
    ended = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == f"12 {(PAGE + 1, OK)}"


def test_refusal_is_told_once() -> None:
    worker = Worker.__new__(Worker)
    worker._memlock_noted = False
    worker._queue = SimpleNamespace(fixed_buffers=(0, 0))  # type: ignore[assignment]
    assert worker._note_memlock() == ""
    worker._queue = SimpleNamespace(fixed_buffers=(0, errno.ENOMEM))  # type: ignore[assignment]
    assert "raise the limit of locked memory" in worker._note_memlock()
    assert worker._note_memlock() == ""


# -- sqpoll


def test_the_kernel_submits(direct_fd: int) -> None:
    with Rig(PARAMS, engine="uring", store_fd=direct_fd, cache="none", direct_align=PAGE, sqpoll=True) as rig:
        for sector in (0, 8, 16, 400):
            assert start(rig, sector, PAGE) == 1
            finish(rig, sector, PAGE)
        assert rig.ask(rig.request(T_FLUSH)) == (1, OK)


def test_worker_with_sqpoll_says_so_and_sleeps(path: Path) -> None:
    config = make_config(name="sq", uri=f"file:{path}", engine="uring", cache="none", sqpoll=True, poll_us=0)
    with Device(config) as device, device.driver() as driver:
        assert device.queues()[0].engine == "uring (sqpoll)"
        for block in range(32):
            assert driver.read(block * PAGE, PAGE) == pattern(STORE_BYTES)[block * PAGE : (block + 1) * PAGE]


def test_sqpoll_needs_a_ring() -> None:
    with pytest.raises(ConfigError, match=r"backend\.sqpoll: engine 'sync' has no io_uring"):
        make_config(name="sq", uri="null:1M", engine="sync", sqpoll=True)
