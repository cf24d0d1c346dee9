"""Run directories: held, free, and left by those that have died."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from vdusefast.cli import app as cli
from vdusefast.host import run_dirs
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
