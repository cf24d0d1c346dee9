"""The connection of a device to its driver: one small protocol with one implementation for each transport.

The supervisor and the workers use nothing else of it. There is one method for each ioctl of /dev/vduse, so the
implementation over the real device is thin. Only `worker_port` is ours: a worker process looks up memory and sends
interrupts through it by itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vdusefast.base.kinds import TransportKind
from vdusefast.errors import VdusefastError
from vdusefast.transport.uapi import VIRTIO_ID_BLOCK, Request, Response, VqInfo

if TYPE_CHECKING:
    from vdusefast.transport.user_memory import UserMemory


class TransportError(VdusefastError):
    """The transport or the other side refuses an operation; the message names the device."""


class DeviceBrokenError(TransportError):
    """The device did not answer a message in time; it can only be recreated."""


@dataclass(frozen=True)
class DeviceSpec:
    """Parameters of a new device. `queue_size_max` counts descriptors; `config` is the whole configuration space."""

    name: str
    offered_features: int
    config: bytes
    queue_count: int
    queue_size_max: int
    device_id: int = VIRTIO_ID_BLOCK
    vq_align_bytes: int = 4096
    rotational: int = -1  # 1 or 0; -1: unknown. Virtio has no field for it


@dataclass
class WorkerPort:
    """The access of one worker process to memory and driver, which it inherits.

    `kind` is its name in the worker's arguments. `port_fd` and `irq_fd` are -1 if `kind` does not use them. The
    descriptors in `owned_fds` belong to the caller, who closes this once the worker has its copies; the others are
    the transport's. `api_version` is that of VDUSE, if `kind` has one. The user memory may replace the kernel's bounce
    pages; `user_memory_bytes` of it do already.
    """

    kind: str
    port_fd: int = -1
    irq_fd: int = -1
    api_version: int = 0
    user_memory_fd: int = -1
    user_memory_bytes: int = 0
    owned_fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close the owned descriptors; a second call does nothing."""
        while self.owned_fds:
            os.close(self.owned_fds.pop())


class Transport(Protocol):
    """The device's side of one device. All methods are called in the supervisor's thread."""

    kind: TransportKind
    memory_text: str  # what requests' data lies in, for people
    msg_timeout_s: float  # a message unanswered for so long breaks the device; 0 = never
    keeps: bool  # whether the device outlives its server, so that another one can adopt it
    irq_cpus: tuple[int | None, ...]  # where each queue's interrupts go from the next `place_irqs` on; None = anywhere

    @property
    def node(self) -> str:
        """The file by which the driver's side is used, "" while there is none."""

    @property
    def driver(self) -> str:
        """The name of the kernel's driver that has the device, "" while none has it."""

    def create(self, spec: DeviceSpec) -> None:
        """Create the device with its queues; no driver can see it yet. Raises TransportError."""

    def reopen(self, spec: DeviceSpec) -> None:
        """Adopt, instead of `create`, the orphaned device that `spec` describes.

        Waits shortly while the last processes of its server still hold it. Raises TransportError, DeviceBusyError when
        they do not end, DeviceBrokenError; the device is unchanged then, and not held.
        """

    def check(self, spec: DeviceSpec) -> None:
        """Raise the errors of `reopen` that can be seen while another server has the device."""

    def driver_status(self) -> int:
        """Return the device status, as far as it is known after `reopen`. Raises OSError.

        0, or ACKNOWLEDGE, DRIVER and FEATURES_OK, with or without DRIVER_OK.
        """

    async def attach(self) -> None:
        """Attach the device to its driver; after `reopen`, only the missing steps. Raises TransportError.

        Messages must be answered before this returns.
        """

    async def detach(self) -> None:
        """Detach the device from its driver; messages may come until this returns. A second call does nothing."""

    def message_fd(self) -> int:
        """Return the descriptor (the transport's own) that polls readable while a message waits."""

    def receive(self) -> Request | None:
        """Return the next message, None when there is none. Never blocks. Raises DeviceBrokenError, TransportError."""

    def respond(self, response: Response) -> None:
        """Answer a message. Raises OSError: ENOENT for an id that is unknown or was answered already."""

    def acked_features(self) -> int:
        """Return the features that the driver has accepted; valid from FEATURES_OK on. Raises OSError."""

    def vq_info(self, index: int) -> VqInfo:
        """Return the driver's settings of queue `index`. Raises OSError."""

    def set_kickfd(self, index: int, fd: int) -> None:
        """Let the driver's kicks of queue `index` signal eventfd `fd` (borrowed); -1 removes it. Raises OSError."""

    def place_irqs(self) -> None:
        """Send interrupts where `irq_cpus` says; at each DRIVER_OK, as drivers overwrite it. Raises OSError."""

    def inject_irq(self, index: int) -> None:
        """Interrupt the driver for queue `index`. Raises OSError: EINVAL before DRIVER_OK."""

    def inject_config_irq(self) -> None:
        """Notify the driver that the configuration space has changed. Raises OSError."""

    def set_config(self, offset_bytes: int, data: bytes) -> None:
        """Overwrite a part of the configuration space. Raises OSError: EINVAL when it does not fit."""

    def worker_port(self, index: int) -> WorkerPort:
        """Return a new port for a worker that serves queue `index`; the caller closes it."""

    def user_memory(self) -> UserMemory | None:
        """Return the user memory (the transport's own) that may replace the kernel's bounce pages.

        None where there are none, or they are not to be replaced. After `create` or `reopen`.
        """

    def close(self, *, keep: bool = False) -> None:
        """Destroy the device, or with `keep` leave it to a later `reopen`, and close every descriptor.

        A second call does nothing.
        """
