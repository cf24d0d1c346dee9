"""Memory of a program that is not what it said harms that program alone."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from disk_rig import ended, load, served, wait_until

from vdusefast.driver import preload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

WRITE = """
import ctypes, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
assert os.pwrite(fd, bytes(4096), 60 << 20) == 4096
libc = ctypes.CDLL(None)
libc.pwrite(fd, ctypes.c_void_p(4096), ctypes.c_size_t(4096), ctypes.c_long(60 << 20))
"""
# A region is unmapped while requests from another thread may use it; what is sent then is another mapping at its place.
UNMAP = """
import ctypes, mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
at = libc.mmap(None, 65536, 3, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1, 0)
stopping = False
def read():
    while not stopping:
        assert libc.pread(fd, ctypes.c_void_p(at), ctypes.c_size_t(16384), ctypes.c_long(0)) == 16384
threads = [threading.Thread(target=read) for _ in range(2)]
for thread in threads:
    thread.start()
for n in range(300):
    flags = (mmap.MAP_SHARED if n % 2 else mmap.MAP_PRIVATE) | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    assert libc.mmap(ctypes.c_void_p(at), 65536, 3, flags, -1, 0) == at
stopping = True
for thread in threads:
    thread.join()
"""


def test_a_write_from_no_memory_ends_its_program_alone() -> None:
    with served() as (_device, server):
        other = load(server, seconds=2)
        done = subprocess.run(
            [sys.executable, "-I", "-c", WRITE, server.path], env=preload.environment(server), timeout=60, check=False
        )
        assert done.returncode == -signal.SIGSEGV
        ended(other)
        wait_until(lambda: not server.users, "no user is left")
        assert server.figures()["resets"] == 0


@pytest.mark.parametrize("queues", [1, 4])
def test_memory_may_change_while_threads_read_to_it(queues: int) -> None:
    with served(queues=queues) as (device, server):
        done = subprocess.run(
            [sys.executable, "-I", "-c", UNMAP, server.path],
            env=preload.environment(server),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert device.stats().errors == 0
        assert server.failure is None
