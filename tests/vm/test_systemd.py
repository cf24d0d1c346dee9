"""Devices that systemd serves, as process 1 of a guest. The checks are in tests/vm/guest/systemd_service.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from systemd_guest import SCRIPT, SystemdGuest

from bench.vm import cache

sys.path.append(str(SCRIPT.parent))
from systemd_service import ORDER, SHORT

SHORT_LIMIT_S, LIMIT_S = 900, 1800  # for a guest on a host that is busy with others; a quarter on one that is not

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 30)]


def test_crash_and_upgrade_are_a_pause_for_a_file_system_of_fstab(tmp_path: Path) -> None:
    """Killed and reloaded: no I/O error, no unmount. The others are in the long form."""
    SystemdGuest(cache.KERNELS[0], SHORT, tmp_path, SHORT_LIMIT_S).verify(SHORT)


@pytest.mark.soak
@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_all_ways_to_restart_a_service(kernel: str, tmp_path: Path) -> None:
    SystemdGuest(kernel, ORDER, tmp_path, LIMIT_S).verify(ORDER)
