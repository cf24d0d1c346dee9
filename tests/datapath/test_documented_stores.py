"""The table of stores: the command of docs/stores.md runs with each URI, on what the documents say to start."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from ceph_rig import Cluster
from documents import block_with, make_checkout, section
from nbd_rig import Server

URIS = re.findall(r"^\| [^|]+ \| `([^`]+)` \|", section("README.md", "Stores"), re.MULTILINE)
STORES = "docs/stores.md"
RUN_S = 50


def command_with(uri: str) -> list[str]:
    return [word.replace("URI", uri) for word in shlex.split(block_with("bench fio", STORES))]


def run(words: list[str], directory: Path) -> str:
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with a file and the class of the documents."""
    make_checkout(tmp_path)
    (tmp_path / "disk.img").write_bytes(bytes(64 << 20))
    (tmp_path / "disk.py").write_text(block_with("class Disk", "docs/python-disks.md", "python"))
    return tmp_path


def test_table_has_every_backend() -> None:
    from vdusefast.backends import BACKENDS

    schemes = {uri.partition(":")[0] for uri in URIS}
    assert all(schemes & set(backend.schemes) for backend in BACKENDS)
    assert len(URIS) == len(BACKENDS)


@pytest.mark.slow
@pytest.mark.parametrize("uri", [uri for uri in URIS if not uri.startswith(("nbd", "rbd", "null"))])
def test_command_runs_on_what_needs_no_server(directory: Path, uri: str) -> None:
    assert "err= 0" in run(command_with(uri), directory)


@pytest.mark.slow
def test_command_runs_on_nothing(directory: Path) -> None:
    (uri,) = [uri for uri in URIS if uri.startswith("null")]
    words = [word for word in command_with(uri) if not word.startswith("--verify")]
    assert "err= 0" in run(words, directory)


@pytest.mark.slow
def test_command_runs_on_the_documented_nbd_server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (uri,) = [uri for uri in URIS if uri.startswith("nbd")]
    words = shlex.split(block_with("nbdkit", STORES))
    monkeypatch.chdir(directory)
    with Server(Path("disk.sock"), [words[0], "--foreground", *words[1:]]):
        assert "err= 0" in run(command_with(uri), directory)


@pytest.mark.slow
def test_command_runs_on_the_documented_image(directory: Path, ceph: Cluster) -> None:
    (uri,) = [uri for uri in URIS if uri.startswith("rbd")]
    ceph.rbd(*shlex.split(block_with("rbd create", STORES))[1:])
    shutil.copy(ceph.conf, directory / "ceph.conf")
    try:
        assert "err= 0" in run(command_with(uri), directory)
    finally:
        ceph.rbd("rm", "rbd/disk")
