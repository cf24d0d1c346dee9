"""The driver's steps as the device carries them out: its status, its queues, a suspend.

`set_status` handles a reset, FEATURES_OK and DRIVER_OK.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from vdusefast.base.guard import Guard, Part
from vdusefast.control.device_model import BlockDevice, StatusChange, StatusRefusedError
from vdusefast.control.limits import Limits
from vdusefast.control.states import DeviceState
from vdusefast.control.virtqueue import VqControl
from vdusefast.control.vq_states import VqState
from vdusefast.transport import Transport, TransportError
from vdusefast.transport.uapi import VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK

READY_POLL_S = 0.001
READY_POLL_COUNT = 1000

_log = logging.getLogger("vdusefast")
_T = TypeVar("_T")


class DriverControl:
    """What one device does for its driver. `state` may be read in any thread."""

    def __init__(
        self, device: BlockDevice, transport: Transport, vqs: Sequence[VqControl], limits: Limits, guard: Guard
    ):
        """Prepare. All arguments are borrowed."""
        self.state = DeviceState.CREATED
        self.refusal = ""  # why the driver and we could not agree, last time it tried
        self.refused = asyncio.Event()
        self._device = device
        self._transport = transport
        self._vqs = vqs
        self._limits = limits
        self._guard = guard
        self._status_lock = asyncio.Lock()
        self._features_asked = False  # FEATURES_OK may have been asked for, and not been answered

    @property
    def is_running(self) -> bool:
        """Whether the driver has set DRIVER_OK."""
        return bool(self._device.status & VIRTIO_CONFIG_S_DRIVER_OK)

    async def adopt(self, whole: bool) -> None:
        """Serve the queues of a device that was adopted, from where their logs say. Raises VdusefastError.

        whole: also when one of them cannot be served.
        """
        self._device.status = self._transport.driver_status()
        if not self.is_running:
            # Its driver has yet to come, or has sent a message that waits for us: perhaps about these very features.
            self._features_asked = bool(self._device.status)
            return
        try:
            await self._driver_ok(recover=True, wait_all=whole)
        except StatusRefusedError as error:
            raise TransportError(f"device {self._device.name}: cannot continue with its driver: {error}") from None
        self.state = DeviceState.RUNNING
        failed = [vq.reason for vq in self._vqs if vq.state == VqState.FAILED]
        if whole and failed:
            raise TransportError("; ".join(failed))

    async def set_status(self, status: int) -> bool:
        """Carry out a new device status. Returns whether to answer OK. Raises StatusRefusedError."""
        async with self._status_lock:
            return await self._set_status(status)

    async def suspend(self) -> bool:
        """Stop every queue where it stands. Returns whether that is known of all; the device continues otherwise."""
        async with self._status_lock:
            before, self.state = self.state, DeviceState.SUSPENDED
            stands = await asyncio.gather(*(vq.quiesce() for vq in self._vqs))
            if None not in stands:
                return True
            self.state = before
            for vq in self._vqs:
                self.continue_when_kicked(vq)
            return False

    async def set_vq_ready(self, vq_index: int, ready: bool) -> bool:
        """Start or quiesce one queue. Returns whether there is such a queue: a refusal breaks the device for good, so
        that a queue that does not start is reported as failed instead.
        """
        if vq_index >= len(self._vqs):
            return False
        vq = self._vqs[vq_index]
        if not ready:
            await vq.quiesce()
        elif self.is_running and self.state != DeviceState.SUSPENDED:
            self._start_vq(vq, self._start_when_ready(vq))
        return True

    def continue_when_kicked(self, vq: VqControl) -> None:
        """Let a queue that was stopped by a question continue, should its driver do so."""
        if vq.state == VqState.STOPPED and self.is_running:
            vq.watch_kick(self._start_if_ready)

    def place_irqs(self) -> None:
        """Send the interrupts to the CPUs that they belong on. A refusal is logged."""
        try:
            self._transport.place_irqs()
        except OSError as error:
            _log.warning("device %s: interrupts go to any CPU: %s", self._device.name, error.strerror)

    def refuse(self, why: str) -> None:
        """Note why the driver could not take the device, for a start that waits for it."""
        self.refusal = why
        self.refused.set()

    # -- inside

    async def _set_status(self, status: int) -> bool:
        change = self._device.judge_status(status)
        if change == StatusChange.NOTHING and self._features_asked and status & VIRTIO_CONFIG_S_FEATURES_OK:
            change = StatusChange.FEATURES_OK  # asked of the previous supervisor, which has not answered
        self._features_asked = False
        if change == StatusChange.RESET:
            # In any case the driver starts again from nothing.
            self._device.status = 0
            self.state = DeviceState.ATTACHED
            return all(await asyncio.gather(*(vq.reset() for vq in self._vqs)))
        if change == StatusChange.FEATURES_OK:
            self._device.judge_features(self._transport.acked_features())
            # The last step that a driver can be refused: it takes no notice of how DRIVER_OK is answered.
            if not all(await asyncio.gather(*(vq.prepare() for vq in self._vqs))):
                reasons = "; ".join(vq.reason for vq in self._vqs if vq.reason)
                raise StatusRefusedError(f"FEATURES_OK: {reasons}")
        elif change == StatusChange.DRIVER_OK:
            await self._driver_ok()
            self.state = DeviceState.RUNNING
        elif change == StatusChange.GAVE_UP:
            _log.warning("device %s: the driver gave the device up (status %#x)", self._device.name, status)
            self.refuse(f"it set FAILED (status {status:#x})")
        self._device.status = status
        return True

    async def _driver_ok(self, *, recover: bool = False, wait_all: bool = False) -> None:
        """Set every queue's kick eventfd and start the queues that the driver has set up. The others are checked at
        each kick.

        Waits shortly for the starts, which are quick unless a worker has to be replaced first: a worker starts late
        rather than the message is answered late. A queue that does not start has failed, and the others serve: the
        kernel's driver continues whatever we answer, but would never be interrupted by a device that refused it.
        recover: the queues continue by their logs. wait_all: wait until each has started or failed. Raises
        StatusRefusedError for features that were changed since they were accepted.
        """
        acked_features = self._transport.acked_features()
        self._device.judge_features(acked_features)
        self.place_irqs()
        starts = []
        for vq in self._vqs:
            info = self._transport.vq_info(vq.index)
            self._transport.set_kickfd(vq.index, vq.kick_fd)
            if info.in_use:
                starts.append(self._start_vq(vq, vq.start(acked_features, info, recover=recover)))
            else:
                vq.watch_kick(self._start_if_ready)
        if starts:
            done, _late = await asyncio.wait(starts, timeout=None if wait_all else self._limits.start_grace_s)
            if not all(start.result() for start in done):
                self.refuse("; ".join(vq.reason for vq in self._vqs if vq.state == VqState.FAILED))

    def _start_vq(self, vq: VqControl, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T | None]:
        return self._guard.task(Part.QUEUE_START, work, vq.give_up)

    async def _start_when_ready(self, vq: VqControl) -> None:
        """Start a queue once the kernel has taken our answer: until then it drops the queue's interrupts."""
        asked = vq.stop_count
        for _ in range(READY_POLL_COUNT):
            if vq.stop_count != asked or self._start_if_ready(vq):
                return
            await asyncio.sleep(READY_POLL_S)
        vq.watch_kick(self._start_if_ready)

    def _start_if_ready(self, vq: VqControl) -> bool:
        """Start a queue that became ready after DRIVER_OK. Returns whether there is nothing (more) to wait for."""
        if vq.state == VqState.RUNNING or self._device.status == 0 or self.state == DeviceState.SUSPENDED:
            return True
        try:
            info = self._transport.vq_info(vq.index)
            acked_features = self._transport.acked_features()
        except OSError as error:  # the device is broken, which is reported through its messages
            _log.debug("device %s: queue %d: %s", self._device.name, vq.index, error.strerror)
            return True
        if info.in_use:
            vq.unwatch_kick()
            self._start_vq(vq, vq.start(acked_features, info))
        elif info.ready:  # it has no size yet: a kick comes when it has
            vq.watch_kick(self._start_if_ready)
        return info.ready
