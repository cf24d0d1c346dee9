"""A disk as the kernel sees it: size, serial, blocks, topology, discard, zeroes, flush, read-only."""

from __future__ import annotations

import os
from pathlib import Path

import guest
from checks import check
from guest import MIB

SIZE = 64 * MIB


def queue_limits(name: str) -> dict[str, int]:
    """Return the numeric limits of the disk's queue in sysfs."""
    directory = guest.sysfs_of(name) / "queue"
    found = {}
    for path in directory.iterdir():
        if path.is_file() and os.access(path, os.R_OK):
            text = path.read_text().strip()
            if text.isdecimal():
                found[path.name] = int(text)
    return found


def allocated(path: Path) -> int:
    """Return how many bytes of a sparse file exist."""
    return path.stat().st_blocks * 512


@check(limit_s=60, keeps=True)
def appears() -> dict[str, object]:
    path = guest.image("block.img", SIZE)
    said = guest.add("vd0", f"file:{path}", serial="vdusefast-block", queues=2)
    node = str(said["node"])
    assert node == guest.node_of("vd0"), f"{said} but {guest.node_of('vd0')!r}"
    assert int(guest.sh("blockdev", "--getsize64", node)) == SIZE
    assert int(guest.sh("blockdev", "--getss", node)) == 512
    assert int(guest.sh("blockdev", "--getro", node)) == 0
    return said


@check(keeps=True)
def serial() -> None:
    assert (guest.sysfs_of("vd0") / "serial").read_text().strip() == "vdusefast-block"


@check(keeps=True)
def topology() -> dict[str, int]:
    limits = queue_limits("vd0")
    assert limits["logical_block_size"] == 512, limits
    assert limits["physical_block_size"] >= 512, limits
    assert limits["minimum_io_size"] == limits["physical_block_size"], limits
    assert limits["optimal_io_size"] % limits["physical_block_size"] == 0, limits
    assert limits["discard_granularity"] >= 512, limits
    assert limits["discard_max_bytes"] >= MIB, limits
    assert limits["write_zeroes_max_bytes"] >= MIB, limits
    assert limits["rotational"] in (0, 1), limits
    return limits


@check(limit_s=60, keeps=True)
def discard_frees_the_store() -> None:
    node, path = guest.node_of("vd0"), guest.WORK / "block.img"
    guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=1M", "count=16", "oflag=direct")
    assert allocated(path) >= 16 * MIB
    guest.sh("blkdiscard", "--offset", 4 * MIB, "--length", 8 * MIB, node)
    assert allocated(path) <= 9 * MIB, f"{allocated(path)} bytes are still there"
    with path.open("rb") as file:
        content = file.read(16 * MIB)
    assert content[4 * MIB : 12 * MIB] == bytes(8 * MIB)
    assert any(content[3 * MIB : 4 * MIB])
    assert any(content[12 * MIB : 13 * MIB])


@check(limit_s=60, keeps=True)
def discard_everything() -> None:
    guest.sh("blkdiscard", guest.node_of("vd0"))
    assert allocated(guest.WORK / "block.img") == 0


@check(limit_s=60, keeps=True)
def write_zeroes() -> None:
    node, path = guest.node_of("vd0"), guest.WORK / "block.img"
    guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=1M", "count=8", "oflag=direct")
    before = path.read_bytes()[: 8 * MIB]
    requests = guest.counter("vd0", "write_zeroes")
    guest.sh("blkdiscard", "-z", "--offset", 4 * MIB + 512, "--length", 2 * MIB, node)
    after = path.read_bytes()[: 8 * MIB]
    start, stop = 4 * MIB + 512, 6 * MIB + 512
    assert after[start:stop] == bytes(2 * MIB)
    assert after[:start] == before[:start]
    assert after[stop:] == before[stop:]
    assert guest.counter("vd0", "write_zeroes") > requests, "the kernel wrote zeroes as data"


@check(limit_s=60, keeps=True)
def flush_buffers() -> None:
    """BLKFLSBUF, and an fsync that becomes a flush request."""
    node, path = guest.node_of("vd0"), guest.WORK / "block.img"
    data = os.urandom(MIB)
    flushes = guest.counter("vd0", "flush")
    fd = os.open(node, os.O_WRONLY)
    try:
        os.pwrite(fd, data, 20 * MIB)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert guest.counter("vd0", "flush") > flushes, "fsync sent no flush"
    with path.open("rb") as file:
        file.seek(20 * MIB)
        assert file.read(MIB) == data
    # Behind the page cache's back, while the disk stays open: only BLKFLSBUF makes the kernel look again.
    with open(node, "rb", buffering=0) as disk:
        before = os.pread(disk.fileno(), 8, 20 * MIB)
        with path.open("r+b") as file:
            file.seek(20 * MIB)
            file.write(b"changed!")
        assert os.pread(disk.fileno(), 8, 20 * MIB) == before
        guest.sh("blockdev", "--flushbufs", node)
        assert os.pread(disk.fileno(), 8, 20 * MIB) == b"changed!"


@check(limit_s=30, keeps=True)
def beyond_the_end() -> None:
    node = guest.node_of("vd0")
    fd = os.open(node, os.O_RDWR)
    try:
        assert os.pread(fd, 4096, SIZE) == b""
        assert len(os.pread(fd, 8192, SIZE - 4096)) == 4096
    finally:
        os.close(fd)


@check(limit_s=60)
def goes_away() -> None:
    node = guest.node_of("vd0")
    guest.delete("vd0")
    assert not Path(node).exists()
    assert guest.node_of("vd0") == ""


@check(limit_s=90)
def read_only() -> None:
    path = guest.image("ro.img", 8 * MIB)
    path.write_bytes(os.urandom(8 * MIB))
    before = guest.checksum(path)
    with guest.device("vd0", f"file:{path}", read_only=True) as node:
        assert int(guest.sh("blockdev", "--getro", node)) == 1
        assert (guest.sysfs_of("vd0") / "ro").read_text().strip() == "1"
        assert guest.checksum(node) == before
        done = guest.attempt("dd", "if=/dev/zero", f"of={node}", "bs=4k", "count=1", "oflag=direct")
        assert done.returncode != 0, "a write to a read-only device went well"
        assert "RO" in guest.show("vd0")["acked_features"], guest.show("vd0")
    assert guest.checksum(path) == before


@check(limit_s=90)
def blocks_of_4096_bytes() -> None:
    path = guest.image("4k.img", 16 * MIB)
    with guest.device("vd0", f"file:{path}", block_size_bytes=4096) as node:
        limits = queue_limits("vd0")
        assert limits["logical_block_size"] == 4096, limits
        assert limits["physical_block_size"] >= 4096, limits
        assert limits["discard_granularity"] % 4096 == 0, limits
        assert int(guest.sh("blockdev", "--getsize64", node)) == 16 * MIB
        done = guest.attempt("dd", "if=/dev/zero", f"of={node}", "bs=512", "count=1", "oflag=direct")
        assert done.returncode != 0, "a direct write of 512 bytes went well"
        data = os.urandom(3 * 4096)
        guest.sh_bytes("dd", f"of={node}", "bs=4096", "seek=5", "oflag=direct", data=data)
        with path.open("rb") as file:
            file.seek(5 * 4096)
            assert file.read(len(data)) == data
        guest.sh("blkdiscard", "-z", "--offset", 4096, "--length", 4096, node)
