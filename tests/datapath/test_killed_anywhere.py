"""A worker that is killed between any two of its instructions: the next one finishes what was taken, once and in order.

A child process serves a ring in steps of single instructions (ptrace) and is killed after so many; then another queue
takes over. Each number of instructions is a case of its own; a run tries every so many of them, the first one chosen by
chance, so that runs differ. VDUSEFAST_KILL_STRIDE=1 tries them all.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from device_model import Params
from model import F_IN_ORDER, F_PACKED, NEXT, SECTOR_BYTES, T_IN, T_OUT, WRITE, Desc, header
from packed_model import AVAIL, USED
from rig import IN_IOVA, OUT_IOVA, Rig

from vdusefast.worker import _datapath

pytestmark = pytest.mark.slow

STRIDE = int(os.environ.get("VDUSEFAST_KILL_STRIDE", "53"))
FOREVER = 1 << 40
MADV_DOFORK = 11
FORMATS = {"split": 0, "split in order": F_IN_ORDER, "packed": F_PACKED, "packed in order": F_PACKED | F_IN_ORDER}

STEPPER = """
#include <errno.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

int trace_me(void) { return (int)ptrace(PTRACE_TRACEME, 0, 0, 0); }

/* Let pid carry out `count` instructions, or those up to its next SIGSTOP. How many; -1 when it has ended, or so. */
long steps(int pid, long count)
{
	int status, pending = 0;

	for (long i = 0; i < count; i++) {
		if (ptrace(PTRACE_SINGLESTEP, pid, 0, pending) || waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
			return -1;
		if (WSTOPSIG(status) == SIGSTOP)
			return i;
		pending = WSTOPSIG(status) == SIGTRAP ? 0 : WSTOPSIG(status);
	}
	return count;
}

/* Let pid run up to its next SIGSTOP. 0, or -1. */
int go_on(int pid)
{
	int status;

	return ptrace(PTRACE_CONT, pid, 0, 0) || waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status) ? -1 : 0;
}
"""


@pytest.fixture(scope="module")
def stepper(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("stepper")
    source, library = directory / "stepper.c", directory / "stepper.so"
    source.write_text(STEPPER)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True, timeout=30)
    found = ctypes.CDLL(os.fspath(library))
    found.steps.restype, found.steps.argtypes = ctypes.c_long, [ctypes.c_int, ctypes.c_long]
    return found


@pytest.fixture(autouse=True)
def one_cpu() -> Iterator[None]:
    """Have both processes take turns on one CPU: else each step would wake the other CPU up, and then this one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


class Victim(Rig):
    """Three writes, two of them to one sector, and then a fourth that uses the first one's chain again."""

    A, B, C, D, LATER = (bytes([number]) * SECTOR_BYTES for number in (0xA1, 0xB2, 0xC3, 0xD4, 0xE5))

    def __init__(self, engine: str, ring: int = 0) -> None:
        """ring: the features of the ring's format."""
        # A packed ring in its second lap: what the first has left there must not be taken for anything.
        start_idx = 0 if ring & F_PACKED else None
        super().__init__(Params(features=Params.features | ring), engine=engine, start_idx=start_idx)
        self.size = self.ring.size
        writes = [
            self.put_write(i, sector, data) for i, (sector, data) in enumerate(((0, self.A), (0, self.B), (1, self.C)))
        ]
        self.memory.write(IN_IOVA + 0x8000, header(T_IN, 1))
        self.memory.write(OUT_IOVA + 0x8000, b"\xff" * (SECTOR_BYTES + 1))
        out = OUT_IOVA + 0x8000
        read = [Desc(IN_IOVA + 0x8000, 16), Desc(out, SECTOR_BYTES, WRITE), Desc(out + SECTOR_BYTES, 1, WRITE)]
        # The chains to make available, in this order; the fourth is the first again. Heads of a packed ring are ids.
        self.chains = [*writes, writes[0], read]
        if self.packed:
            self.heads = [0, 1, 2, 3, 4]
        else:
            self.heads = [self.ring.put_chain(chain) for chain in (*writes, read)]
            self.heads.insert(3, self.heads[0])
        self.offer(0, 3)

    def put_write(self, index: int, sector: int, data: bytes) -> list[Desc]:
        at = IN_IOVA + 0x1000 * index
        self.memory.write(at, header(T_OUT, sector) + data)
        self.memory.write(OUT_IOVA + index, b"\xff")
        return [Desc(at, 16), Desc(at + 16, SECTOR_BYTES), Desc(OUT_IOVA + index, 1, WRITE)]

    def offer(self, first: int, count: int) -> None:
        """Make chains available, as numbers `first` and on: a second time changes nothing."""
        for place in range(first, first + count):
            if self.packed:
                self.put_packed(place)
            else:
                self.memory.write(self.ring.avail + 4 + 2 * (place % self.size), struct.pack("<H", self.heads[place]))
        if not self.packed:
            self.memory.write(self.ring.avail + 2, struct.pack("<H", first + count))

    def put_packed(self, place: int) -> None:
        """Three descriptors side by side, and the flags of the first one last."""
        for i in (1, 2, 0):
            part = self.chains[place][i]
            flags = part.flags | USED | (NEXT if i < 2 else 0)
            self.ring.put_desc(3 * place + i, Desc(part.addr, part.len, flags, self.heads[place]))

    def offer_more(self) -> None:
        """The driver's second turn, once the first three are completed."""
        self.memory.write(IN_IOVA + 16, self.D)
        self.memory.write(OUT_IOVA, b"\xff")
        self.offer(3, 2)

    def packed_flags(self, place: int) -> int:
        return int(struct.unpack("<H", self.memory.read(self.ring.desc + 48 * place + 14, 2))[0])

    def told(self) -> list[int]:
        """The heads or ids that the driver was told of, in order."""
        count = place = 0
        if not self.packed:
            count = self.ring.used_idx
            if self.in_order:  # an entry names the last of a run; where the runs were, nobody can see any more
                return self.heads[:count]
            return [self.ring.used_elem(place)[0] for place in range(count)]
        while place < 5 and not self.packed_flags(place) & (AVAIL | USED):
            buffer_id = struct.unpack("<H", self.memory.read(self.ring.desc + 48 * place + 12, 2))[0]
            assert buffer_id == place or (self.in_order and buffer_id > place)
            place = buffer_id + 1
        return self.heads[:place]

    @property
    def offered_count(self) -> int:
        if self.packed:
            return next((place for place in range(5) if self.packed_flags(place) & AVAIL), 5)
        return int(struct.unpack("<H", self.memory.read(self.ring.avail + 2, 2))[0])

    def serve(self, queue: _datapath.Queue) -> None:
        while queue.poll() > 0 or queue.inflight_count:
            pass

    def turns(self, stop: Callable[[], object]) -> None:
        """Run in the child: serve, be the driver for a moment, serve; stop before and after each."""
        stop()
        self.serve(self.queue)
        stop()
        self.offer_more()
        stop()
        self.serve(self.queue)
        stop()

    def another(self) -> _datapath.Queue:
        """A queue as the next worker has it: nothing of the dead one's but the shared pages."""
        params = self.params
        queue = _datapath.Queue(self.pages, queue_size=params.queue_size_max, capacity_sectors=params.capacity_sectors)
        queue.set_port_none(self.irq_fd)
        queue.open_engine(self.engine, store="file", fd=self.store_fd, size_bytes=len(self.store))
        for region in self.memory.regions:
            queue.map_region(region.start, region.last, region.perm, region.fd, region.offset)
        return queue

    def recover(self, queue: _datapath.Queue) -> None:
        queue.start(**self.start_words(0), recover=True)
        self.serve(queue)

    def sector(self, number: int) -> bytes:
        return os.pread(self.store_fd, SECTOR_BYTES, number * SECTOR_BYTES)

    def check_told(self) -> bytes:
        """Check that every published answer is true. Returns what sector 1 holds from now on, which may be changed."""
        told = len(self.told())
        assert told <= self.offered_count
        assert self.told() == self.heads[:told]
        for place in range(min(told, 3)):
            if not (place == 0 and self.offered_count > 3):
                assert self.memory.read(OUT_IOVA + place, 1) == b"\0"
        if told >= 2:
            assert self.sector(0) in (self.B, self.D)
        if told >= 4:
            assert self.sector(0) == self.D
        if told < 3:
            return self.C
        assert self.sector(1) == self.C
        if self.offered_count > 3:
            return self.C  # the read is under way
        os.pwrite(self.store_fd, self.LATER, SECTOR_BYTES)  # as by another queue: the write before it is over
        return self.LATER

    def check_end(self, sector_1: bytes) -> None:
        if self.offered_count == 3:
            assert len(self.told()) == 3
            assert self.sector(0) == self.B
            self.offer_more()
            queue = self.another()
            self.recover(queue)
            queue.quiesce()
            queue.close()
        assert self.told() == self.heads
        assert (self.sector(0), self.sector(1)) == (self.D, sector_1)
        assert self.memory.read(OUT_IOVA, 3) == bytes(3)
        assert self.memory.read(OUT_IOVA + 0x8000, SECTOR_BYTES + 1) == sector_1 + b"\0"


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def let_fork_copy_mappings() -> None:
    """Have the child get the driver's memory, which a worker keeps from its children: here the child is the worker."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = last = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(address, 16) for address in found.groups())
        elif line.startswith("VmFlags:") and "dc" in line.split():
            assert libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DOFORK) == 0


def start(stepper: ctypes.CDLL, work: Callable[[Callable[[], object]], object], turn: int) -> int:
    """Start a child that does `work` and stands before its turn 0 or 1. Returns its pid."""
    let_fork_copy_mappings()
    pid = os.fork()
    if pid == 0:
        stepper.trace_me()
        work(stop)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSTOPPED(status)
    for _ in range(2 * turn):
        assert stepper.go_on(pid) == 0
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def count_steps(stepper: ctypes.CDLL, turn: int, ring: int) -> int:
    """Return how many instructions a turn has."""
    with Victim("sync", ring) as victim:
        pid = start(stepper, victim.turns, turn)
        count = int(stepper.steps(pid, FOREVER))
        kill(pid)
    assert count > 0
    return count


def places(total: int, stride: int) -> Iterator[int]:
    return iter(range(random.randrange(1, stride + 1), total, stride))


def kill_at(stepper: ctypes.CDLL, victim: Victim, turn: int, place: int) -> None:
    pid = start(stepper, victim.turns, turn)
    assert stepper.steps(pid, place) >= 0
    kill(pid)


def finish(victim: Victim, sector_1: bytes) -> None:
    queue = victim.another()
    victim.recover(queue)
    queue.quiesce()
    queue.close()
    victim.check_end(sector_1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ring", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("turn", [0, 1])
def test_a_worker_killed_at_any_instruction_loses_and_repeats_nothing(
    stepper: ctypes.CDLL, turn: int, ring: int
) -> None:
    seen = set()
    for place in places(count_steps(stepper, turn, ring), 2 * STRIDE if ring else STRIDE):
        with Victim("sync", ring) as victim:
            kill_at(stepper, victim, turn, place)
            seen.add((len(victim.told()), victim.offered_count))
            finish(victim, victim.check_told())
    assert [{(0, 3), (3, 3)}, {(3, 5), (5, 5)}][turn] <= seen  # killed before and behind the turn's publication


def recover_between_stops(victim: Victim, queue: _datapath.Queue, stop: Callable[[], object]) -> None:
    stop()
    victim.recover(queue)
    stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ring", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("turn", [0, 1])
def test_a_worker_killed_while_it_recovers_is_recovered_from(stepper: ctypes.CDLL, turn: int, ring: int) -> None:
    total = count_steps(stepper, turn, ring)
    for place in places(total, (16 if ring else 8) * STRIDE):
        with Victim("sync", ring) as victim:
            kill_at(stepper, victim, turn, place)
            sector_1 = victim.check_told()
            # Once: a third death at one request would have it answered with an error.
            second = victim.another()
            pid = start(stepper, partial(recover_between_stops, victim, second), 0)
            assert stepper.steps(pid, random.randrange(1, total)) >= 0
            kill(pid)
            second.close()
            finish(victim, sector_1)
