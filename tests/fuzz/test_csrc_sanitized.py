"""csrc_unit*.c under the address, leak and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDERS = ("base", "memory", "ring", "engine", "queue")


@pytest.mark.timeout(200)
def test_csrc_is_clean_under_the_sanitizers(tmp_path: Path) -> None:
    binary = tmp_path / "csrc_unit"
    folders = (ROOT / "csrc" / name for name in FOLDERS)
    sources = [*sorted(HERE.glob("csrc_unit*.c")), *(path for folder in folders for path in sorted(folder.glob("*.c")))]
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra"]
    compiler = os.environ.get("FUZZ_CC", "clang")
    compiled = subprocess.run(
        [compiler, *flags, "-Werror", f"-I{ROOT / 'csrc'}", "-o", binary, *sources, "-luring"],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert compiled.returncode == 0, compiled.stderr
    # The guard's SIGBUS is ours to handle.
    options = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:handle_sigbus=0:allow_user_segv_handler=1"}
    ended = subprocess.run([binary], env=options, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr[-6000:]
