"""The resize of a device that runs: its workers learn the size, then its driver, or the other way round.

resize.py is about the store.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from contextlib import suppress

from vdusefast.base.guard import Guard, Part
from vdusefast.control.device_model import BlockDevice
from vdusefast.control.virtqueue import VqControl
from vdusefast.errors import VdusefastError
from vdusefast.transport import Transport, TransportError

CONFIG_POLL_S = 0.01
CONFIG_POLL_COUNT = 1000


class DeviceResize:
    """The capacity of one device, as its workers serve it and as its driver sees it."""

    def __init__(
        self,
        device: BlockDevice,
        transport: Transport,
        vqs: Sequence[VqControl],
        guard: Guard,
        is_stopping: Callable[[], bool],
    ):
        """Prepare; see `resize`. All arguments are borrowed."""
        self._device = device
        self._transport = transport
        self._vqs = vqs
        self._guard = guard
        self._is_stopping = is_stopping

    async def resize(self, capacity_sectors: int) -> None:
        """Give the device another size while it runs.

        A driver never sees more than the workers serve: they learn of a larger size before it, and of a smaller one
        after it. Nothing is in flight beyond a smaller size when this returns. Raises TimedOutError for a worker that
        does not answer. A device that was to grow then keeps its size. A device that was to shrink has shown its
        driver the new size, and the worker serves it when it continues.
        """
        before_sectors = self._device.capacity_sectors
        if capacity_sectors < before_sectors:
            self.show_capacity(capacity_sectors)
        try:
            await self._resize_workers(capacity_sectors)
            if capacity_sectors > before_sectors:
                self.show_capacity(capacity_sectors)
        except VdusefastError:
            if capacity_sectors > before_sectors and not self._is_stopping():
                with suppress(VdusefastError):  # a worker that hangs takes both sizes, one after the other
                    await self._resize_workers(before_sectors)
            raise

    def show_capacity(self, capacity_sectors: int) -> None:
        """Change the configuration space, and interrupt the driver. Raises TransportError."""
        before_sectors = self._device.capacity_sectors
        try:
            self._transport.set_config(0, self._device.set_capacity(capacity_sectors))
        except OSError as error:
            self._device.set_capacity(before_sectors)
            raise TransportError(f"device {self._device.name}: cannot be resized: {error.strerror}") from error
        self._guard.task(Part.CONFIG_IRQ, self._interrupt_for_config())

    async def _resize_workers(self, capacity_sectors: int) -> None:
        """Have all workers, side by side, serve that size. Raises the first one's VdusefastError, after all."""
        results = await asyncio.gather(*(vq.slot.resize(capacity_sectors) for vq in self._vqs), return_exceptions=True)
        for result in results:
            if result is not None:
                raise result

    async def _interrupt_for_config(self) -> None:
        """Interrupt the driver for its configuration. A driver that is still starting gets it when it has started."""
        for _ in range(CONFIG_POLL_COUNT):
            try:
                self._transport.inject_config_irq()
                return
            except OSError as error:  # there is none yet, or no device any more, which is reported by its messages
                if error.errno != errno.EINVAL or not self._device.status:
                    return
            await asyncio.sleep(CONFIG_POLL_S)
