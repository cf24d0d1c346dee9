"""The messages of the kernel (or of the loopback bus): each is read, carried out and answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from vdusefast.base.guard import Guard, Part
from vdusefast.control.device_model import BlockDevice, StatusRefusedError
from vdusefast.control.driver_control import DriverControl
from vdusefast.control.failures import Failures
from vdusefast.control.states import DeviceState
from vdusefast.control.virtqueue import VqControl
from vdusefast.errors import VdusefastError
from vdusefast.transport import Transport, TransportError
from vdusefast.transport.uapi import (
    GetVqState,
    Request,
    Response,
    SetStatus,
    SetVqGroupAsid,
    SetVqReady,
    Suspend,
    UnknownRequest,
    UpdateIotlb,
    is_packed,
)

MESSAGES_A_TURN_MAX = 64
DEAF_COUNT_MAX = 3

_log = logging.getLogger("vdusefast")


class Messages:
    """The messages of one device."""

    def __init__(
        self,
        device: BlockDevice,
        transport: Transport,
        vqs: Sequence[VqControl],
        driver: DriverControl,
        guard: Guard,
        failures: Failures,
    ):
        """Prepare; see `watch`. All arguments are borrowed."""
        self._device = device
        self._transport = transport
        self._vqs = vqs
        self._driver = driver
        self._guard = guard
        self._failures = failures
        self._deaf_count = 0  # failures in a row to read a message
        self._fd = -1

    def watch(self) -> None:
        """Read and answer messages from now on."""
        self._fd = self._transport.message_fd()
        self._guard.reader(self._fd, Part.MESSAGES, self._on_messages, self._read_on)

    def unwatch(self) -> None:
        """Read no more; a second call does nothing."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._fd = -1

    # -- inside

    def _on_messages(self) -> None:
        for _ in range(MESSAGES_A_TURN_MAX):
            try:
                request = self._transport.receive()
            except (TransportError, OSError) as error:
                self._break(error)
                return
            self._deaf_count = 0
            if request is None:
                return
            self._guard.task(Part.ANSWER, self._handle(request), partial(self._refuse, request))

    def _read_on(self) -> None:
        """Read the next message after one that could not be read, unless several in a row could not."""
        self._deaf_count += 1
        if self._deaf_count >= DEAF_COUNT_MAX:
            self._break(TransportError(f"device {self._device.name}: its messages cannot be read"))

    def _refuse(self, request: Request) -> None:
        self._transport.respond(Response(request.request_id, False))

    def _break(self, error: Exception) -> None:
        """Stop serving a device that the transport has given up: nobody may write into memory taken back."""
        self.unwatch()
        self._driver.state = DeviceState.BROKEN
        self._failures.begin(
            error if isinstance(error, VdusefastError) else TransportError(f"{self._device.name}: {error}")
        )
        for vq in self._vqs:
            self._guard.task(Part.QUEUE_RESET, vq.reset(), vq.give_up)

    async def _handle(self, request: Request) -> None:
        """Answer one message."""
        try:
            response = await self._answer(request)
        except StatusRefusedError as error:
            _log.warning("device %s: %s: answered FAILED", self._device.name, error)
            self._driver.refuse(str(error))
            response = Response(request.request_id, False)
        try:
            self._transport.respond(response)
        except OSError as error:
            _log.error("device %s: %s could not be answered: %s", self._device.name, request, error.strerror)

    async def _answer(self, request: Request) -> Response:
        match request:
            case SetStatus(request_id, status):
                return Response(request_id, await self._driver.set_status(status))
            case GetVqState(request_id, vq_index):
                if vq_index >= len(self._vqs):
                    return Response(request_id, False)
                last_avail_idx = await self._vqs[vq_index].quiesce()
                self._driver.continue_when_kicked(self._vqs[vq_index])
                packed = is_packed(self._transport.acked_features())
                return Response(request_id, last_avail_idx is not None, vq_index, last_avail_idx or 0, packed)
            case UpdateIotlb(request_id, start, last):
                gone = await asyncio.gather(*(vq.invalidate(start, last) for vq in self._vqs))
                return Response(request_id, all(gone))
            case SetVqReady(request_id, vq_index, ready):
                return Response(request_id, await self._driver.set_vq_ready(vq_index, ready))
            case SetVqGroupAsid(request_id, group, asid):
                return Response(request_id, group == 0 and asid == 0)  # the only ones that the device was created with
            case Suspend(request_id):
                return Response(request_id, await self._driver.suspend())
            case UnknownRequest(request_id, kind):
                _log.error("device %s: message of unknown type %d: answered FAILED", self._device.name, kind)
                return Response(request_id, False)
