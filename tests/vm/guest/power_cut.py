"""Inside of a guest, as root: write to a device over the guest's own disk until the machine is reset.

    power_cut.py RESULTS CACHE

The device's store is the disk, so that what a worker has written is lost with the machine unless it was flushed. Which
generation of each block was flushed for certain is in RESULTS/flushed, on the host, before anything else is written.
"""

from __future__ import annotations

import array
import mmap
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import guest  # noqa: E402

from vdusefast.driver import _driver  # noqa: E402

BLOCK_BYTES = 4096
BLOCKS = 256  # of each writer
WRITERS = 2
WRITES_A_FLUSH = 16
FLUSHES_MIN = 6  # of each writer, before the lights go out
SEED = 7


def write(node: str, place: int, journal_fd: int, done: list[int]) -> None:
    """Write to a slice of the device and flush it now and then, for ever."""
    numbers, generation = random.Random(place), 0
    written = array.array("I", bytes(4 * BLOCKS))
    fd = os.open(node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    with mmap.mmap(-1, BLOCK_BYTES) as buffer:
        while True:
            for _ in range(WRITES_A_FLUSH):
                generation += 1
                block = numbers.randrange(BLOCKS)
                at = (place * BLOCKS + block) * BLOCK_BYTES
                _driver.fill_block(memoryview(buffer), at, generation, SEED)
                assert os.pwritev(fd, [buffer], at) == BLOCK_BYTES
                written[block] = generation
            flushed = written.tobytes()
            os.fsync(fd)
            os.pwrite(journal_fd, flushed, 4 * BLOCKS * place)
            os.fsync(journal_fd)
            done[place] += 1


def kill_a_worker(name: str) -> None:
    """Kill a worker: flushed data survives, whether that worker or the next one has flushed it."""
    os.kill(guest.pids_of(name)[1], signal.SIGKILL)


def main() -> None:
    """Serve, write, and reset the machine at some moment."""
    guest.prepare()
    results, cache = Path(sys.argv[1]), sys.argv[2]
    node = guest.fork_server("vd0", f"file:{os.environ['VDUSEFAST_VM_DISK']}", queues=1, cache=cache)
    journal_fd = os.open(results / "flushed", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    done = [0] * WRITERS
    for place in range(WRITERS):
        threading.Thread(target=write, args=(node, place, journal_fd, done), daemon=True).start()
    guest.wait_for("the first flushes", lambda: min(done) >= 2, 60)
    kill_a_worker("vd0")
    guest.wait_for("more flushes", lambda: min(done) >= FLUSHES_MIN, 60)
    time.sleep(random.uniform(0, 0.5))
    Path("/proc/sysrq-trigger").write_text("b")
    time.sleep(60)


if __name__ == "__main__":
    main()
