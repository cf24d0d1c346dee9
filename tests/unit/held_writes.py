"""A driver of a device whose server changes: it writes blocks before, and has a write in flight in each queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vdusefast.driver.loopback_driver import STATUS_OFFSET, STATUS_UNSET, LoopbackDriver
from vdusefast.transport.virtio_blk import REQUEST_HEADER, VIRTIO_BLK_T_OUT
from vdusefast.units import SECTOR_BYTES

QUEUES, BLOCK = 2, 4096
BLOCK_COUNT = 64
HELD = range(512 * 1024, 768 * 1024)  # where the writes in flight go: a rule of `faulty:` can hold them up
WAIT_S = 120.0


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def block(number: int) -> bytes:
    return bytes([number + 1]) * BLOCK


def write_blocks(driver: LoopbackDriver) -> None:
    for number in range(BLOCK_COUNT):
        driver.write(number * BLOCK, block(number), queue=number % QUEUES)


def check_blocks(driver: LoopbackDriver) -> None:
    """Read by the other queue what `write_blocks` and HeldWrites have written."""
    for number in range(BLOCK_COUNT):
        assert driver.read(number * BLOCK, BLOCK, queue=1 - number % QUEUES) == block(number)
    for queue in range(QUEUES):
        assert driver.read(HELD[queue * BLOCK], BLOCK, queue=1 - queue) == block(100 + queue)


class HeldWrites:
    """A write in each queue that is not answered before the end of the `with` block."""

    def __init__(self, driver: LoopbackDriver) -> None:
        self.errors: list[BaseException] = []
        self._driver = driver
        self._threads = [threading.Thread(target=self._write, args=(queue,)) for queue in range(QUEUES)]

    def __enter__(self) -> HeldWrites:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(WAIT_S)

    def wait_sent(self) -> None:
        """Wait until the driver has put all of them into its rings."""
        wait_until(lambda: all(self._driver.ring(queue).inflight for queue in range(QUEUES)))

    def unanswered(self) -> bool:
        """Return whether none of them has been answered."""
        return all(thread.is_alive() for thread in self._threads)

    def _write(self, queue: int) -> None:
        """Write as the driver does, but with more patience: a server starts meanwhile."""
        try:
            region = self._driver.add_region(2 * BLOCK)
            REQUEST_HEADER.pack_into(region.buf, 0, VIRTIO_BLK_T_OUT, 0, HELD[queue * BLOCK] // SECTOR_BYTES)
            region.buf[STATUS_OFFSET] = STATUS_UNSET
            region.buf[BLOCK : 2 * BLOCK] = block(100 + queue)
            header, data = (region.iova, REQUEST_HEADER.size, False), (region.iova + BLOCK, BLOCK, False)
            chain = [header, data, (region.iova + STATUS_OFFSET, 1, True)]
            self._driver.submit_chain(chain, queue=queue, timeout_s=WAIT_S)
            assert region.buf[STATUS_OFFSET] == 0
        except BaseException as error:
            self.errors.append(error)
