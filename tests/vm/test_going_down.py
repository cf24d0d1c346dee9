"""Poweroff and reboot of a machine whose process 1 is systemd, with devices in all states: see guest/going_down.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.vm import cache, guest
from bench.vm.kernel_log import findings
from bench.vm.machine import GuestConfig

SCRIPT = "tests/vm/guest/going_down.py"
BOOT_LIMIT_S, LONG_BOOT_LIMIT_S = 600, 2400  # on a host that is busy with others; a fifth on one that is not
INSTRUCTION_NS = 1  # both CPUs together do 1000 million instructions a second: a slow machine
# Of the guest's time, with what the guest itself takes. It is mostly computing: the devices of one guest are so few
# that this machine manages them in time. A hang costs 90 s at least.
DOWN_LIMIT_S = 10
SHORT = ("mounted", "held", "mounted_orphan")
FREE = ("idle", "busy", "client", "failed", "broken", "broken_orphan", "orphan", "client_orphan", "stopped")
WITH_SERVERS = ("mounted", "held", *FREE)


def end_guest(kernel: str, how: str, states: tuple[str, ...], disk: Path, limit_s: float) -> guest.Outcome:
    """Bring devices of a guest into states and end it. The store of the first one that is mounted is `disk`."""
    config = GuestConfig(
        kernel=kernel,
        systemd=True,
        timeout_s=limit_s,
        disk="64M",
        disk_image=disk,
        instruction_ns=INSTRUCTION_NS,
    )
    outcome, out, err = guest.captured(config, ["python", SCRIPT, how, *states])
    disk.with_name("kernel.log").write_text(outcome.kernel_log)
    assert outcome.went_down == ("Power down" if how == "poweroff" else "Restarting system"), out + err
    assert 0 < outcome.down_s < DOWN_LIMIT_S, outcome.kernel_log
    assert findings(outcome.kernel_log) == []
    print(f"{kernel}, {how}, {len(states)} devices: {outcome.down_s:.1f} s")
    return outcome


@pytest.mark.vm
@pytest.mark.timeout(BOOT_LIMIT_S + 60)
def test_a_machine_goes_down_whatever_state_its_devices_are_in(tmp_path: Path) -> None:
    end_guest("7.3", "poweroff", SHORT, tmp_path / "disk", BOOT_LIMIT_S)
    # Added in a login session, mounted by hand: unmounted before its server has ended.
    shown = subprocess.run(["dumpe2fs", "-h", tmp_path / "disk"], check=True, capture_output=True, text=True).stdout
    assert "needs_recovery" not in shown
    subprocess.run(["e2fsck", "-fn", tmp_path / "disk"], check=True, capture_output=True)


@pytest.mark.vm
@pytest.mark.soak
@pytest.mark.timeout(LONG_BOOT_LIMIT_S + 60)
@pytest.mark.parametrize("kernel", cache.KERNELS)
@pytest.mark.parametrize("how", ["poweroff", "reboot"])
@pytest.mark.parametrize("states", [SHORT, FREE], ids=["mounted", "free"])
def test_a_machine_goes_down_in_every_way(tmp_path: Path, kernel: str, how: str, states: tuple[str, ...]) -> None:
    end_guest(kernel, how, states, tmp_path / "disk", LONG_BOOT_LIMIT_S)


@pytest.mark.vm
@pytest.mark.soak
@pytest.mark.timeout(LONG_BOOT_LIMIT_S + 60)
@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_a_machine_reboots_at_once_with_servers_that_are_dead_or_stopped(tmp_path: Path, kernel: str) -> None:
    """`reboot -f` asks no service manager; it writes what file systems hold back, so each of those needs a server."""
    end_guest(kernel, "reboot-f", WITH_SERVERS, tmp_path / "disk", LONG_BOOT_LIMIT_S)
