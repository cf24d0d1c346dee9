"""The driver is closed while other threads use it: each of their calls ends, and none touches memory that is gone."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]

# In a process of its own, which a stray access kills. What: a call, repeated until the driver is closed.
PROGRAM = """
import faulthandler, random, sys, threading, time
import vdusefast
from vdusefast.bench.raw.memory import Workload, make_job
from vdusefast.driver import _driver
from vdusefast.driver.loopback_driver import LoopbackDriver

faulthandler.enable()
what, rounds = sys.argv[1], int(sys.argv[2])

def job(driver):
    load = Workload(kind="mixed", order="random", block_bytes=4096, depth=8, size_bytes=1 << 20, io_limit=0,
                    queue_count=1, read_share=0.5, runtime_s=60.0)
    return _driver.DriverThread([driver.ring(0)], [make_job(driver, load)])

CALLS = {
    "read": lambda driver: driver.read(0, 1 << 16),
    "write": lambda driver: driver.write(0, bytes(1 << 16)),
    "flush": lambda driver: driver.flush(),
    "discard": lambda driver: driver.discard(0, 4096),
    "zeroes": lambda driver: driver.write_zeroes(0, 4096),
    "id": lambda driver: driver.get_id(),
    "wait": lambda driver: driver.ring(0).wait(60000),
    "add_region": lambda driver: driver.add_region(4096),
    "run": lambda driver: job(driver).run(),
}

def use(driver, ended):
    try:
        while True:
            CALLS[what](driver)
    except (ValueError, OSError, vdusefast.VdusefastError, IndexError) as error:
        ended.append(error)

chance = random.Random(what)
config = vdusefast.make_config(name="closed", uri="memory:8M", transport="loopback", queues=2)
for _ in range(rounds):
    with vdusefast.Device(config) as device:
        driver, ended = LoopbackDriver(device.bus), []
        thread = threading.Thread(target=use, args=(driver, ended))
        thread.start()
        time.sleep(chance.random() / 20)
        driver.close()
        thread.join(20)
        assert not thread.is_alive(), f"{what} does not end"
        assert len(ended) == 1, ended
        assert len(device.bus._regions._regions) == 0
        del driver
print("well")
"""
CALLS = ("read", "write", "flush", "discard", "zeroes", "id", "wait", "add_region", "run")


@pytest.mark.parametrize("call", CALLS)
def test_close_ends_a_call_of_another_thread(call: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, call, "4"], capture_output=True, text=True, timeout=150, check=False
    )
    assert (done.returncode, done.stdout) == (0, "well\n"), f"{done.returncode}: {done.stderr[-3000:]}"
