"""An image that was made on sectors of 512 bytes stays readable on a store that has larger ones, by default."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdusefast.api import Device
from vdusefast.backends import content
from vdusefast.config import make_config

MIB = 1 << 20
IMAGE_BYTES = 512 * MIB  # sparse: mkfs.xfs wants that much


def make(path: Path, kind: str, size_bytes: int = IMAGE_BYTES) -> None:
    """Make an image: `gpt` and `dos` with a partition, file systems on the whole of it."""
    path.write_bytes(b"")
    os.truncate(path, size_bytes)
    commands: dict[str, list[str]] = {
        "gpt": ["sfdisk", "--quiet", "--label=gpt"],
        "dos": ["sfdisk", "--quiet", "--label=dos"],
        "xfs-512": ["mkfs.xfs", "-q", "-s", "size=512"],
        "xfs-4096": ["mkfs.xfs", "-q", "-s", "size=4096"],
        "ext4-1024": ["mkfs.ext4", "-q", "-F", "-b", "1024"],
        "ext4-4096": ["mkfs.ext4", "-q", "-F", "-b", "4096"],
    }
    if kind == "data":
        with path.open("r+b") as file:
            file.write(os.urandom(4096))
    elif kind != "blank":
        text = "2048,,L\n" if kind in ("gpt", "dos") else None
        subprocess.run([*commands[kind], path], input=text, text=True, check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        *[("gpt", 512), ("dos", 512), ("xfs-512", 512), ("ext4-1024", 512)],
        *[("xfs-4096", 4096), ("ext4-4096", 4096), ("blank", 0), ("data", 7)],
    ],
)
def test_contents_tell_their_sectors(tmp_path: Path, kind: str, wanted: int) -> None:
    make(tmp_path / "disk.img", kind)
    with (tmp_path / "disk.img").open("rb") as file:
        assert content.made_for(file.fileno(), IMAGE_BYTES, unknown_bytes=7) == wanted


def test_end_within_a_block_needs_small_ones(tmp_path: Path) -> None:
    with (tmp_path / "disk.img").open("w+b") as file:
        file.truncate(4096 + 512)
        assert content.made_for(file.fileno(), 4096 + 512) == 512


@pytest.mark.parametrize(
    "head",
    [
        b"EFI PART" + bytes(504),
        struct.pack("<8s4sIIIQ", b"EFI PART", b"\0\0\1\0", 0xFFFFFFFF, 0, 0, 1).ljust(512, b"\0"),
        struct.pack("<8s4sIIIQ", b"EFI PART", b"\0\0\1\0", 92, 1, 0, 1).ljust(512, b"\0"),
    ],
)
def test_broken_table_tells_nothing(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512) + head)
    os.truncate(path, MIB)
    with path.open("rb") as file:
        assert content.made_for(file.fileno(), MIB, unknown_bytes=7) == 7


@pytest.fixture
def large_sectors(tmp_path: Path, attach_loop: Callable[..., str]) -> Iterator[Path]:
    """Mount an ext4 on a disk with sectors of 4096 bytes."""
    (tmp_path / "disk").write_bytes(b"")
    os.truncate(tmp_path / "disk", 256 * MIB)
    node = attach_loop(tmp_path / "disk", "--sector-size", "4096")
    subprocess.run(["mkfs.ext4", "-q", "-F", node], check=True, timeout=60)
    where = tmp_path / "mounted"
    where.mkdir()
    subprocess.run(["mount", node, where], check=True, timeout=60)
    yield where
    subprocess.run(["umount", where], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.loop_device
@pytest.mark.parametrize(("kind", "wanted"), [("gpt", 512), ("dos", 512), ("blank", 4096), ("ext4-4096", 4096)])
def test_image_is_offered_as_it_was_made(large_sectors: Path, kind: str, wanted: int) -> None:
    """sfdisk reads from the device the table that it wrote to the image."""
    image = large_sectors / "d.img"
    make(image, kind, 64 * MIB)
    config = make_config(name="d0", uri=f"file:{image}", cache="none")
    with Device(config) as device, device.driver() as driver:
        assert driver.block_size_bytes == wanted
        assert driver.read(0, MIB) == image.read_bytes()[:MIB]
        if wanted == 512:
            assert "blocks of 512 bytes: the store's have 4096" in device.info()["emulated"][0]
            copy = large_sectors.parent / "copy.img"
            copy.write_bytes(driver.read(0, 64 * MIB))
            dumps = [
                subprocess.run(["sfdisk", "--dump", path], check=True, capture_output=True, text=True, timeout=20)
                for path in (image, copy)
            ]
            assert "start=        2048" in dumps[0].stdout
            assert dumps[0].stdout.replace(str(image), "") == dumps[1].stdout.replace(str(copy), "")
            driver.write(2048 * 512 + 512, b"p" * 512)
            assert driver.read(2048 * 512, 4096) == bytes(512) + b"p" * 512 + bytes(3072)
    config = make_config(name="d0", uri=f"file:{image}", cache="none", block_size_bytes=4096)
    with Device(config) as device, device.driver() as driver:
        assert driver.block_size_bytes == 4096


@pytest.mark.loop_device
def test_image_that_is_no_number_of_the_stores_blocks_is_served(large_sectors: Path) -> None:
    image = large_sectors / "d.img"
    image.write_bytes(os.urandom(16 * 4096 + 512))
    with Device(make_config(name="d0", uri=f"file:{image}", cache="none")) as device, device.driver() as driver:
        assert driver.read(16 * 4096, 512) == image.read_bytes()[-512:]
        driver.write(16 * 4096, b"e" * 512)
        assert driver.read(15 * 4096, 4096 + 512)[-512:] == b"e" * 512
