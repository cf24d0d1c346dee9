"""Machines with pages of 16 and 64 KiB: what is mapped lies where they want it. Here the size is only said to be so."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from vdusefast.base.page import PAGE_MAX_BYTES

SIZES = [size for size in (16384, 65536) if size >= mmap.PAGESIZE]
pytestmark = pytest.mark.timeout(120)


def run_with(page_bytes: int, program: str, *words: str) -> Any:
    """Run a program in a process whose pages are of another size; returns the JSON that it prints last."""
    env = {**os.environ, "VDUSEFAST_TEST_PAGE_BYTES": str(page_bytes)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *words], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("page_bytes", SIZES)
def test_both_sides_agree_on_the_layout(page_bytes: int) -> None:
    found = run_with(
        page_bytes,
        """
        import json
        from vdusefast.state import shared_pages as shm
        from vdusefast.worker import _datapath
        ours = [shm.queue_offset(queue) for queue in range(3)]
        theirs = [_datapath.block_extent(queue)[0] for queue in range(3)]
        print(json.dumps([ours, theirs, shm.pages_bytes(3)]))
        """,
    )
    ours, theirs, length_bytes = found
    assert ours == theirs
    assert all(offset % page_bytes == 0 for offset in ours)
    assert length_bytes % page_bytes == 0


# A region that begins in the middle of a page of the file, as those of a client of vhost-vdpa may.
DEVICE = """
import json, os, re, sys, vdusefast
from pathlib import Path

page_bytes, uri, options = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
config = vdusefast.make_config(name="pages", uri=uri, queues=2, **options)
with vdusefast.Device(config) as device, device.driver() as driver:
    for queue in range(2):
        for offset in range(0, 1 << 20, 1 << 16):
            driver.write(offset, bytes([offset >> 16 | 1]) * 65536, queue=queue)
            assert driver.read(offset, 65536, queue=queue) == bytes([offset >> 16 | 1]) * 65536
    driver.flush()
    offsets = {}
    for info in device.queues():
        for line in Path(f"/proc/{info.pid}/maps").read_text().splitlines():
            words = line.split(maxsplit=5)
            if words[1].endswith("s") and re.search("pages|memfd", words[-1]):
                first, last = (int(part, 16) for part in words[0].split("-"))
                offsets[line] = [int(words[2], 16), last - first]
    stats = device.stats()
print(json.dumps([offsets, stats.requests, stats.errors]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("page_bytes", SIZES)
@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("file", {"lock_memory": "on"}),
        ("memory:4M", {"queue_size": 1024}),
        ("file", {"cache": "none", "packed": True}),
    ],
    ids=["file", "memory", "direct"],
)
def test_a_device_is_served_with_larger_pages(
    page_bytes: int, uri: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if uri == "file":
        path = tmp_path_factory.mktemp("pages") / "disk.img"
        path.write_bytes(bytes(4 << 20))
        uri = f"file:{path}"
    offsets, requests, errors = run_with(page_bytes, DEVICE, str(page_bytes), uri, json.dumps(options))
    assert requests >= 64
    assert errors == 0
    assert len(offsets) >= 2
    for line, (offset, length) in offsets.items():
        assert offset % page_bytes == 0, line
        assert length % page_bytes == 0, line


@pytest.mark.parametrize("text", ["0", "4096", "10000", str(2 * PAGE_MAX_BYTES), "x"])
def test_no_other_size_can_be_faked(text: str) -> None:
    program = """if True:
        import json
        from vdusefast.base import page
        from vdusefast.worker import _datapath
        print(json.dumps([page.PAGE_BYTES, _datapath.block_extent(0)[0]]))
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "VDUSEFAST_TEST_PAGE_BYTES": text},
        check=True,
    )
    assert json.loads(done.stdout) == [mmap.PAGESIZE, mmap.PAGESIZE]
