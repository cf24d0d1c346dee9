"""A store without space: IOERR for the driver, a count for people, and writes succeed once there is space again."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
from model import IOERR, OK, T_OUT
from rig import Rig, file_engines, pattern

from vdusefast import Device, make_config

MIB = 1 << 20


def test_writes_succeed_once_space_is_freed(tmp_path: Path) -> None:
    """By the engine that uses the descriptor at each request, so that another file can take its place."""
    path = tmp_path / "store"
    path.write_bytes(bytes(64 * 512))
    fd = os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)
    try:
        with Rig(engine="sync", store_fd=fd) as rig:
            for count in (1, 2, 3):
                assert rig.ask(rig.request(T_OUT, 0, pattern(512))) == (1, IOERR)
                assert (rig.counter("host_errors"), rig.counter("host_enospc")) == (count, count)
            space = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(space, fd, inheritable=False)
            os.close(space)
            assert rig.ask(rig.request(T_OUT, 0, pattern(512))) == (1, OK)
            assert (rig.counter("host_errors"), rig.counter("last_host_errno")) == (3, errno.ENOSPC)
    finally:
        os.close(fd)
    assert path.read_bytes()[:512] == pattern(512)


@pytest.mark.parametrize("engine", file_engines())
def test_device_goes_on_after_writes_that_the_host_refuses(engine: str, tmp_path: Path) -> None:
    """The limit of a file's size, which needs no root: a write that begins below it is short first, then refused."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    os.truncate(path, 4 * MIB)
    with Device(make_config(name="d0", uri=f"file:{path}", engine=engine)) as device, device.driver() as driver:
        pid = device.queues()[0].pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (2 * MIB, before[1]))
        driver.write(0, pattern(4096))
        for at in (3 * MIB, 2 * MIB - 2048):
            with pytest.raises(OSError, match="Input/output error"):
                driver.write(at, pattern(4096))
        assert driver.read(0, 4096) == pattern(4096)
        driver.flush()
        stats = device.stats()
        assert (stats.errors, stats.counters["host_errors"]) == (2, 2)
        assert stats.last_host_errno == errno.EFBIG
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        for at in (3 * MIB, 2 * MIB - 2048):
            driver.write(at, pattern(4096))
            assert driver.read(at, 4096) == pattern(4096)
        assert device.stats().errors == 2
        assert device.queues()[0].pid == pid
    assert device.failure is None
