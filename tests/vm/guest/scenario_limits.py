"""The limits of a disk: vdX has those of its store, so that programs choose as they would on the store."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import guest
from checks import check
from guest import MIB

LIMITS = (
    *("queue/logical_block_size", "queue/physical_block_size", "queue/minimum_io_size", "queue/optimal_io_size"),
    *("queue/discard_granularity", "queue/rotational", "alignment_offset"),
)
DEBUG = Path("/sys/bus/pseudo/drivers/scsi_debug")


def limits_of(node: str) -> dict[str, int]:
    return {name: guest.read_int(Path("/sys/block") / Path(node).name / name) for name in LIMITS}


@contextlib.contextmanager
def striped(count: int, size_bytes: int) -> Iterator[str]:
    """Give the node of stripes of 64 KiB over loop devices."""
    loops = []
    guest.sh("modprobe", "loop")
    try:
        for index in range(count):
            path = guest.image(f"leg{index}", size_bytes)
            loops.append(guest.sh("losetup", "--find", "--show", path).strip())
        legs = " ".join(f"{node} 0" for node in loops)
        guest.sh("modprobe", "dm_mod")
        table = f"0 {count * size_bytes // 512} striped {count} 128 {legs}"
        guest.sh("dmsetup", "create", "stripes", "--noudevsync", "--table", table)
        (name,) = Path("/sys/block").glob("dm-*/dm/name")
        yield f"/dev/{name.parent.parent.name}"
        guest.sh("dmsetup", "remove", "--noudevsync", "stripes")
    finally:
        for index, node in enumerate(loops):
            guest.sh("losetup", "--detach", node)
            (guest.WORK / f"leg{index}").unlink()


@contextlib.contextmanager
def scsi_debug(**parameters: int) -> Iterator[str]:
    """Give the node of a disk of the kernel's test driver: it is in memory, and tells what of it is allocated."""
    before = set(Path("/sys/block").iterdir())
    guest.sh("modprobe", "sd_mod")
    guest.attempt("modprobe", "-r", "scsi_debug")  # of a check that failed
    guest.sh("modprobe", "scsi_debug", *(f"{key}={value}" for key, value in parameters.items()))
    guest.wait_for("the disk", lambda: set(Path("/sys/block").glob("sd*")) - before, 20)
    (disk,) = set(Path("/sys/block").glob("sd*")) - before
    guest.wait_for("its node", (Path("/dev") / disk.name).exists, 20)
    # It copies sector by sector, and searches for each of them from the start of the request: a second of an emulated
    # CPU for 4 MiB, in which the kernel does nothing else.
    (disk / "queue/max_sectors_kb").write_text("128")
    yield f"/dev/{disk.name}"  # where a check fails, what it made is removed first, and this with it
    guest.wait_for("the disk to be free", lambda: guest.attempt("modprobe", "-r", "scsi_debug").returncode == 0, 20)


def allocated_units() -> int:
    """Return how many of the units that the disk of scsi_debug frees at a time are in use."""
    total = 0
    for part in filter(None, (DEBUG / "map").read_text().strip().split(",")):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def mkfs_xfs(node: str) -> list[str]:
    """Return what mkfs.xfs would make of a disk, without the name."""
    text = guest.sh("mkfs.xfs", "-N", "-f", node)
    return [re.sub(r"meta-data=\S+ +", "", line) for line in text.splitlines()]


@check(limit_s=60)
def file_system_is_made_for_the_stripes_of_the_store() -> dict[str, object]:
    """mkfs.xfs chooses the same for vdX as for the striped disk behind it."""
    with striped(4, 80 * MIB) as store:
        wanted, chosen = limits_of(store), mkfs_xfs(store)
        with guest.device("vd0", f"file:{store}", queues=2) as node:
            found = limits_of(node)
            assert found == wanted, (found, wanted)
            assert mkfs_xfs(node) == chosen, (mkfs_xfs(node), chosen)
    assert wanted["queue/optimal_io_size"] == 4 * wanted["queue/minimum_io_size"] == 262144, wanted
    return {"limits": wanted, "mkfs.xfs": [line for line in chosen if "sunit" in line]}


@check(limit_s=60)
def file_system_has_the_stripes_of_the_one_below() -> dict[str, object]:
    """A file on an XFS that was made for stripes is served with these."""
    mounted = guest.WORK / "striped"
    mounted.mkdir(exist_ok=True)
    backing = guest.image("xfs.img", 640 * MIB)
    guest.sh("mkfs.xfs", "-q", "-d", "su=64k,sw=4", "-l", "size=64m", backing)
    guest.sh("modprobe", "-a", "loop", "xfs")
    guest.sh("mount", "-o", "loop", backing, mounted)
    try:
        image = mounted / "disk.img"
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        with guest.device("vd0", f"file:{image}") as node:
            found = limits_of(node)
    finally:
        guest.sh("umount", mounted)
        backing.unlink()
    assert found["queue/minimum_io_size"] == 65536, found
    assert found["queue/optimal_io_size"] == 262144, found
    assert found["queue/discard_granularity"] == 4096, found
    return dict(found)


@check(limit_s=120)
def disk_with_odd_limits_shows_them() -> dict[str, object]:
    """Blocks of 4096 bytes that begin with sector 7, freed by the MiB; fstrim frees as much as on the disk itself."""
    with scsi_debug(
        dev_size_mb=128, lbpu=1, physblk_exp=3, lowest_aligned=7, unmap_granularity=2048, ndelay=1
    ) as store:
        wanted, freed = limits_of(store), {}
        assert wanted["queue/discard_granularity"] == MIB, wanted
        for name in ("disk", "vd0"):
            guest.sh("blkdiscard", store)
            with guest.device("vd0", f"file:{store}") if name == "vd0" else contextlib.nullcontext(store) as node:
                if name == "vd0":
                    assert limits_of(node) == wanted, (limits_of(node), wanted)
                freed[name] = fill_and_trim(node)
        assert freed["vd0"][1] <= freed["disk"][1] + 1, freed
    return {"limits": wanted, "MiB before and after": freed}


def fill_and_trim(node: str) -> tuple[int, int]:
    """Fill a file system, remove all in it, and have it freed. Returns the MiB that are allocated before and after."""
    mounted = guest.WORK / "trimmed"
    mounted.mkdir(exist_ok=True)
    guest.sh("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0", "-O", "^has_journal", node)
    guest.sh("mount", node, mounted)
    try:
        for number in range(8):
            (mounted / f"file{number}").write_bytes(os.urandom(MIB) * 10)
        guest.sh("sync", "-f", mounted)
        before = allocated_units()
        for number in range(8):
            (mounted / f"file{number}").unlink()
        guest.sh("sync", "-f", mounted)
        guest.sh("fstrim", mounted, timeout_s=60)
    finally:
        guest.sh("umount", mounted)
    after = allocated_units()
    assert before - after >= 70, (before, after)
    return before, after


@check(limit_s=150)
def large_discard_lets_reads_through() -> dict[str, object]:
    """A disk that discards 1 MiB in 2 ms, one by one, is busy for 4 s with 2 GiB; a read waits for a piece of it."""
    longest = {}
    parameters = {
        "dev_size_mb": 16,
        "virtual_gb": 2,
        "lbpu": 1,
        "unmap_max_blocks": 2048,
        "max_queue": 1,
        "ndelay": 2_000_000,
    }
    with scsi_debug(**parameters) as store:
        for engine in ("sync", "uring"):
            with guest.device("vd0", f"file:{store}", cache="none", engine=engine) as node:
                discard = threading.Thread(target=guest.sh, args=("blkdiscard", node), kwargs={"timeout_s": 60})
                began = time.monotonic()
                discard.start()
                longest[engine] = longest_read(node, discard)
                took = time.monotonic() - began
                assert took > 1, f"the discard took {took:.1f} s: nothing was measured"
                assert longest[engine] < 0.8, longest
    return {"longest read, s": longest}


def longest_read(node: str, until: threading.Thread) -> float:
    """Read one block after the other while a thread runs. Returns how long the slowest took."""
    fd = os.open(node, os.O_RDONLY | os.O_DIRECT)
    longest, buffer = 0.0, mmap.mmap(-1, 4096)
    try:
        while until.is_alive():
            began = time.monotonic()
            assert os.preadv(fd, [buffer], 4096) == 4096
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.01)
    finally:
        os.close(fd)
    until.join()
    return longest
