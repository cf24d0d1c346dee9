"""The recipe of docs/adding.md for a store with a descriptor: a file of its own, and one other."""

from __future__ import annotations

from pathlib import Path

import recipes

EDITS = {
    "vdusefast/backends/__init__.py": [
        (
            '    Registration(("null",)',
            '    Registration(("dummy",), "vdusefast.backends.dummy", "dummy:/srv/disk.img"),\n',
        ),
    ],
}
DUMMY = """
import os

from vdusefast.backends import Store
from vdusefast.base.kinds import StoreKind


def open_store(rest, backend, read_only, claim=True):
    fd = os.open(rest, os.O_RDWR | os.O_CLOEXEC)
    return Store(
        uri=backend.uri,
        kind=StoreKind.FILE,
        fd=fd,
        size_bytes=os.fstat(fd).st_size // 2,  # it serves the first half of a file
        block_size_bytes=512,
        physical_block_size_bytes=4096,
        opt_io_size_bytes=0,
        read_only=read_only,
        can_discard=True,
        can_write_zeroes=True,
        zeroes_cheaply=True,
        direct_align=0,
        cache=backend.cache,
    )
"""
USE = """
import sys
import vdusefast

for engine in ("auto", "sync"):
    config = vdusefast.make_config(name="dummy", uri="dummy:" + sys.argv[1], engine=engine, queues=2)
    with vdusefast.Device(config, run_dir=sys.argv[2]) as device, device.driver() as driver:
        assert driver.capacity_bytes == 1 << 20, driver.capacity_bytes
        driver.write(4096, b"d" * 4096, queue=1)
        driver.discard(0, 4096)
        driver.flush()
        assert driver.read(0, 8192) == bytes(4096) + b"d" * 4096
"""


def test_a_store_with_a_descriptor_is_a_file_and_an_edit(tmp_path: Path) -> None:
    tree, disk = tmp_path / "tree", tmp_path / "disk.img"
    recipes.copy_package(tree, built=True)
    (tree / "vdusefast" / "backends" / "dummy.py").write_text(DUMMY)
    recipes.follow(tree, EDITS)
    disk.write_bytes(b"\xff" * 4096 + bytes((2 << 20) - 4096))
    recipes.use(tree, USE, disk, tmp_path / "run")
    assert disk.read_bytes() == bytes(4096) + b"d" * 4096 + bytes((2 << 20) - 8192)
