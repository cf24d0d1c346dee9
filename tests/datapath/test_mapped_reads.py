"""Files on tmpfs are read through a mapping by the sync engine: same bytes, no page for a hole, no death by SIGBUS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from device_model import Params
from model import IOERR, OK, T_DISCARD, T_IN, T_OUT, T_WRITE_ZEROES, ranges
from rig import OUT_IOVA, Rig, file_engines

from vdusefast.api import Device
from vdusefast.config import make_config

HERE = Path(__file__).parent
PAGE = 4096
CHUNK = 2 << 20  # VF_MAP_CHUNK_SHIFT
LOOK_AGAIN = 64  # VF_MAP_LOOK_AGAIN
PARAMS = Params(capacity_sectors=(CHUNK + 8 * PAGE) // 512)


@pytest.fixture
def sparse() -> Iterator[int]:
    """A memfd of a chunk and a bit, with two pages of data around the chunk's end and one at its beginning."""
    fd = os.memfd_create("store", os.MFD_CLOEXEC)
    os.ftruncate(fd, CHUNK + 8 * PAGE)
    os.pwrite(fd, b"a" * PAGE, 0)
    os.pwrite(fd, b"b" * 2 * PAGE, CHUNK - PAGE)
    yield fd
    os.close(fd)


def read(rig: Rig, offset: int, size: int) -> bytes:
    """Return what the device says is there."""
    assert rig.ask(rig.request(T_IN, offset // 512, b"", size)) == (size + 1, OK)
    return rig.memory.read(OUT_IOVA, size)


def pages_held(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512 // PAGE


def test_holes_read_as_zeroes_and_stay_holes(sparse: int) -> None:
    with Rig(PARAMS, store_fd=sparse, engine="sync") as rig:
        assert rig.queue.maps_reads
        for _ in range(2):
            assert read(rig, 0, PAGE) == b"a" * PAGE
            assert read(rig, 0, 2 * PAGE) == b"a" * PAGE + bytes(PAGE)
            assert read(rig, PAGE, PAGE) == bytes(PAGE)
            assert read(rig, CHUNK - PAGE, 2 * PAGE) == b"b" * 2 * PAGE
            assert read(rig, CHUNK - 2 * PAGE, 4 * PAGE) == bytes(PAGE) + b"b" * 2 * PAGE + bytes(PAGE)
            assert read(rig, CHUNK + 7 * PAGE + 512, PAGE - 512) == bytes(PAGE - 512)
        assert pages_held(sparse) == 3


def test_what_others_write_into_holes_is_read(sparse: int) -> None:
    """Before and after the pages are asked about again."""
    with Rig(PARAMS, store_fd=sparse, engine="sync") as rig:
        assert read(rig, 4 * PAGE, PAGE) == bytes(PAGE)
        for turn in range(2 * LOOK_AGAIN + 2):
            wanted = bytes([turn]) * PAGE
            os.pwrite(sparse, wanted, 4 * PAGE)
            assert read(rig, 4 * PAGE, PAGE) == wanted


def test_pages_that_appeared_are_found(sparse: int) -> None:
    """A page that was once a hole is read through the mapping in the end, which a cut then shows."""
    with Rig(PARAMS, store_fd=sparse, engine="sync") as rig:
        assert read(rig, 4 * PAGE, PAGE) == bytes(PAGE)
        os.pwrite(sparse, b"n" * PAGE, 4 * PAGE)
        for _ in range(LOOK_AGAIN):
            assert read(rig, 4 * PAGE, PAGE) == b"n" * PAGE
        # Only a mapping lets the tail of a page behind the file's end be read.
        os.ftruncate(sparse, 4 * PAGE + 512)
        assert read(rig, 4 * PAGE, PAGE) == b"n" * 512 + bytes(PAGE - 512)


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
def test_discarded_pages_stay_away(sparse: int, kind: int) -> None:
    params = replace(PARAMS, discard_max_sectors=64, write_zeroes_max_sectors=64)
    with Rig(params, store_fd=sparse, engine="sync") as rig:
        assert read(rig, CHUNK - PAGE, 2 * PAGE) == b"b" * 2 * PAGE
        gone = ranges(((CHUNK - PAGE) // 512, 2 * PAGE // 512, 1 if kind == T_WRITE_ZEROES else 0))
        assert rig.ask(rig.request(kind, 0, gone)) == (1, OK)
        assert pages_held(sparse) == 1
        assert read(rig, CHUNK - PAGE, 2 * PAGE) == bytes(2 * PAGE)
        assert pages_held(sparse) == 1


def test_own_writes_are_read(sparse: int) -> None:
    with Rig(PARAMS, store_fd=sparse, engine="sync") as rig:
        for offset in (0, PAGE, CHUNK - 512):
            read(rig, offset, 512)
            assert rig.ask(rig.request(T_OUT, offset // 512, b"w" * 1024)) == (1, OK)
            assert read(rig, offset, 1024) == b"w" * 1024


def test_another_size_is_mapped_anew(sparse: int) -> None:
    with Rig(PARAMS, store_fd=sparse, engine="sync") as rig:
        assert read(rig, CHUNK - PAGE, 2 * PAGE) == b"b" * 2 * PAGE
        rig.queue.set_capacity(CHUNK // 512)
        os.ftruncate(sparse, CHUNK)
        os.ftruncate(sparse, 3 * CHUNK)
        rig.queue.set_capacity(3 * CHUNK // 512)
        assert rig.queue.maps_reads
        os.pwrite(sparse, b"c" * PAGE, 3 * CHUNK - PAGE)
        assert read(rig, CHUNK - PAGE, 2 * PAGE) == b"b" * PAGE + bytes(PAGE)
        assert read(rig, 3 * CHUNK - PAGE, PAGE) == b"c" * PAGE
        assert pages_held(sparse) == 3


@pytest.mark.parametrize("engine", file_engines())
def test_who_maps_and_who_does_not(sparse: int, engine: str, tmp_path: Path) -> None:
    with Rig(PARAMS, store_fd=sparse, engine=engine, map_reads=False) as rig:
        assert not rig.queue.maps_reads
        assert read(rig, 0, PAGE) == b"a" * PAGE
    with Rig(PARAMS, store_fd=sparse, engine=engine) as rig:
        assert rig.queue.maps_reads == (engine == "sync")
    reader, writer = os.pipe2(os.O_CLOEXEC)
    for fd in (reader, writer):
        with Rig(PARAMS, store_fd=fd, engine=engine) as rig:
            assert not rig.queue.maps_reads
        os.close(fd)


CUT = """
import os, sys
sys.path[:0] = [{here!r}, {root!r}]
from model import *
from rig import *
fd = os.memfd_create("store")
os.pwrite(fd, b"s" * 64 * 512, 0)
rig = Rig(engine="sync", store_fd=fd)
rig.queue.guard()
print(rig.ask(rig.request(T_IN, 0, b"", 4096)), rig.queue.maps_reads)
os.ftruncate(fd, 0)
print(rig.ask(rig.request(T_IN, 0, b"", 4096)), rig.queue.maps_reads, rig.counter("last_host_errno"))
os.pwrite(fd, b"t" * 64 * 512, 0)
print(rig.ask(rig.request(T_IN, 0, b"", 4096)), rig.memory.read(OUT_IOVA, 4096) == b"t" * 4096, rig.reason.name)
rig.close()
"""


def test_file_that_is_cut_is_an_error_and_no_death() -> None:
    code = CUT.format(here=str(HERE), root=str(HERE.parent.parent))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        f"{(4097, OK)} True",
        f"{(0, IOERR)} False 5",
        f"{(4097, OK)} True NONE",
    ]


@pytest.mark.parametrize(("mode", "wanted"), [("auto", "sync (mapped reads)"), ("off", "sync")])
def test_worker_says_whether_it_maps(mode: str, wanted: str) -> None:
    fd = os.memfd_create("store", os.MFD_CLOEXEC)
    os.pwrite(fd, b"m" * 65536, 0)
    try:
        config = make_config(name="mapped", uri=f"file:/proc/self/fd/{fd}", map=mode)
        with Device(config) as device, device.driver() as driver:
            assert driver.read(4 * PAGE, PAGE) == b"m" * PAGE
            assert device.queues()[0].engine == wanted
    finally:
        os.close(fd)
