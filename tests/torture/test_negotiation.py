"""A server that dies while its driver negotiates: the messages that it has not answered go to the next one."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from vdusefast.bench.torture.loopback_host import LoopbackHost
from vdusefast.bench.torture.server import LoopbackServer
from vdusefast.config import make_config
from vdusefast.driver.loopback_driver import LoopbackDriver

ROUNDS = 25
NEGOTIATION_S = 0.02  # about what a driver takes to come up, do its requests and let go


def use(host: LoopbackHost, number: int, said: list[str]) -> None:
    """Come up, write and read through each queue, and let go."""
    try:
        with LoopbackDriver(host.bus) as driver:
            for queue in range(driver.queue_count):
                data = bytes([number, queue]) * 2048
                driver.write(4096 * queue, data, queue=queue)
                said.append("well" if driver.read(4096 * queue, 4096, queue=queue) == data else "wrong data")
    except Exception as error:
        said.append(repr(error))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_driver_comes_up_whatever_dies_meanwhile(tmp_path: Path) -> None:
    numbers = random.Random(5)
    store = tmp_path / "store.img"
    store.touch()
    os.truncate(store, 1 << 20)
    config = make_config(name="t0", uri=f"file:{store}", queues=2, queue_size=64)
    with (
        LoopbackHost(tmp_path / "bus") as host,
        LoopbackServer(config, host.path, tmp_path, msg_timeout_s=90) as server,
    ):
        server.start(recover=False)
        server.wait_ready()
        for number in range(ROUNDS):
            said: list[str] = []
            driver = threading.Thread(target=use, args=(host, number, said))
            driver.start()
            time.sleep(numbers.uniform(0, NEGOTIATION_S))
            server.kill(with_workers=numbers.random() < 0.5)
            server.start(recover=True)
            server.wait_ready()
            driver.join()
            assert said == ["well", "well"], f"round {number}: {said}: {server.log_end()}"
        server.stop()
