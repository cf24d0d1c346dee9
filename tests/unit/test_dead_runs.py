"""What servers that were killed leave behind is removed by the next of their kind, and nothing else is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdusefast.driver import disk_directory
from vdusefast.driver.disk_directory import DiskDirectory
from vdusefast.state import dead_runs
from vdusefast.state.run_dir import RunDirectory


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.fixture
def living_pid() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def left(name: str, base: Path, transport: str = "loopback") -> Path:
    """Leave a run directory as a server does that is killed."""
    directory = RunDirectory(name, base, transport)
    (directory.path / "pages").touch()
    directory.release()
    return directory.path


def test_a_dead_run_directory_is_removed_by_its_own_kind(base: Path, dead_pid: int) -> None:
    path = left(f"run-{dead_pid}", base)
    dead_runs.remove_dead("bench")
    assert path.is_dir()
    dead_runs.remove_dead("run")
    assert not path.exists()


def test_our_own_number_of_an_earlier_life_is_removed(base: Path) -> None:
    path = left(dead_runs.name_of_process("run"), base)
    dead_runs.remove_dead("run")
    assert not path.exists()


def test_a_run_directory_of_a_living_process_stays(base: Path, living_pid: int) -> None:
    """It may be about to be made; or the number was used again, and it stays until that process has ended."""
    path = left(f"run-{living_pid}", base)
    dead_runs.remove_dead("run")
    assert path.is_dir()


def test_a_run_directory_that_is_held_stays(base: Path, dead_pid: int) -> None:
    """As of a process in another PID namespace."""
    with RunDirectory(f"run-{dead_pid}", base, "loopback") as directory:
        dead_runs.remove_dead("run")
        assert directory.lock_path.exists()


def test_a_device_of_the_kernel_stays(base: Path, dead_pid: int) -> None:
    """Its next server adopts it."""
    path = left(f"bench-{dead_pid}", base, "kernel")
    dead_runs.remove_dead("bench")
    assert (path / "pages").exists()


@pytest.mark.parametrize("name", ["run-x", "run", "run-", "rerun-{pid}", "run-{pid}-1", "runs-{pid}"])
def test_another_name_stays(base: Path, dead_pid: int, name: str) -> None:
    path = left(name.format(pid=dead_pid), base)
    dead_runs.remove_dead("run")
    assert path.is_dir()


def test_files_that_are_not_ours_keep_all_of_a_directory(base: Path, dead_pid: int) -> None:
    path = left(f"run-{dead_pid}", base)
    (path / "notes.txt").touch()
    dead_runs.remove_dead("run")
    assert {entry.name for entry in path.iterdir()} == {"lock", "notes.txt", "pages"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_a_directory_of_another_user_stays(base: Path, dead_pid: int) -> None:
    path = left(f"run-{dead_pid}", base)
    os.chown(path, 12345, 12345)
    disk = left_disk(base)
    os.chown(disk, 12345, 12345)
    dead_runs.remove_dead("run")
    disk_directory.remove_dead()
    assert path.is_dir()
    assert disk.is_dir()


def test_a_link_is_not_followed(base: Path, dead_pid: int) -> None:
    path = left("mine", base)
    (base / f"run-{dead_pid}").symlink_to(path)
    disk = left_disk(base, "elsewhere")
    (base / f"{disk_directory.PREFIX}link").symlink_to(disk)
    dead_runs.remove_dead("run")
    disk_directory.remove_dead()
    assert path.is_dir()
    assert disk.is_dir()


def left_disk(base: Path, name: str = f"{disk_directory.PREFIX}left") -> Path:
    """Leave a directory with an attach socket whose server is dead."""
    path = base / name
    path.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path / "run-1"))
    (path / "run-1.lock").touch()
    return path


def test_the_directory_of_a_dead_disk_is_removed(base: Path) -> None:
    path = left_disk(base)
    made = DiskDirectory()
    assert not path.exists()
    made.close()
    assert list(base.iterdir()) == []


def test_the_directory_of_a_living_disk_stays(base: Path) -> None:
    made = DiskDirectory()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bound:
        bound.bind(str(made.path / "run-1"))  # and does not listen yet
        disk_directory.remove_dead()
        assert made.path.is_dir()
    made.close()


def test_a_disk_whose_directory_nobody_has_locked_lives_by_its_socket(base: Path) -> None:
    """A server on a file system without locks."""
    path = base / f"{disk_directory.PREFIX}unlocked"
    path.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path / "run-1"))
        listener.listen()
        disk_directory.remove_dead()
        assert (path / "run-1").exists()


def test_an_empty_directory_stays_while_it_is_new(base: Path) -> None:
    path = base / f"{disk_directory.PREFIX}new"
    path.mkdir(mode=0o700)
    disk_directory.remove_dead()
    assert path.is_dir()
    old_s = time.time() - 2 * disk_directory.UNUSED_AGE_S
    os.utime(path, (old_s, old_s))
    disk_directory.remove_dead()
    assert not path.exists()


def test_a_disk_directory_with_other_files_stays(base: Path) -> None:
    path = left_disk(base)
    (path / "notes.txt").touch()
    disk_directory.remove_dead()
    assert len(list(path.iterdir())) == 3
