"""`vdusefast check` tells a backend that was not built from one whose library is gone, each with what helps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import vdusefast

pytestmark = pytest.mark.slow

PACKAGE = Path(vdusefast.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a directory with this package in it, all extensions built."""
    package = tmp_path / "copy/vdusefast"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.c", "bench"))
    for path in PACKAGE.rglob("*.so"):
        (package / path.relative_to(PACKAGE)).symlink_to(path)
    return package


def run(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "vdusefast", *words]
    environment = {**os.environ, "PYTHONPATH": str(copy.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def findings(copy: Path) -> dict[str, dict[str, Any]]:
    done = run(copy, "check", "--json")
    return {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


CASES = [
    ("rbd", "librbd", "librbd-dev", "librbd1", "rbd:rbd/disk?conf=/dev/null"),
    ("nbd", "libnbd", "libnbd-dev", "libnbd0", "nbd://localhost/"),
]


@pytest.mark.parametrize(("kind", "library", "headers", "package", "uri"), CASES)
def test_backend_that_was_built_without_its_library(
    copy: Path, kind: str, library: str, headers: str, package: str, uri: str
) -> None:
    (copy / f"backends/_{kind}{SUFFIX}").unlink()
    found = findings(copy)[f"backend {kind}"]
    assert (found["ok"], found["text"]) == (False, f"vdusefast was built without {library}")
    assert found["remedy"].startswith(f"sudo apt-get install {headers}, then make build")
    config = copy.parent / "vd0.toml"
    config.write_text(f'[device]\nname = "vd0"\ntransport = "loopback"\n[backend]\nuri = "{uri}"\n')
    done = run(copy, "add", str(config))
    assert done.returncode == 1
    assert f"built without {library}; sudo apt-get install {headers}" in done.stderr


@pytest.mark.parametrize(("kind", "library", "headers", "package", "uri"), CASES)
def test_backend_whose_library_has_gone(
    copy: Path, tmp_path: Path, kind: str, library: str, headers: str, package: str, uri: str
) -> None:
    gone, extension = tmp_path / "libgone.so", copy / f"backends/_{kind}{SUFFIX}"
    extension.unlink()
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", str(gone)], check=True, timeout=60)
    words = ["cc", "-shared", "-x", "c", "/dev/null", "-Wl,--no-as-needed", f"-L{tmp_path}", "-lgone"]
    subprocess.run([*words, "-o", str(extension)], check=True, timeout=60)
    gone.unlink()
    found = findings(copy)[f"backend {kind}"]
    assert not found["ok"]
    assert "libgone.so: cannot open shared object file" in found["text"]
    assert found["remedy"] == f"sudo apt-get install {package}"
