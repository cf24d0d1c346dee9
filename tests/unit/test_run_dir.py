"""Run directories: held, free, and left by those that have died."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vdusefast.cli import app as cli
from vdusefast.host import processes, run_dirs
from vdusefast.server import registry
from vdusefast.state.run_dir import RunDirectory


def test_held_and_free_directories(tmp_path: Path) -> None:
    with RunDirectory("vd0", tmp_path) as directory:
        assert run_dirs.is_held(directory.path)
        assert run_dirs.holder_pid(directory.path) == os.getpid()
        assert run_dirs.device_names(tmp_path) == ["vd0"]
        directory.release()
        assert not run_dirs.is_held(directory.path)
        registry.remove_dead(directory.path)
    assert run_dirs.device_names(tmp_path) == []
    assert run_dirs.device_names(tmp_path / "none") == []
    assert not run_dirs.is_held(tmp_path / "none")
    assert run_dirs.holder_pid(tmp_path / "none") == 0


_DIES_SLOWLY = """
import ctypes, sys, threading, time
from pathlib import Path
from vdusefast.state.run_dir import RunDirectory
directory = RunDirectory("vd0", Path(sys.argv[1]))
threading.Thread(target=time.sleep, args=(float(sys.argv[2]),), daemon=True).start()
print("held", flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exit(2): of this thread alone; the process is a zombie that has its files still
"""


@pytest.mark.parametrize("limit_s", [10.0, 0.1])
def test_a_holder_that_is_dying_is_waited_for(tmp_path: Path, limit_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dirs, "DYING_S", limit_s)
    with subprocess.Popen(
        [sys.executable, "-c", _DIES_SLOWLY, str(tmp_path), "1"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        while not processes.is_ending(holder.pid):
            time.sleep(0.01)
        assert run_dirs.is_held(tmp_path / "vd0") == (limit_s < 1)
    registry.remove_dead(tmp_path / "vd0")


@pytest.mark.parametrize(
    ("stat", "status", "ending"),
    [
        ("5 (a) b) S 1 5 5 0 -1 4194304 0", "SigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\n", False),
        ("5 (a) b) Z 1 5 5 0 -1 4194304 0", "", True),
        ("5 (a) b) R 1 5 5 0 -1 4194308 0", "", True),
        ("5 (a) b) T 1 5 5 0 -1 4194304 0", "SigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n", True),
        ("5 (a) b) D 1 5 5 0 -1 4194304 0", "SigPnd:\t0000000000000000\nShdPnd:\t0000000000000101\n", True),
        ("5 (a) b) D 1 5 5 0 -1 4194304 0", "ShdPnd:\t0000000000004200\nSigBlk:\t0000000000000100\n", False),
    ],
)
def test_a_process_that_is_ending(tmp_path: Path, stat: str, status: str, ending: bool) -> None:
    (tmp_path / "proc/5").mkdir(parents=True)
    (tmp_path / "proc/5/stat").write_text(stat)
    (tmp_path / "proc/5/status").write_text(status)
    assert processes.is_ending(5, tmp_path) == ending
    assert processes.is_ending(1 << 30, tmp_path)  # there is none: it is above the largest pid
    assert not processes.is_ending(os.getpid(), tmp_path)  # /proc hides it, as with hidepid=2
    assert not processes.is_ending(0, tmp_path)  # not known


def test_a_look_at_the_lock_does_not_refuse_who_wants_the_name(tmp_path: Path) -> None:
    (tmp_path / "vd0").mkdir(mode=0o700)
    fd = os.open(tmp_path / "vd0/lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_SH)
    threading.Timer(0.01, os.close, (fd,)).start()
    with RunDirectory("vd0", tmp_path) as directory:
        assert directory.path.is_dir()


def test_a_kernel_device_without_a_server_is_destroyed_by_force_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    destroyed: list[str] = []
    monkeypatch.setattr("vdusefast.host.sysfs.created", lambda name: name == "left")
    monkeypatch.setattr("vdusefast.host.sysfs.attached", lambda _name: False)
    monkeypatch.setattr("vdusefast.transport.kernel_control.destroy_device", destroyed.append)
    assert cli.run(["del", "left"]) == 3
    assert "vdusefast del left --force" in capsys.readouterr().err
    assert destroyed == []
    assert cli.run(["del", "left", "--force"]) == 0
    assert destroyed == ["left"]
    assert cli.run(["del", "other", "--force"]) == 3
    monkeypatch.setattr("vdusefast.host.sysfs.attached", lambda _name: True)
    assert cli.run(["del", "left", "--force"]) == 3
    assert destroyed == ["left"]
