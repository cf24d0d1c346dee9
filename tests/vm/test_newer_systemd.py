"""A newer systemd than this machine's, that of Debian trixie: what it says of our units, and how it runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from systemd_guest import SCRIPT, SystemdGuest

from bench.vm import cache
from vdusefast.server.systemd import unit

sys.path.append(str(SCRIPT.parent))
from systemd_service import SHORT

# systemd, and what has to be of the same version where it is process 1.
TRIXIE = ("trixie", ("systemd", "systemd-sysv", "udev", "dbus", "libpam-systemd", "util-linux", "kmod", "mount"))
TREES = [TRIXIE]  # conftest.py fetches them
LIMIT_S = 50
GUEST_LIMIT_S = 1800
EXPOSURE_MAX = 60  # tenths: systemd.exec(5) counts what a unit leaves open

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3 * LIMIT_S)]


def analyze(directory: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run trixie's systemd-analyze with its own libraries, on units of `directory` and of trixie."""
    tree = cache.tree(*TRIXIE)
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    loader = [tree / "lib64/ld-linux-x86-64.so.2", "--library-path", f"{libraries}:{libraries}/systemd"]
    return subprocess.run(
        [*map(str, loader), str(tree / "usr/bin/systemd-analyze"), *map(str, words)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{directory}:{tree}/usr/lib/systemd/system"},
        check=True,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "vdusefast@.service"
    path.write_text(unit.unit_text(unit.installed_command(), ["srv-store.mount", *unit.NETWORK]))
    return path


def test_a_newer_systemd_has_nothing_against_the_unit(template: Path) -> None:
    assert analyze(template.parent, "--version").stdout.startswith("systemd 257 ")
    assert analyze(template.parent, "verify", "--man=no", template).stderr == ""
    # It would say so.
    template.write_text(template.read_text().replace("RestartSec=", "RestartSeconds="))
    assert "Unknown key 'RestartSeconds'" in analyze(template.parent, "verify", "--man=no", template).stderr


def test_a_newer_systemd_finds_the_unit_no_more_exposed_than_it_has_to_be(template: Path) -> None:
    said = analyze(template.parent, "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", template)
    assert "Overall exposure level" in said.stdout


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(GUEST_LIMIT_S + 60)
def test_a_newer_systemd_serves_and_restarts_as_this_one_does(tmp_path: Path) -> None:
    """The unit boots with its mount of fstab; its server is killed and reloaded under load; the machine reboots."""
    ran = SystemdGuest(cache.KERNELS[-1], SHORT, tmp_path, GUEST_LIMIT_S, over=cache.tree(*TRIXIE))
    ran.verify(SHORT)
    assert "systemd 257" in ran.outcome.kernel_log
