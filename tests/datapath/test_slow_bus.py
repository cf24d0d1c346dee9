"""A bus that answers late: requests wait for it, and none fails. The kernel's ioctl has no time limit either."""

from __future__ import annotations

import socket
import time

import pytest

import vdusefast
from vdusefast.driver.loopback_driver import LoopbackDriver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]
LATE_S = 6.0


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_request_waits_for_memory_that_the_bus_is_slow_to_give(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = vdusefast.make_config(name="slow-bus", uri="memory:1M", transport="loopback", packed=packed)
    with vdusefast.Device(config) as device, LoopbackDriver(device.bus) as driver:
        answer, late = device.bus._answer_port, []

        def answer_late(sock: socket.socket, start: int, last: int) -> None:
            if not late:
                late.append(start)
                time.sleep(LATE_S)
            answer(sock, start, last)

        monkeypatch.setattr(device.bus, "_answer_port", answer_late)
        driver.write(0, b"x" * 4096)  # from buffers that the worker has not mapped yet
        assert late
        assert driver.read(0, 4096) == b"x" * 4096
        assert device.failure is None
