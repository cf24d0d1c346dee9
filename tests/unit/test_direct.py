"""The alignment that O_DIRECT needs is found also where a trial read would be fooled: a hole is read by any."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdusefast.backends import direct, open_store
from vdusefast.backends.statx import Statx, statx
from vdusefast.config import BackendConfig
from vdusefast.errors import BackendError

MIB = 1 << 20
IMAGE_BYTES = 8 * MIB
FILE_SYSTEMS = {"ext4": ("-q", "-F"), "xfs": ("-q", "-f", "--unsupported")}


@pytest.fixture(params=sorted(FILE_SYSTEMS))
def mounted(request: pytest.FixtureRequest, tmp_path: Path, attach_loop: Callable[..., str]) -> Iterator[Path]:
    """Return where a file system is mounted on a disk with sectors of 4096 bytes."""
    (tmp_path / "disk").write_bytes(b"")
    os.truncate(tmp_path / "disk", 64 * MIB)
    node = attach_loop(tmp_path / "disk", "--sector-size", "4096")
    subprocess.run([f"mkfs.{request.param}", *FILE_SYSTEMS[request.param], node], check=True, timeout=50)
    where = tmp_path / "mounted"
    where.mkdir()
    subprocess.run(["mount", node, where], check=True, timeout=50)
    yield where
    subprocess.run(["umount", where], check=True, timeout=50)


def say_nothing(_fd: int) -> Statx:
    return Statx()


def align_of(path: Path, sysfs: Path = Path("/sys")) -> int:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        return direct.find_align(fd, f"file:{path}", sysfs=sysfs)
    finally:
        os.close(fd)


@pytest.mark.loop_device
@pytest.mark.parametrize("kernel", ["says it", "does not know DIOALIGN"])
def test_fresh_image_on_large_sectors_has_large_blocks(
    mounted: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel != "says it":
        monkeypatch.setattr(direct, "statx", say_nothing)
    for name, allocated in (("sparse", False), ("preallocated", True)):
        path = mounted / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        if allocated:
            os.posix_fallocate(fd, 0, IMAGE_BYTES)
        os.ftruncate(fd, IMAGE_BYTES)
        backend = BackendConfig(uri=f"file:{path}", cache="none")
        for _ in ("fresh", "with data"):
            with open_store(backend) as store:
                assert (store.direct_align, store.block_size_bytes) == (4096, 4096)
            os.pwrite(fd, b"x" * MIB, 0)
            os.fsync(fd)
        os.close(fd)


@pytest.mark.loop_device
def test_every_way_to_ask_says_the_same(mounted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last way left is that of a file system that is on no block device of its own, such as NFS."""
    path = mounted / "d.img"
    path.write_bytes(b"")
    os.truncate(path, IMAGE_BYTES)
    monkeypatch.setattr(direct, "statx", say_nothing)
    assert align_of(path) == 4096
    monkeypatch.setattr(direct, "XFS_IOC_DIOINFO", 0)
    assert align_of(path) == 4096
    assert align_of(path, sysfs=tmp_path / "none") == 4096
    path.write_bytes(b"x" * MIB)
    os.sync()
    assert align_of(path, sysfs=tmp_path / "none") == 4096


@pytest.fixture
def small_sectors() -> Iterator[Path]:
    """Return an empty image on the file system of this checkout, if its disk takes sectors of 512 bytes."""
    path = Path(__file__).parents[2] / "build" / f"test-direct-{os.getpid()}.img"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    os.truncate(path, IMAGE_BYTES)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        told = statx(fd).dio_align
        os.close(fd)
        if told != 512:
            pytest.skip(f"this kernel says {told or 'nothing'} of {path.parent}")
        yield path
    finally:
        path.unlink()


def test_small_sectors_are_found_by_the_disk_beneath(small_sectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "statx", say_nothing)
    assert align_of(small_sectors) == 512


def test_without_any_word_data_tells_and_a_hole_does_not(
    small_sectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "statx", say_nothing)
    monkeypatch.setattr(direct, "XFS_IOC_DIOINFO", 0)
    assert align_of(small_sectors, sysfs=tmp_path) == 4096
    with small_sectors.open("r+b") as file:
        file.seek(MIB)
        file.write(b"x" * 65536)
        file.flush()
        os.fsync(file.fileno())
    assert align_of(small_sectors, sysfs=tmp_path) == 512


@pytest.mark.parametrize(("told", "found"), [(1, 512), (512, 512), (1536, 2048), (4096, 4096)])
def test_what_is_told_becomes_a_power_of_two(
    small_sectors: Path, told: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "statx", lambda _fd: Statx(dio_align=told))
    assert align_of(small_sectors) == found


def test_alignment_that_is_too_large_is_an_error(small_sectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "statx", lambda _fd: Statx(dio_align=1 << 20))
    with pytest.raises(BackendError, match=rf"O_DIRECT needs more than {direct.ALIGN_MAX_BYTES} bytes of alignment"):
        align_of(small_sectors)


@pytest.mark.parametrize("limit", ["4096", "0"])
def test_partition_has_the_limits_of_its_disk(tmp_path: Path, limit: str) -> None:
    disk = tmp_path / "devices/sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "queue").mkdir()
    (disk / "queue/discard_max_bytes").write_text(f"{limit}\n")
    (tmp_path / "dev/block").mkdir(parents=True)
    (tmp_path / "dev/block/8:1").symlink_to(disk / "sda1")
    assert direct.queue_limit(os.makedev(8, 1), "discard_max_bytes", tmp_path) == int(limit)
    assert direct.queue_limit(os.makedev(9, 9), "discard_max_bytes", tmp_path) == 0
