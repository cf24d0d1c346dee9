"""Programs of Debian that test disks and file systems: btrfs with scrub, stress-ng, dbench."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import guest
import tree_links
from guest import MIB
from scenario_filesystem import MOUNT, differences, fill, mounted
from side_by_side import NotRunError, Place, Verdict, attempt, judged, succeed

from bench.vm import cache

TREE = ("bookworm", ("stress-ng", "dbench", "btrfs-progs"))
PROGRAMS = ("stress-ng", "dbench", "btrfs", "mkfs.btrfs")
SIZE_BYTES = 320 * MIB
FILL_BYTES = 24 * MIB
LIMIT_S = 180.0
STRESS_S = 4
# Each with --verify. Without io-uring: stress-ng 0.15 takes its statx of a missing file for an error, on any disk.
# A size, where the usual one is too large for a disk of this size.
STRESSORS = {
    "hdd": ("--hdd-bytes", "8M"),
    "hdd, direct": ("--hdd-bytes", "8M", "--hdd-opts", "direct,wr-rnd,rd-rnd,fsync"),
    "aio": (),
    "iomix": ("--iomix-bytes", "8M"),
    "readahead": ("--readahead-bytes", "8M"),
    "seek": ("--seek-size", "8M"),
    "revio": ("--revio-bytes", "8M"),
    "fallocate": ("--fallocate-bytes", "8M"),
    "sync-file": ("--sync-file-bytes", "8M"),
    "rawdev": (),
}
NO_RESOURCES, NOT_IMPLEMENTED = 3, 4  # exit statuses of stress-ng


def run(place: Place) -> Iterator[Verdict]:
    """Test the disks of a place."""
    tree_links.link(TREE, dict.fromkeys(("usr/sbin", "sbin", "usr/bin", "bin"), PROGRAMS))
    Path("/var/lib/btrfs").mkdir(parents=True, exist_ok=True)  # where scrub notes its progress
    guest.sh("modprobe", "btrfs")  # for /dev/btrfs-control
    yield judged("btrfs raid1 and scrub", lambda: btrfs(place))
    node = place.nodes[0]
    guest.sh("wipefs", "--all", *place.nodes)
    guest.sh("mkfs.ext4", "-q", "-F", node, timeout_s=60)
    with mounted(node):
        for name, words in STRESSORS.items():
            yield judged(f"stress-ng {name}", lambda name=name, words=words: stress(name.partition(",")[0], words))
        yield judged("dbench", dbench)
    yield judged("e2fsck afterwards", lambda: succeed(["e2fsck", "-f", "-n", node], LIMIT_S))


def btrfs(place: Place) -> None:
    """Mirror files on both disks, scrub them, and read them back after a fresh mount; then btrfs's own check."""
    one, two = place.nodes
    succeed(["mkfs.btrfs", "-q", "-f", "-d", "raid1", "-m", "raid1", one, two], LIMIT_S)
    succeed(["btrfs", "device", "scan", one, two], LIMIT_S)
    with mounted(one):
        files = fill(MOUNT, FILL_BYTES)
        succeed(["btrfs", "filesystem", "sync", MOUNT], LIMIT_S)
        scrub()
    with mounted(two):
        assert differences(MOUNT, files) == []
        guest.sh("fstrim", MOUNT, timeout_s=60)
        scrub()
        said = succeed(["btrfs", "device", "stats", MOUNT], LIMIT_S)
        assert all(line.split()[-1] == "0" for line in said.splitlines()), said
    succeed(["btrfs", "check", one], LIMIT_S)


def scrub() -> None:
    said = succeed(["btrfs", "scrub", "start", "-B", MOUNT], LIMIT_S)
    assert "no errors found" in said, said


def stress(stressor: str, words: tuple[str, ...]) -> None:
    """Run one stressor of stress-ng for some seconds on the mounted file system."""
    common = ["stress-ng", "--temp-path", str(MOUNT), "--verify", "--timeout", f"{STRESS_S}s"]
    status, said = attempt([*common, f"--{stressor}", "1", *words], LIMIT_S)
    if status in (NO_RESOURCES, NOT_IMPLEMENTED):
        raise NotRunError(said)
    assert status == 0, f"status {status}: {said}"
    assert "skipped: 1" not in said, said


def dbench() -> None:
    """Run dbench's load of an office with two clients for some seconds."""
    load = cache.tree(*TREE) / "usr/share/dbench/client.txt"
    directory = MOUNT / "dbench"
    directory.mkdir()
    said = succeed(["dbench", "-t", STRESS_S, "-D", directory, "-c", load, "2"], LIMIT_S)
    assert "Throughput" in said, said
    assert not re.search(r"^\[\d+\] .*failed", said, re.MULTILINE), said  # an operation of the load
