"""The README's table of stores: its command runs with each of their URIs, on what the README says to start."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ceph_rig import Cluster
from nbd_rig import Server

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("\n## Stores\n")[2].partition("\n## ")[0]
URIS = re.findall(r"^\| [^|]+ \| `([^`]+)` \|", SECTION, re.MULTILINE)
RUN_S = 50


def block(text: str, language: str = "sh") -> str:
    """Return the one code block of the section that has `text` in it."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL) if text in code]
    return found


def command_with(uri: str) -> list[str]:
    words = shlex.split(block("bench fio"))
    assert words[0] == "python"
    return [sys.executable, *(word.replace("URI", uri) for word in words[1:])]


def run(words: list[str], directory: Path) -> str:
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with what the section has in its own: a file, a class, and configuration of Ceph."""
    (tmp_path / "disk.img").write_bytes(bytes(64 << 20))
    (tmp_path / "disk.py").write_text(block("class Disk", "python"))
    return tmp_path


def test_table_has_every_backend() -> None:
    from vdusefast.backends import BACKENDS

    schemes = {uri.partition(":")[0] for uri in URIS}
    assert all(schemes & set(backend.schemes) for backend in BACKENDS)
    assert len(URIS) == len(BACKENDS)


@pytest.mark.parametrize("uri", [uri for uri in URIS if not uri.startswith(("nbd", "rbd", "null"))])
def test_command_runs_on_what_needs_no_server(directory: Path, uri: str) -> None:
    assert ", 0 wrong" in run(command_with(uri), directory)


def test_command_runs_on_nothing(directory: Path) -> None:
    (uri,) = [uri for uri in URIS if uri.startswith("null")]
    words = [word for word in command_with(uri) if not word.startswith("--verify")]
    assert "failed requests: 0" in run(words, directory)


def test_command_runs_on_the_nbd_server_of_the_readme(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (uri,) = [uri for uri in URIS if uri.startswith("nbd")]
    (line,) = [line for line in block("nbdkit").splitlines() if line.startswith("nbdkit")]
    words = shlex.split(line.partition("#")[0])
    monkeypatch.chdir(directory)
    with Server(Path("disk.sock"), [words[0], "--foreground", *words[1:]]):
        assert ", 0 wrong" in run(command_with(uri), directory)


def test_command_runs_on_the_image_of_the_readme(directory: Path, ceph: Cluster) -> None:
    (uri,) = [uri for uri in URIS if uri.startswith("rbd")]
    (line,) = [line for line in block("rbd create").splitlines() if line.startswith("rbd")]
    ceph.rbd(*shlex.split(line.partition("#")[0])[1:])
    shutil.copy(ceph.conf, directory / "ceph.conf")
    try:
        assert ", 0 wrong" in run(command_with(uri), directory)
    finally:
        ceph.rbd("rm", "rbd/disk")
