"""The unit file that `systemd-unit` prints, the name of our own unit, and what systemd is asked for."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vdusefast
from vdusefast import errors
from vdusefast.cli import app as cli
from vdusefast.config import make_config
from vdusefast.server import service
from vdusefast.server.systemd import manager as service_manager
from vdusefast.server.systemd import unit as systemd_unit


def test_unit_starts_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["systemd-unit"]) == 0
    unit = capsys.readouterr().out
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    *words, command, config = start.split()
    assert (command, config) == ("serve", "/etc/vdusefast/%i.toml")
    done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout == f"vdusefast {vdusefast.__version__}\n"
    assert {"Type=notify", "NotifyAccess=all", "KillMode=process", "Restart=always"} <= set(unit.splitlines())
    deleted = service.EXIT_DELETED
    assert f"RestartPreventExitStatus=2 5 {deleted}" in unit
    assert f"SuccessExitStatus={deleted}" in unit
    assert deleted not in (0, 1, *errors._BY_EXIT_CODE)


def test_unit_reloads_by_this_installation() -> None:
    (words,) = re.findall(r"^ExecReload=(.*)$", systemd_unit.unit_text("/opt/v/bin/vdusefast"), re.MULTILINE)
    assert words == "/opt/v/bin/vdusefast systemd-reload /etc/vdusefast/%i.toml"


def test_unit_names_an_absolute_path_without_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python3")
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert systemd_unit.installed_command() == "/nowhere/python3 -m vdusefast"
    monkeypatch.setattr("shutil.which", lambda _: "/some where/vdusefast")
    with pytest.raises(errors.VdusefastError, match="a unit file cannot hold this path"):
        systemd_unit.installed_command()


def test_unit_lets_stores_elsewhere_be_reached() -> None:
    (families,) = re.findall(
        r"^RestrictAddressFamilies=(.*)$", systemd_unit.unit_text("/usr/bin/vdusefast"), re.MULTILINE
    )
    assert {"AF_UNIX", "AF_NETLINK", "AF_INET", "AF_INET6"} == set(families.split())


def verify(path: Path) -> list[str]:
    """Return what systemd says against a unit. Where there is no systemd, a unit is only read."""
    program = shutil.which("systemd-analyze")
    if program is None:
        parser = configparser.RawConfigParser(strict=False, allow_no_value=False)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        assert parser.read(path) == [str(path)]
        assert parser.sections() == ["Unit", "Service", "Install"]
        return []
    words = [program, "verify", "--man=no", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=50)
    said = [line for line in done.stderr.splitlines() if "vdusefast" in line]
    return said or ([f"status {done.returncode}: {done.stderr}"] if done.returncode else [])


def test_systemd_accepts_the_template(tmp_path: Path) -> None:
    path = tmp_path / "vdusefast@.service"
    path.write_text(systemd_unit.unit_text(systemd_unit.installed_command()))
    assert verify(path) == []


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(systemd_unit, "CONFIG_DIRECTORY", str(tmp_path))
    return tmp_path


def test_systemd_accepts_the_unit_of_one_device(etc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (etc / "vd-0.toml").write_text('[device]\nname = "vd-0"\n[backend]\nuri = "file:/srv/my images/vd0.img"\n')
    assert cli.run(["systemd-unit", "vd-0"]) == 0
    unit = capsys.readouterr().out
    (wanted,) = re.findall(r"^Wants=(.*)$", unit, re.MULTILINE)
    assert wanted.split()[:2] == ["srv.mount", r"srv-my\x20images.mount"]
    assert f"\nAfter={wanted}\n" in unit
    assert not re.search(r"^(Requires\w*|BindsTo|PartOf)=", unit, re.MULTILINE)  # these stop what depends on a restart
    path = etc / "vdusefast@vd-0.service"
    path.write_text(unit)
    assert verify(path) == []


def test_unit_of_a_device_that_is_not_configured(etc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["systemd-unit", "vd0"]) == 2
    assert "vd0.toml" in capsys.readouterr().err
    (etc / "vd0.toml").write_text('[device]\nname = "other"\n[backend]\nuri = "null:1M"\n')
    assert cli.run(["systemd-unit", "vd0"]) == 2
    assert "its device.name is other" in capsys.readouterr().err
    assert cli.run(["systemd-unit", "a b"]) == 2
    assert "not usable as vdusefast@NAME.service" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "needs"),
    [
        ("file:/disk.img", []),
        ("file:/srv/a/disk.img", ["srv.mount", "srv-a.mount"]),
        ("file:/dev/disk/by-id/wwn-0x5", [r"dev-disk-by\x2did-wwn\x2d0x5.device"]),
        ("nbd://host/export", ["network-online.target"]),
        ("nbd+unix:///?socket=/srv/s/disk.sock", ["srv.mount", "srv-s.mount"]),
        ("rbd:pool/image?conf=/etc/ceph/c.conf", ["network-online.target", "etc.mount", "etc-ceph.mount"]),
        ("python:/srv/d.py:Disk?path=/var/lib/x", ["srv.mount", "var.mount", "var-lib.mount"]),
        ("memory:1M", []),
    ],
)
def test_needs_of_a_store(uri: str, needs: list[str]) -> None:
    assert systemd_unit.needed_units(make_config(name="vd0", uri=uri), "/vdusefast") == needs


def test_needs_follow_links_to_the_store_and_to_the_programs(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/srv/a")
    config = make_config(name="vd0", uri=f"file:{tmp_path}/link/disk.img")
    assert {"srv.mount", "srv-a.mount"} <= set(systemd_unit.needed_units(config, "/opt/v/bin/vdusefast"))
    assert "opt-v.mount" in systemd_unit.needed_units(config, "/opt/v/bin/vdusefast serve")


@pytest.mark.parametrize("path", ["/", "/srv/a-b/c.d", "/.hidden/.x", "/a b/ü", "/x//y/"])
def test_names_of_mount_units_are_systemds(path: str) -> None:
    program = shutil.which("systemd-escape")
    if program is None:
        assert systemd_unit.escape("/srv/a-b/c.d") == r"srv-a\x2db-c.d"
        return
    done = subprocess.run([program, "--path", path], capture_output=True, text=True, check=True, timeout=20)
    assert (systemd_unit.escape(path) or "-") == done.stdout.strip()


# -- the manager


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/system-vdusefast.slice/vdusefast@vd0.service\n", "vdusefast@vd0.service"),
        ("12:pids:/x\n1:name=systemd:/system.slice/disks.service/sub\n0::/\n", "disks.service"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", ""),
        ("0::/user.slice/user-0.slice/user@0.service/app.slice/disks.service\n", ""),
        ("0::/\n", ""),
    ],
)
def test_own_unit(text: str, unit: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(text)
    assert service_manager.own_unit(tmp_path / "cgroup") == unit
    assert service_manager.own_unit(tmp_path / "none") == ""


def make_systemctl(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a systemctl first in PATH. Its words are what systemd's own takes; a guest has that one."""
    (directory / "systemctl").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def test_command_that_fails_has_the_reason_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """[ "$2" = show ] && { echo "reload failed: no such file"; exit 0; }; echo "Job failed" >&2; exit 1"""
    make_systemctl(tmp_path, monkeypatch, script)
    expected = "^systemctl reload vdusefast@vd0.service failed: reload failed: no such file$"
    with pytest.raises(errors.VdusefastError, match=expected):
        service_manager.reload("vdusefast@vd0.service", 20)
    make_systemctl(tmp_path, monkeypatch, """[ "$2" = show ] || { echo "Access denied" >&2; exit 4; }""")
    with pytest.raises(errors.VdusefastError, match=r"systemctl restart x\.service failed: Access denied"):
        service_manager.restart("x.service", 20)


def test_command_has_a_limit_and_needs_systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_systemctl(tmp_path, monkeypatch, "exec sleep 20")
    with pytest.raises(errors.TimedOutError, match=r"no result within 0\.1 s"):
        service_manager.reload("x.service", 0.1)
    (tmp_path / "systemctl").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.DeviceBusyError, match="there is no systemctl here"):
        service_manager.can_reload("x.service")
