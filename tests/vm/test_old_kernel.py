"""VDUSE as Linux 6.1 has it, which lacks what came with 6.4 and later: `make soak`, as its modules are built first."""

from __future__ import annotations

import pytest

from bench.vm import guest, old_kernel
from bench.vm.kernel_log import findings
from bench.vm.machine import GuestConfig

LIMIT_S = 2400
MODULES = ("vduse", "virtio_vdpa", "vhost_vdpa", "virtio_blk", "ext4", "loop")
CHECKS = (
    "block.",
    "filesystem.",
    "recovery.killed_under_verified_load",
    "serve.",
    "resize.",
    "memory.",
)


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT_S)
def test_devices_on_a_kernel_of_before_6_4() -> None:
    # With its CPUs emulated in turn, by a clock of instructions, this kernel waits for ever for its second one.
    config = GuestConfig(kernel=old_kernel.SERIES, timeout_s=LIMIT_S, modules=MODULES, clock="host")
    only = [word for check in CHECKS for word in ("--only", check)]
    outcome, out, err = guest.captured(config, ["python", "tests/vm/guest/runner.py", "/tmp", *only])
    assert outcome.status == 0, out + err
    assert findings(outcome.kernel_log) == []
