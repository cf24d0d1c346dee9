"""The commands of bench/README.md and bench/vm/README.md that boot guests, typed as they are printed: make soak."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from documents import block_with, make_checkout, type_in

from bench.vm.machine import ROOT

LIMIT_S = 3000
pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(4 * LIMIT_S)]


def test_user_memory(tmp_path: Path) -> None:
    command = block_with("bench/user_memory.py", "bench/README.md")
    assert "randread" in type_in(make_checkout(tmp_path), command, LIMIT_S)


def test_peers(tmp_path: Path) -> None:
    here, in_guest, counted = block_with("peers --load-modules", "bench/README.md").splitlines()
    make_checkout(tmp_path)
    # The first is for a machine whose kernel has VDUSE.
    script = f'sudo() {{ "$@"; }}; {here}'
    said = type_in(ROOT, f"bench/vm/run --kernel 7.3 --timeout 1500 -- bash -euc {shlex.quote(script)}", LIMIT_S)
    assert "vdusefast" in said
    type_in(tmp_path, in_guest, LIMIT_S)
    assert {run["peer"] for run in json.loads((tmp_path / "p.json").read_text())["runs"]} >= {
        "vdusefast",
        "qsd",
        "loop",
    }
    assert (tmp_path / "p.png").stat().st_size
    assert "qsd" in type_in(tmp_path, counted, LIMIT_S)


def test_variants(tmp_path: Path) -> None:
    command = block_with("--variants", "bench/README.md")
    assert "eager" in type_in(make_checkout(tmp_path), command, LIMIT_S)


def test_guests(tmp_path: Path) -> None:
    block = block_with("bench/vm/run -- uname -r", "bench/vm/README.md")
    said = type_in(make_checkout(tmp_path), block.replace("/tmp/out", str(tmp_path / "out")), LIMIT_S)
    assert said.startswith("6.12")
    assert "kernel transport" in said
