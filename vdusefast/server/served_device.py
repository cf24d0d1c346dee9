"""The part of `vdusefast.Device` that a server needs, and the parameters of the methods by which commands reach it."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

import msgspec

from vdusefast.base.json_types import Json
from vdusefast.base.start_mode import StartMode
from vdusefast.base.time_limits import STOP_TIMEOUT_S
from vdusefast.errors import VdusefastError

SIZE_MAX_BYTES = (1 << 63) - 1


class ServedDevice(Protocol):
    """What a server needs of a device."""

    @property
    def node(self) -> str:
        """The node by which the device is used, "" while there is none."""

    @property
    def failure(self) -> VdusefastError | None:
        """What is wrong now."""

    @property
    def recovered(self) -> bool:
        """Whether another server had it before."""

    @property
    def outlives_server(self) -> bool:
        """Whether another server can adopt it."""

    @property
    def upgraded(self) -> str:
        """Why only a new server can serve all of it, "" if this one can."""

    def prove(self, *, look: bool = ...) -> None:
        """Prove that this process could serve it in place of its server."""

    def start(self, *, mode: StartMode = ...) -> None:
        """Return once the node is usable."""

    def forgive_store(self) -> None:
        """Carry out flushes again that fail since the store has lost data."""

    def stop(self, timeout_s: float = ..., *, force: bool = ...) -> None:
        """Detach, drain and destroy."""

    def force(self, timeout_s: float = ...) -> None:
        """Make a `stop` that another thread waits in one by force."""

    def hand_over(self, timeout_s: float = ...) -> None:
        """Drain, and leave the device in the kernel for the next server."""

    def info(self) -> Json:
        """Return everything that `show` prints."""

    def resize(self, size_bytes: int | None = ..., *, force: bool = ...) -> int:
        """Change the size and return it."""

    def stats(self) -> Any:
        """Return counters with a method to_dict."""

    def responds(self, timeout_s: float) -> bool:
        """Return whether its loop answers within `timeout_s`."""


class DeleteParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the method `delete`."""

    force: bool = False
    timeout_s: float = STOP_TIMEOUT_S
    is_unused: bool = False  # the caller has checked, and sees more processes than this one


class HandOverParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the method `hand_over`."""

    timeout_s: float = STOP_TIMEOUT_S


class ResizeParams(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of the method `resize`; without a size the store's present one is taken."""

    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX_BYTES)] | None = None
    force: bool = False
