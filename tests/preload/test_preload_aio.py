"""The functions of libaio.so.1, on the disk and on other files."""

from __future__ import annotations

import pytest
from preload_rig import Disk

pytestmark = pytest.mark.slow

# io_setup() and the others by ctypes. A request is (opcode, fd, buffer, offset); its number is the event's data.
AIO = """
import ctypes, itertools
PREAD, PWRITE, FSYNC, FDSYNC, PREADV, PWRITEV = 0, 1, 2, 3, 7, 8
libc = ctypes.CDLL(None)

class Iocb(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("key", ctypes.c_uint32), ("rw_flags", ctypes.c_int32),
                ("opcode", ctypes.c_uint16), ("priority", ctypes.c_int16), ("fd", ctypes.c_uint32),
                ("buffer", ctypes.c_uint64), ("length", ctypes.c_uint64), ("offset", ctypes.c_int64),
                ("reserved", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("resfd", ctypes.c_uint32)]

class Event(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("iocb", ctypes.c_uint64), ("result", ctypes.c_int64),
                ("more", ctypes.c_int64)]

class Time(ctypes.Structure):
    _fields_ = [("s", ctypes.c_int64), ("ns", ctypes.c_int64)]

class Context:
    def __init__(self, count):
        self.at = ctypes.c_void_p()
        self.kept = []
        self.numbers = itertools.count()
        assert libc.io_setup(count, ctypes.byref(self.at)) == 0
    def submit(self, *requests):
        iocbs = []
        for opcode, fd, buffer, offset, *more in requests:
            length = len(buffer) if buffer is not None else 0
            at = address(buffer) if length else 0
            iocb = Iocb(next(self.numbers), 0, 0, opcode, 0, fd, at, length, offset, 0, *(more or (0, 0)))
            self.kept.append((iocb, buffer))
            iocbs.append(iocb)
        array = (ctypes.c_void_p * len(iocbs))(*map(ctypes.addressof, iocbs))
        return libc.io_submit(self.at, ctypes.c_long(len(iocbs)), array)
    def events(self, least, most, timeout_s=None):
        found = (Event * most)()
        timeout = None if timeout_s is None else ctypes.byref(Time(int(timeout_s), int(timeout_s % 1 * 1e9)))
        count = libc.io_getevents(self.at, ctypes.c_long(least), ctypes.c_long(most), found, timeout)
        assert count >= 0, count
        return {one.data: one.result for one in found[:count]}
    def destroy(self):
        assert libc.io_destroy(self.at) == 0

import mmap
memory = mmap.mmap(-1, 1 << 20)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))

class Buffer:  # a part of the memory
    def __init__(self, offset, length):
        self.offset, self.length = offset, length
    def __len__(self):
        return self.length
    @property
    def raw(self):
        return memory[self.offset : self.offset + self.length]
    @raw.setter
    def raw(self, content):
        memory[self.offset : self.offset + self.length] = content

def address(buffer):
    return base + buffer.offset if isinstance(buffer, Buffer) else ctypes.addressof(buffer)
"""


def test_many_requests_and_their_events(disk: Disk) -> None:
    disk.python(
        AIO
        + """
fd = os.open(PATH, os.O_RDWR | os.O_DIRECT)
context = Context(32)
buffers = [Buffer(n * 4096, 4096) for n in range(32)]
for n, buffer in enumerate(buffers):
    buffer.raw = bytes([n + 1]) * 4096
assert context.submit(*((PWRITE, fd, buffer, n * 8192) for n, buffer in enumerate(buffers))) == 32
assert context.submit((FSYNC, fd, None, 0)) == -errno.EAGAIN  # 32 are in flight
first = context.events(0, 8, 0)  # as many as are finished
assert first.items() <= dict.fromkeys(range(32), 4096).items()
assert len(context.events(32 - len(first), 32)) == 32 - len(first)
assert context.events(0, 8, 0) == {}
assert context.events(0, 0) == {}
for buffer in buffers:
    buffer.raw = bytes(4096)
reads = [(PREAD, fd, buffer, n * 8192) for n, buffer in enumerate(buffers[:31])]
assert context.submit((FDSYNC, fd, None, 0), *reads) == 32
assert sorted(context.events(32, 32).values()) == [0] + [4096] * 31
assert all(buffer.raw == bytes([n + 1]) * 4096 for n, buffer in enumerate(buffers[:31]))
context.destroy()
assert libc.io_destroy(None) == -errno.EINVAL
"""
    )


def test_errors_and_ends_are_as_of_linux(disk: Disk) -> None:
    disk.python(
        AIO
        + """
size = os.stat(STORE).st_size
direct, buffered = os.open(PATH, os.O_RDWR | os.O_DIRECT), os.open(PATH, os.O_RDWR | os.O_SYNC)
reader = os.open(PATH, os.O_RDONLY)
context = Context(8)
block, odd = Buffer(0, 4096), Buffer(100, 700)
assert context.submit((PREAD, direct, block, size - 512), (PREAD, direct, block, size), (PWRITE, direct, block, size),
                      (PREAD, direct, odd, 0), (PREAD, direct, block, 100), (PWRITE, buffered, odd, 300),
                      (PREAD, buffered, odd, size - 100), (PREAD, direct, block, -512)) == 8
refused = dict.fromkeys((3, 4, 7), -errno.EINVAL)
assert context.events(8, 8) == {0: 512, 1: 0, 2: -errno.ENOSPC, 5: 700, 6: 100, **refused}
assert context.submit((PWRITE, reader, block, 0)) == -errno.EBADF
assert context.submit((99, direct, block, 0)) == -errno.EINVAL
assert context.submit((PREAD, 999, block, 0)) == -errno.EBADF
assert context.submit((PREAD, direct, block, 0), (PWRITE, reader, block, 0)) == 1
assert list(context.events(1, 8).values()) == [4096]
assert context.submit((PWRITE, buffered, block, 4096)) == 1  # O_SYNC: a flush follows
assert list(context.events(1, 1).values()) == [4096]
other = ctypes.c_void_p(1)
assert libc.io_setup(8, ctypes.byref(other)) == -errno.EINVAL
assert libc.io_setup(0, ctypes.byref(ctypes.c_void_p())) == -errno.EINVAL
"""
    )


def test_vectors(disk: Disk) -> None:
    disk.python(
        AIO
        + """
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
fd = os.open(PATH, os.O_RDWR | os.O_DIRECT)
context = Context(4)
memory[:8192] = b"a" * 4096 + b"b" * 4096
parts = (Iovec * 3)(Iovec(base, 4096), Iovec(None, 0), Iovec(base + 4096, 512))
assert context.submit((PWRITEV, fd, parts, 512)) == 1
parts[0].length = 0  # io_submit() has a copy
assert list(context.events(1, 1).values()) == [4608]
assert open(STORE, "rb").read(6000) == bytes(512) + b"a" * 4096 + b"b" * 512 + bytes(880)
"""
    )


def test_a_context_may_have_other_files(disk: Disk) -> None:
    disk.python(
        AIO
        + """
fd, store = os.open(PATH, os.O_RDWR | os.O_DIRECT), os.open(STORE, os.O_RDWR | os.O_DIRECT)
context = Context(8)
first, second, third = Buffer(0, 4096), Buffer(4096, 4096), Buffer(8192, 4096)
first.raw = b"f" * 4096
assert context.submit((PWRITE, fd, first, 0)) == 1
assert list(context.events(1, 1).values()) == [4096]
assert context.submit((PREAD, store, second, 0), (PREAD, fd, third, 0), (PREAD, store, third, 4096)) == 3
assert sorted(context.events(3, 3).values()) == [4096] * 3
assert second.raw == first.raw
assert context.submit((PREAD, store, second, 0)) == 1
assert list(context.events(1, 8).values()) == [4096]
assert context.events(0, 8, 0.01) == {}
context.destroy()
"""
    )


def test_an_eventfd_tells_of_events_in_the_ring(disk: Disk) -> None:
    disk.python(
        AIO
        + """
fd, told = os.open(PATH, os.O_RDWR | os.O_DIRECT), os.eventfd(0)
context = Context(4)
for turn in range(20):
    assert context.submit((PWRITE, fd, Buffer(0, 4096), 0, 1, told), (FDSYNC, fd, None, 0, 1, told)) == 2
    assert os.eventfd_read(told) == 2
    ring = (ctypes.c_uint32 * 4).from_address(context.at.value)  # as QEMU reads it
    assert (ring[3] - ring[2]) % ring[1] == 2
    if turn % 2:
        assert sorted(context.events(2, 2).values()) == [0, 4096]
    else:
        ring[2] = ring[3]
"""
    )


@pytest.mark.parametrize("waits_first", [True, False])
def test_threads_share_a_context(waits_first: bool, disk: Disk) -> None:
    disk.python(
        AIO
        + f"waits_first = {waits_first}\n"
        + """
import threading, time
fd = os.open(PATH, os.O_RDWR | os.O_DIRECT)
context = Context(64)
seen = {}
def reap():
    while len(seen) < 400:
        seen.update(context.events(1, 64))
def submit(base_turn):
    for turn in range(100):
        while context.submit((PREAD, fd, Buffer(base_turn * 4096, 4096), turn * 4096)) == -errno.EAGAIN:
            time.sleep(0.001)
reaper = threading.Thread(target=reap)
submitters = [threading.Thread(target=submit, args=(n,)) for n in range(4)]
if waits_first:
    reaper.start()
    time.sleep(0.05)
[one.start() for one in submitters]
if not waits_first:
    reaper.start()
[one.join() for one in submitters], reaper.join()
assert set(seen.values()) == {4096} and len(seen) <= 400
"""
    )


def test_a_wait_ends_with_its_time_and_with_a_signal(disk: Disk) -> None:
    disk.python(
        AIO
        + """
import signal, time
context = Context(4)
start = time.monotonic()
assert context.events(1, 4, 0.05) == {}
assert time.monotonic() - start >= 0.05
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.05)
found = (Event * 1)()
assert libc.io_getevents(context.at, ctypes.c_long(1), ctypes.c_long(1), found, None) == -errno.EINTR
"""
    )


def test_a_forked_child_has_no_contexts(disk: Disk) -> None:
    disk.python(
        AIO
        + """
fd = os.open(PATH, os.O_RDWR | os.O_DIRECT)
context = Context(4)
assert context.submit((PREAD, fd, Buffer(0, 4096), 0)) == 1
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    assert list(context.events(1, 1).values()) == [4096]
else:
    assert context.submit((PREAD, fd, Buffer(0, 4096), 0)) == -errno.EINVAL
    mine = Context(4)
    assert mine.submit((PREAD, fd, Buffer(0, 4096), 0)) == 1
    assert list(mine.events(1, 1).values()) == [4096]
    os._exit(0)
"""
    )


def test_a_buffered_write_waits_for_writers_of_parts_of_its_blocks(disk: Disk) -> None:
    disk.python(
        AIO
        + """
import threading
fd = os.open(PATH, os.O_RDWR)
context = Context(4)
lock_file = os.open(PATH + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
def lock(kind):
    fcntl.fcntl(lock_file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 1 << 62, 1000, 0))
lock(fcntl.F_WRLCK)
events = {}
def write():
    assert context.submit((PWRITE, fd, Buffer(0, 4096), 4096)) == 1
    events.update(context.events(1, 1))
writer = threading.Thread(target=write)
writer.start()
writer.join(0.3)
assert not events
lock(fcntl.F_UNLCK)
writer.join(20)
assert events == {0: 4096}
"""
    )
