"""The recipe of docs/adding.md for an engine: a file of its own, and two others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import recipes

EDITS = {
    "csrc/engine/engines.c": [
        ("static const struct vf_engine_ops *const", "extern const struct vf_engine_ops vf_engine_dummy;\n\n"),
        ("&vf_engine_sync, ", "&vf_engine_dummy, "),
    ],
    "vdusefast/base/engines.py": [
        (', "null"]', ', "dummy"'),
        ('\n    "null": ', '\n    "dummy": EngineTraits(serves_files=True),'),
    ],
}
DUMMY = """
#include "engine/engine.h"

static int vf_dummy_submit(struct vf_engine *engine, struct vf_req *req)
{
	(void)engine;
	if (req->op == VF_OP_READ)
		for (uint32_t i = 0; i < req->iov_count; i++)
			__builtin_memset(req->iov[i].iov_base, 0x5a, req->iov[i].iov_len);
	req->left_bytes = 0;
	return 1;
}

const struct vf_engine_ops vf_engine_dummy = {
	.name = "dummy",
	.stores = VF_SERVES_FILES,
	.submit = vf_dummy_submit,
	.publish_batch = 16,
	.instant = 1,
};
"""
USE = """
import sys
import vdusefast

config = vdusefast.make_config(name="dummy", uri="file:" + sys.argv[1], engine="dummy")
with vdusefast.Device(config, run_dir=sys.argv[2]) as device, device.driver() as driver:
    assert driver.read(0, 4096) == bytes([0x5A]) * 4096
    assert device.info()["queues"][0]["engine"] == "dummy", device.info()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_is_a_file_and_two_edits(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    recipes.copy_package(tree, built=False)
    (tree / "csrc" / "engine" / "engine_dummy.c").write_text(DUMMY)
    recipes.follow(tree, EDITS)
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "VDUSEFAST_OPTIMIZE": "-O0", "VDUSEFAST_EXTENSIONS": "worker._datapath driver._driver"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert built.returncode == 0, built.stderr
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    recipes.use(tree, USE, disk, tmp_path / "run")
