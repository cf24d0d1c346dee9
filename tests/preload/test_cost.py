"""What the preload library costs a program, counted and not timed."""

from __future__ import annotations

import subprocess

import pytest
from disk_rig import built, served

from vdusefast.driver import preload


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("batch", "most"), [(1, 580), (32, 290)])
def test_instructions_of_a_request(batch: int, most: float) -> None:
    """Hold the instructions of an AIO request, in io_submit() and io_getevents(), with so many of them in a call."""
    program = built(program="count_instructions")
    with served(uri="null:64M", poll="always") as (_device, server):  # no kicks: their number depends on the machine
        done = subprocess.run(
            [program, str(batch)],
            env=preload.environment(server),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert server.figures()["queues"][0]["published"] > 1000
    print(f"{batch} a call: {float(done.stdout):.0f} instructions a request")
    assert 0 < float(done.stdout) < most
