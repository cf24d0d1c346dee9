"""A queue whose device changes its size: requests are checked against the new end, and none after it is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from model import IOERR, OK, T_DISCARD, T_IN, T_OUT, ranges
from rig import Rig, file_engines, pattern


@pytest.mark.parametrize("engine", file_engines())
def test_requests_are_checked_against_the_size_of_now(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with Rig(engine=engine, store_fd=fd) as rig:
            end = rig.params.capacity_sectors
            for sectors in (end, end + 100, end - 8, 1, end):
                rig.queue.set_capacity(sectors)
                assert rig.ask(rig.request(T_OUT, sectors - 1, pattern(512))) == (1, OK)
                assert rig.ask(rig.request(T_IN, sectors - 1, b"", 512)) == (513, OK)
                assert rig.ask(rig.request(T_OUT, sectors, pattern(512))) == (1, IOERR)
                assert rig.ask(rig.request(T_OUT, sectors - 1, pattern(1024))) == (1, IOERR)
                assert rig.ask(rig.request(T_DISCARD, 0, ranges((0, sectors + 1, 0)))) == (1, IOERR)
    finally:
        os.close(fd)


def test_memory_does_not_grow() -> None:
    with Rig(engine="memory") as rig:
        end = rig.params.capacity_sectors
        rig.queue.set_capacity(end - 1)
        with pytest.raises(ValueError, match="smaller than the device"):
            rig.queue.set_capacity(end + 1)
        assert rig.ask(rig.request(T_IN, end - 1, b"", 512)) == (0, IOERR)
        rig.queue.set_capacity(end)
        assert rig.ask(rig.request(T_IN, end - 1, b"", 512)) == (513, OK)


def test_queue_that_is_closed_has_no_size() -> None:
    rig = Rig(engine="memory")
    rig.close()
    with pytest.raises(ValueError, match="closed"):
        rig.queue.set_capacity(1)
