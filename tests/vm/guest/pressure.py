"""Inside of a guest, as root: memory is short, and pages are cleaned only by writing them to a device of ours.

    pressure.py SECONDS

The device is over a file on the guest's disk. One process uses half of the memory and checks it as it goes round;
another one writes files without flushing any. Both must get on all the time, and everything that was written must be
there at the end. Prints what was done as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import guest  # noqa: E402
from guest import MIB  # noqa: E402

from vdusefast.host import reclaim  # noqa: E402

PAGE_BYTES = mmap.PAGESIZE
DIRTY_BYTES = 32 * MIB
DATA_BYTES = 192 * MIB
FILE_BYTES, FILES = 32 * MIB, 3
# Of all memory. Bounce pages, locked pages and the kernel have another 0.4, and without swap none of it can go: with
# 0.5 the kernel ends the hog as soon as it has touched all of its share.
HOG_SHARE = 0.3
STALL_MAX_S = 60.0  # a busy host computes nothing for seconds, a hung task for ever
LOOK_S = 1.0


def hog(count_step: Callable[[], None]) -> None:
    """Go round through memory: each page must hold what the round before has left in it."""
    page_count = int(total_memory() * HOG_SHARE) // PAGE_BYTES
    with mmap.mmap(-1, page_count * PAGE_BYTES) as memory:
        turn = 0
        while True:
            for page in range(page_count):
                at = page * PAGE_BYTES
                found = int.from_bytes(memory[at : at + 8], "little")
                wanted = turn * page_count + page if turn else 0
                assert found == wanted, f"page {page}: {found}, expected {wanted}"
                memory[at : at + 8] = ((turn + 1) * page_count + page).to_bytes(8, "little")
                if page % 1024 == 0:
                    count_step()
            turn += 1


def write(directory: Path, count_step: Callable[[], None]) -> None:
    """Write one file after another, over the oldest; each begins with the digest of the rest."""
    number = 0
    while True:
        body = os.urandom(64 << 10) * (FILE_BYTES // (64 << 10) - 1)
        with (directory / f"f{number % FILES}").open("wb", buffering=0) as file:
            file.write(hashlib.blake2b(body).digest())
            for at in range(0, len(body), MIB):
                file.write(body[at : at + MIB])
                count_step()
        number += 1


def check_files(directory: Path) -> int:
    """Compare what is on the disk, once nothing of it is cached. Returns how many files were whole and right."""
    right = 0
    for path in sorted(directory.glob("f*")):
        data = path.read_bytes()
        digest, body = data[:64], data[64:]
        if len(body) == FILE_BYTES - (64 << 10):  # the one that was being written is cut
            assert hashlib.blake2b(body).digest() == digest, f"{path} holds something else"
            right += 1
    return right


def total_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES


class Load:
    """A process that counts how far it has got."""

    def __init__(self, name: str, work: Callable[[Callable[[], None]], None]) -> None:
        self.name = name
        self._shared = mmap.mmap(-1, 8)
        self._last, self._since_s = 0, time.monotonic()
        self.longest_stall_s = 0.0
        self.pid = os.fork()
        if self.pid == 0:
            self._work(work)

    def _work(self, work: Callable[[Callable[[], None]], None]) -> None:
        status = 1
        try:
            work(self._count_step)
        except BaseException as error:
            print(f"{self.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)

    def _count_step(self) -> None:
        self._shared[:8] = (self.count + 1).to_bytes(8, "little")

    @property
    def count(self) -> int:
        return int.from_bytes(self._shared[:8], "little")

    def look(self) -> None:
        """Raise AssertionError when it has ended, or has not got on for long."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        assert pid == 0, f"{self.name} has ended: status {status}"
        count, now_s = self.count, time.monotonic()
        stalled_s = now_s - self._since_s
        self.longest_stall_s = max(self.longest_stall_s, stalled_s)
        assert stalled_s < STALL_MAX_S, f"{self.name} hangs since {stalled_s:.0f} s:\n{guest.where_processes_wait()}"
        if count != self._last:
            self._last, self._since_s = count, now_s

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended, which look() says
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def check_protection(name: str) -> str:
    """Server and workers are marked, in all threads, locked, and the last to be killed. Returns what `show` says."""
    for pid in guest.pids_of(name):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            try:
                flags = int((thread / "stat").read_text().rpartition(")")[2].split()[6])
            except OSError:  # it has ended meanwhile
                continue
            assert flags & reclaim.PF_IO_FLUSHER == reclaim.PF_IO_FLUSHER, f"{thread} is no I/O flusher"
        protection = reclaim.look(pid)
        assert protection is not None
        assert protection.locked_bytes > 8 * MIB, f"pid {pid}: {protection.locked_bytes} bytes are locked"
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == reclaim.OOM_SCORE_ADJ
    said = str(guest.info(name)["reclaim"])
    assert said.startswith("I/O flushers, "), said
    return said


@contextlib.contextmanager
def mounted(node: str, place: Path) -> Iterator[Path]:
    """Have a new file system of a disk at `place`."""
    guest.sh("mkfs.ext4", "-q", "-F", node, timeout_s=120)
    place.mkdir()
    guest.sh("mount", node, place)
    try:
        yield place
    finally:
        guest.sh("umount", place, timeout_s=300)


def live(seconds: float, data: Path) -> dict[str, object]:
    """Keep both loads going for so long. Returns what they did."""
    loads = [Load("the writer", lambda count_step: write(data, count_step)), Load("the hog", hog)]
    try:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(LOOK_S)
            for load in loads:
                load.look()
    finally:
        for load in loads:
            load.end()
    writer, hogging = loads
    return {
        "written_mib": writer.count,
        "mib_s": round(writer.count / seconds, 1),
        "hog_pages": hogging.count * 1024,
        "longest_stall_s": round(max(load.longest_stall_s for load in loads), 1),
    }


def main(seconds: float) -> int:
    """Run the command line; returns the exit status."""
    guest.prepare()
    for key, value in (("dirty_bytes", DIRTY_BYTES), ("dirty_background_bytes", DIRTY_BYTES // 2)):
        Path(f"/proc/sys/vm/{key}").write_text(str(value))
    with mounted(os.environ["VDUSEFAST_VM_DISK"], guest.WORK / "back") as back:
        path = back / "data.img"
        guest.sh("fallocate", "-l", DATA_BYTES, path)
        node = guest.fork_server("data", f"file:{path}")
        said = check_protection("data")
        with mounted(node, guest.WORK / "data") as data:
            found = live(seconds, data)
            guest.sh("sync", "-f", data, timeout_s=300)
            Path("/proc/sys/vm/drop_caches").write_text("3")
            found |= {"files_right": check_files(data), "reclaim": said}
        assert guest.info("data")["failure"] == ""
        guest.delete("data")
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
