"""Data flushed through a device survives a power cut, and a cache mode that promises less is found out."""

from __future__ import annotations

import array
from pathlib import Path

import pytest

from bench.vm import cache, guest
from bench.vm.errors import GuestError
from bench.vm.machine import RESULTS, ROOT, GuestConfig
from vdusefast.driver import _driver

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = ROOT / "tests/vm/guest/power_cut.py"
BLOCK_BYTES = 4096
SEED = 7
GENERATION_AT = slice(16, 20)


def cut(kernel: str, mode: str, directory: Path) -> tuple[int, list[str]]:
    """Run a guest until its power is cut. Returns how many blocks were flushed, and which of them are lost."""
    image = directory / "disk.img"
    config = GuestConfig(
        kernel=kernel,
        timeout_s=240,
        disk="8M",
        disk_image=image,
        modules=("vduse", "virtio_vdpa", "virtio_blk"),
        results=directory,
    )
    with pytest.raises(GuestError):  # it has ended, but not its command
        guest.run(config, ["python", str(SCRIPT), RESULTS, mode])
    flushed = array.array("I", (directory / "flushed").read_bytes())
    disk, lost = image.read_bytes(), []
    for block, generation in enumerate(flushed):
        at = block * BLOCK_BYTES
        data = disk[at : at + BLOCK_BYTES]
        found = int.from_bytes(data[GENERATION_AT], "little")
        # A later write may have arrived, too; whatever is there has to be whole.
        if generation and (_driver.check_block(data, at, found, SEED) != "none" or found < generation):
            lost.append(f"block {block}: flushed {generation}, found {found}")
    return sum(map(bool, flushed)), lost


@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_what_was_flushed_survives_a_reset(kernel: str, tmp_path: Path) -> None:
    count, lost = cut(kernel, "writeback", tmp_path)
    assert count > 50
    assert lost == []


def test_flushes_that_do_nothing_are_found_out(tmp_path: Path) -> None:
    count, lost = cut(cache.KERNELS[-1], "unsafe", tmp_path)
    assert count > 50
    assert lost
