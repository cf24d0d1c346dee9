"""Buffered writes from memory that the worker has not used before: as fast as others, and never of what is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from device_model import Params
from model import OK, T_FLUSH, T_OUT, WRITE, Desc, Region, header
from rig import IN_IOVA, OUT_IOVA, Rig, file_engines, store_on_disk

HERE = Path(__file__).parent
PAGE = 4096
STORE_BYTES = 2 << 20
DATA_PAGES = 254
ENGINES = [*file_engines(), "cached"]


def read_bytes() -> int:
    """Return how much this process has read from disks, in bytes."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def parts_of_write(rig: Rig, sector: int, lengths: Sequence[int]) -> list[Desc]:
    """Return a write of a segment of each length, one after the other, from the second page of the memory on."""
    rig.memory.write(IN_IOVA, header(T_OUT, sector))
    rig.memory.write(OUT_IOVA, b"\xff")
    parts, at = [Desc(IN_IOVA, 16)], IN_IOVA + PAGE
    for length in lengths:
        parts.append(Desc(at, length))
        at += length
    return [*parts, Desc(OUT_IOVA, 1, WRITE)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_write_from_memory_never_used_reads_nothing_but_its_ends(engine: str) -> None:
    with store_on_disk(STORE_BYTES) as path:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(fd, os.urandom(STORE_BYTES), 0)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            regions = [Region(IN_IOVA, (DATA_PAGES + 1) * PAGE), Region(OUT_IOVA, PAGE)]
            params = Params(capacity_sectors=STORE_BYTES // 512)
            with Rig(params, engine=engine, store_fd=fd, regions=regions) as rig:
                data = os.urandom(DATA_PAGES * PAGE)
                rig.memory.write(IN_IOVA + PAGE, data)
                before = read_bytes()
                assert rig.ask(parts_of_write(rig, 2, [len(data) // 2] * 2)) == (1, OK)  # not aligned to pages
                # Both ends are parts of pages; else one is read for each few pages mapped together.
                assert read_bytes() - before <= 4 * PAGE
                assert rig.ask(rig.request(T_FLUSH)) == (1, OK)
            assert os.pread(fd, len(data), 1024) == data
        finally:
            os.close(fd)


VANISH = """
import os, sys
sys.path[:0] = [{here!r}, {root!r}]
from test_cold_memory import *
fd = os.memfd_create("store")
os.pwrite(fd, b"s" * STORE_BYTES, 0)
regions = [Region(IN_IOVA, PAGE), Region(OUT_IOVA, PAGE), Region(IN_IOVA + PAGE, 8 * PAGE)]
rig = Rig(Params(capacity_sectors=STORE_BYTES // 512), engine={engine!r}, store_fd=fd, regions=regions)
rig.queue.guard()
rig.ring.make_available(rig.ring.put_chain(parts_of_write(rig, 0, {lengths!r})))
region = rig.memory.find(IN_IOVA + PAGE)
region.map.close()
os.ftruncate(region.fd, 2 * PAGE)
while (moved := rig.queue.poll()) > 0 or rig.queue.inflight_count:
    pass
print(moved, rig.reason.name, os.pread(fd, STORE_BYTES, 0).strip(b"s") == b"")
rig.queue.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[8 * PAGE], [PAGE, 3 * PAGE, 4 * PAGE]])
@pytest.mark.parametrize("engine", file_engines())
def test_nothing_is_written_of_memory_that_has_vanished(engine: str, lengths: list[int]) -> None:
    code = VANISH.format(here=str(HERE), root=str(HERE.parent.parent), engine=engine, lengths=lengths)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["-1", "MEMORY_GONE", "True"]
