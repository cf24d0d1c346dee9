"""A guest with little memory writes back to a device: it does not hang, and nothing is lost.

The short form, in the newest kernel, runs with every test; the long one, ten minutes a kernel, is `make soak`.
"""

from __future__ import annotations

import json
import os

import pytest

from bench.vm import cache, guest
from bench.vm.kernel_log import findings
from bench.vm.machine import ROOT, GuestConfig

SCRIPT = ROOT / "tests/vm/guest/pressure.py"
SOAK_S = float(os.environ.get("VDUSEFAST_SOAK_S", "600"))
SHORT_S = 15.0
MARGIN_S = 400.0  # a loaded host needs a minute for what takes a second on a quiet one

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(int(SOAK_S) + 2 * int(MARGIN_S))]


def without_retries(kernel_log: str) -> str:
    """Leave out that VDUSE did not get a bounce page at once, with its stack: the kernel tries the request again."""
    kept, is_told = [], False
    for line in kernel_log.splitlines():
        if "page allocation failure: order:0" in line and "GFP_ATOMIC" in line:
            is_told = True
        elif is_told and "Call Trace:" in line:
            is_told = False
        else:
            kept.append(line)
    return "\n".join(kept)


def test_one_stack_is_left_out_for_each_retry() -> None:
    retry = "w: page allocation failure: order:0, mode:0x820(GFP_ATOMIC), nodemask=(null)\nCPU: 0\nCall Trace:\n f"
    assert findings(without_retries(f"{retry}\n{retry}")) == []
    assert findings(without_retries(f"{retry}\nCall Trace:\n g")) == ["Call Trace:"]


def test_write_back_goes_on_when_memory_is_short() -> None:
    write_back(cache.KERNELS[-1], SHORT_S)


@pytest.mark.soak
@pytest.mark.parametrize("kernel", cache.KERNELS)
def test_write_back_goes_on_for_long(kernel: str) -> None:
    write_back(kernel, SOAK_S)


def write_back(kernel: str, seconds: float) -> None:
    """Boot a guest with 512 MiB that writes back to a device for so long, and look at what it found."""
    config = GuestConfig(
        kernel=kernel,
        timeout_s=seconds + MARGIN_S,
        memory="512M",
        disk="1G",
        modules=("vduse", "virtio_vdpa", "virtio_blk", "ext4"),
    )
    outcome, out, err = guest.captured(config, ["python", str(SCRIPT), str(seconds)])
    assert outcome.status == 0, err
    assert findings(without_retries(outcome.kernel_log)) == []
    found = json.loads(out.splitlines()[-1])
    assert found["files_right"] >= 1
    assert found["written_mib"] > 32  # more than may be dirty
