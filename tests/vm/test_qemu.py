"""A whole virtual machine on a vhost device: QEMU of Debian trixie, with a Linux inside, in each kernel.

An emulated machine in an emulated machine: it takes many minutes, so that `make soak` does it. In every run
scenario_qemu.py starts the same QEMU with its firmware alone.
"""

from __future__ import annotations

import json
import sys

import pytest
from scenario_guest import RUNNER

from bench.vm import cache, guest
from bench.vm.kernel_log import findings
from bench.vm.machine import GuestConfig

sys.path.append(str(RUNNER.parent))
import bootable_disk
import qemu_machine

SCRIPT = RUNNER.with_name("qemu_linux.py")
LIMIT_S = 5400.0
TREES = [(qemu_machine.SUITE, qemu_machine.PACKAGES), bootable_disk.TREE]  # conftest.py fetches them

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(int(LIMIT_S) + 200)]


def inside(kernel: str, part: str) -> None:
    """Run a part of qemu_linux.py in a guest."""
    config = GuestConfig(kernel=kernel, timeout_s=LIMIT_S, modules=("vduse", "vhost_vdpa"))
    outcome, out, err = guest.captured(config, ["python", str(SCRIPT), kernel, part])
    assert outcome.status == 0, err
    assert findings(outcome.kernel_log) == []
    found = json.loads(out.splitlines()[-1])
    assert found["ring_sizes"][0] > 0, found
    print(found)


@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_machine_lives_on_the_device(kernel: str) -> None:
    inside(kernel, "lives")


@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_machine_starts_from_the_device(kernel: str) -> None:
    inside(kernel, "starts")
