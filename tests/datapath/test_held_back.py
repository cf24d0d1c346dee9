"""Storage that hangs holds nothing back that is finished, nor the interrupt for it.

The store's calls are slowed down by a library that is loaded before libc.
"""

from __future__ import annotations

import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vdusefast
from vdusefast.bench.torture.plan import RINGS
from vdusefast.control.worker_process import default_command
from vdusefast.driver.loopback_driver import LoopbackDriver

MIB = 1 << 20
PAGE = 4096
HANG_S = 4
SOON_S = 2  # not a measurement: a machine full of other work takes its time
SLOW_AT = 2 * MIB
MERGED_SLOW_AT = 1 * MIB
T_OUT, T_FLUSH = 1, 4
SLOW_CALLS = f"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/uio.h>
#include <unistd.h>

ssize_t pwrite64(int fd, const void *buf, size_t n, off_t at)
{{
	static ssize_t (*real)(int, const void *, size_t, off_t);
	if (!real)
		real = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
	if (at >= {SLOW_AT})
		sleep({HANG_S});
	return real(fd, buf, n, at);
}}
ssize_t pwrite(int fd, const void *buf, size_t n, off_t at)
{{
	return pwrite64(fd, buf, n, at);
}}
ssize_t pwritev64v2(int fd, const struct iovec *iov, int count, off_t at, int flags)
{{
	static ssize_t (*real)(int, const struct iovec *, int, off_t, int);
	if (!real)
		real = (ssize_t(*)(int, const struct iovec *, int, off_t, int))dlsym(RTLD_NEXT, "pwritev64v2");
	if (at >= {MERGED_SLOW_AT})
		sleep(1);
	return real(fd, iov, count, at, flags);
}}
ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t at, int flags)
{{
	return pwritev64v2(fd, iov, count, at, flags);
}}
int fdatasync(int fd)
{{
	(void)fd;
	return sleep({HANG_S});
}}
"""

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slow") / "slow.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", path, "-ldl"], input=SLOW_CALLS, text=True, check=True
    )
    return path


@contextmanager
def served(tmp_path: Path, library: Path, **settings: object) -> Iterator[LoopbackDriver]:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 * MIB))
    config = vdusefast.make_config(name="held", uri=f"file:{image}", **settings)
    command = ["env", f"LD_PRELOAD={library}", *default_command()]
    with vdusefast.Device(config, worker_command=command) as device, device.driver() as driver:
        yield driver


def told_within(driver: LoopbackDriver, requests: list[tuple[int, int]], want: int) -> tuple[list[int], float]:
    """Offer requests (type, offset) of a page in one batch; return the first `want` to be told, and after how long."""
    ring = driver.ring(0)
    head, data = driver.add_region(PAGE), driver.add_region(PAGE)
    data.buf[:] = b"d" * PAGE
    for number, (kind, offset_bytes) in enumerate(requests):
        at = 64 * number
        struct.pack_into("<IIQ", head.buf, at, kind, 0, offset_bytes // 512)
        head.buf[at + 32] = 0xFF
        payload = [(data.iova, PAGE, False)] if kind == T_OUT else []
        ring.add([(head.iova + at, 16, False), *payload, (head.iova + at + 32, 1, True)], number)
    ring.publish()
    start = time.monotonic()
    ring.kick()
    told: list[int] = []
    while len(told) < want and time.monotonic() < start + 2 * HANG_S:
        ring.wait(100)
        told += [cookie for _, cookie, _ in ring.reap()]
    elapsed_s = time.monotonic() - start
    while len(told) < len(requests) and time.monotonic() < start + 4 * HANG_S:
        ring.wait(100)
        told += [cookie for _, cookie, _ in ring.reap()]
    assert sorted(told) == list(range(len(requests)))
    assert all(head.buf[64 * number + 32] == 0 for number in range(len(requests)))
    return told[:want], elapsed_s


@pytest.mark.parametrize(
    ("engine", "hang", "poll"),
    [("sync", T_OUT, "adaptive"), ("sync", T_FLUSH, "never"), ("cached", T_OUT, "never")],
)
def test_what_is_done_does_not_wait_for_what_hangs(
    tmp_path: Path, library: Path, engine: str, hang: int, poll: str
) -> None:
    slow = (hang, SLOW_AT if hang == T_OUT else 0)
    with served(tmp_path, library, engine=engine, poll=poll, map="off") as driver:
        told, elapsed_s = told_within(driver, [(T_OUT, 0), slow], 1)
    assert told == [0]
    assert elapsed_s < SOON_S


def test_what_was_merged_does_not_wait_either(tmp_path: Path, library: Path) -> None:
    """Two writes that were held back, and a later one that may not be shown before them."""
    pages = [0, 1, 2, 9]
    with served(tmp_path, library, engine="sync", map="off") as driver:
        told, elapsed_s = told_within(driver, [*((T_OUT, PAGE * page) for page in pages), (T_OUT, SLOW_AT)], 4)
    assert sorted(told) == [0, 1, 2, 3]
    assert elapsed_s < SOON_S


@pytest.mark.parametrize("ring", sorted(RINGS.keys() - {"default"}))
def test_what_was_published_meanwhile_leaves_others_their_places(tmp_path: Path, library: Path, ring: str) -> None:
    """Writes that are collected wait in a call that hangs. Those before them are completed then, in another thread.

    The request that made the call has to wait for its turn then, and keeps its place.
    """
    slow = MERGED_SLOW_AT // PAGE
    pages = [0, 1, 2, 9, slow, slow + 1, slow + 2, *range(20, 60, 3)]
    with served(tmp_path, library, engine="sync", map="off", **RINGS[ring]) as driver:
        ring_of_driver = driver.ring(0)
        head, data = driver.add_region(PAGE), driver.add_region(PAGE * len(pages))
        for number, page in enumerate(pages):
            at = 64 * number
            data.buf[PAGE * number : PAGE * (number + 1)] = bytes([65 + number]) * PAGE
            struct.pack_into("<IIQ", head.buf, at, T_OUT, 0, page * PAGE // 512)
            head.buf[at + 32] = 0xFF
            payload = (data.iova + PAGE * number, PAGE, False)
            ring_of_driver.add([(head.iova + at, 16, False), payload, (head.iova + at + 32, 1, True)], number)
        ring_of_driver.publish()
        ring_of_driver.kick()
        told: list[int] = []
        until_s = time.monotonic() + 4 * HANG_S
        while len(told) < len(pages) and time.monotonic() < until_s:
            ring_of_driver.wait(100)
            told += [cookie for _, cookie, _ in ring_of_driver.reap()]
        assert sorted(told) == list(range(len(pages)))
        assert [head.buf[64 * number + 32] for number in range(len(pages))] == [0] * len(pages)
    stored = (tmp_path / "disk.img").read_bytes()
    assert [stored[PAGE * page : PAGE * (page + 1)] for page in pages] == [
        bytes([65 + number]) * PAGE for number in range(len(pages))
    ]
