"""How a container is recognised, from copies of /proc, and the message about it."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest

from vdusefast.cli.render import show_text
from vdusefast.host import containers, device_holders, run_dirs
from vdusefast.state import run_dir

DEVTMPFS = "24 1 0:6 / /dev rw - devtmpfs udev rw\n"
TMPFS = "31 24 0:30 / /dev rw - tmpfs tmpfs rw\n"
PTS = "25 24 0:22 / /dev/pts rw - devpts devpts rw\n"


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(containers, "PROC", tmp_path)
    return tmp_path / "self"


@pytest.mark.parametrize(
    ("mounts", "own"),
    [(DEVTMPFS + PTS, False), (TMPFS + PTS, True), (DEVTMPFS + TMPFS, True), (TMPFS + DEVTMPFS, False), (PTS, True)],
)
def test_own_dev_is_one_where_no_devtmpfs_is_on_top(proc: Path, mounts: str, own: bool) -> None:
    (proc / "mountinfo").write_text(mounts)
    assert containers.has_own_dev() is own


@pytest.mark.parametrize(
    ("uid_map", "initial"), [("         0          0 4294967295\n", True), ("0 100000 65536\n", False)]
)
def test_user_namespace(proc: Path, uid_map: str, initial: bool) -> None:
    (proc / "uid_map").write_text(uid_map)
    assert containers.is_initial_user_namespace() is initial


@pytest.mark.parametrize(
    ("refusal", "uid_map", "said"),
    [
        (errno.EPERM, "0 0 4294967295", "device cgroup .*--device-cgroup-rule='c 1:* rw'"),
        (errno.EACCES, "0 100000 65536", "root of this user namespace is not root of the machine"),
    ],
)
def test_refused_node(proc: Path, refusal: int, uid_map: str, said: str) -> None:
    (proc / "uid_map").write_text(uid_map)
    text = containers.refused_node_text("/dev/null", OSError(refusal, "no"))
    assert all(part in text for part in said.split(" .*")), text


def test_pid_of_another_namespace_is_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_dir.RunDirectory("vd0", tmp_path, "kernel") as directory:
        assert run_dirs.holder_pid(directory.path) > 0
        ours = containers.pid_namespace()
        monkeypatch.setattr(containers, "pid_namespace", lambda: ours + 1)
        assert run_dirs.holder_pid(directory.path) == 0
        assert run_dirs.holder_transport(directory.path) == "kernel"


def test_lock_file_without_a_namespace_is_read(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"{'17 kernel':99}\n")
    assert (run_dirs.holder_pid(tmp_path), run_dirs.holder_transport(tmp_path)) == (17, "kernel")


def test_show_says_what_is_not_of_here() -> None:
    info = {"name": "vd0", "node": "/dev/null", "device_number": "254:16", "pid": 1, "pid_namespace": 5, "queues": []}
    text = " ".join(show_text(info).split())
    assert "/dev/null (254:16), not in this /dev" in text
    assert "pid 1 of its own PID namespace" in text
    here = {"device_number": "1:3", "pid_namespace": containers.pid_namespace()}
    text = " ".join(show_text(info | here).split())
    assert "not in this /dev" not in text
    assert "namespace" not in text


def test_who_holds_a_node_is_found() -> None:
    with open("/dev/full", "wb") as node, subprocess.Popen(["sleep", "60"], stdout=node) as holder:
        node.close()
        try:
            assert device_holders.text("/dev/full") == f"pid {holder.pid} (sleep)"
        finally:
            holder.kill()


def test_nobody_who_can_be_seen_holds_a_node(tmp_path: Path) -> None:
    assert device_holders.text(str(tmp_path / "gone")) == "a process"
    assert device_holders.text("/dev/port").startswith("a process")
