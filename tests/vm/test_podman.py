"""A server in a container of podman, by the commands of docs/containers.md, in a guest of its own."""

from __future__ import annotations

import sys

import pytest
from scenario_guest import RUNNER

from bench.vm import cache, guest
from bench.vm.kernel_log import findings
from bench.vm.machine import GuestConfig

sys.path.append(str(RUNNER.parent))
import containers

TREES = [containers.TREE]  # conftest.py fetches them
LIMIT_S = 900.0

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(int(LIMIT_S) + 120)]


@pytest.mark.soak
@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_recipe_of_the_document(kernel: str) -> None:
    config = GuestConfig(kernel=kernel, timeout_s=LIMIT_S, modules=("vduse", "virtio_vdpa", "virtio_blk", "ext4"))
    outcome, out, err = guest.captured(config, ["python", str(RUNNER), "/tmp", "--only", "container."])
    assert outcome.status == 0, f"{out}{err}"
    assert findings(outcome.kernel_log) == []
