"""How long the parts of an answer to one message may take."""

from __future__ import annotations

from dataclasses import dataclass

from vdusefast.control.worker_process import REAP_TIMEOUT_S


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds. Together they stay below the transport's msg_timeout."""

    hello_s: float = 10.0  # a replaced worker to be ready
    quiesce_s: float = 10.0  # storage to finish what is in flight; then the worker is killed
    reset_s: float = 0.75  # the same after a reset, for which no request has to be finished
    start_grace_s: float = 0.25  # DRIVER_OK waits so long for queues to start, then is answered all the same

    @property
    def message_s(self) -> float:
        """The longest that the answer to a message can take."""
        return self.hello_s + self.quiesce_s + REAP_TIMEOUT_S

    def check(self, msg_timeout_s: float) -> None:
        """Raise ValueError when the kernel waits no longer than an answer may take; 0 = it waits for ever."""
        if 0 < msg_timeout_s <= self.message_s:
            raise ValueError(f"a message may take {self.message_s:g} s of the {msg_timeout_s:g} s it has")
