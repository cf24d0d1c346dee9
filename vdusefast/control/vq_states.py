"""A queue's life: its states, its events, and the table of transitions.

docs/design/control-plane.md shows the same tables; a test compares them. `VqState` is the short form for people.
"""

from __future__ import annotations

from enum import Enum, StrEnum

from vdusefast.control.state_machine import StateMachine, Transition, TransitionTable


class VqState(StrEnum):
    """The state of a queue as `vdusefast show` prints it."""

    UNUSED = "unused"  # stopped, and the driver runs without it
    STOPPED = "stopped"
    RUNNING = "running"
    QUIESCING = "quiescing"
    RECOVERING = "recovering"
    FAILED = "failed"


class Position(StrEnum):
    """Who knows where the queue stands (VqInfo.last_avail_idx)."""

    KNOWN = "known"  # as the driver has set it up, or as noted when the queue was quiesced
    LOGGED = "logged"  # the worker knows; after its death, the in-flight log
    LOST = "lost"  # nobody


class VqStage(Enum):
    """A state of the machine: how it is shown, who knows where the queue stands, and what it means."""

    STOPPED = VqState.STOPPED, Position.KNOWN, "not served"
    STARTING = VqState.STOPPED, Position.LOGGED, "START is with the worker"
    RUNNING = VqState.RUNNING, Position.LOGGED, "served"
    QUIESCING = VqState.QUIESCING, Position.LOGGED, "the worker finishes its requests"
    REPLACING = VqState.RECOVERING, Position.KNOWN, "the worker died while the queue was not served"
    RECOVERING = VqState.RECOVERING, Position.LOGGED, "the worker died; the next one continues by the log"
    FAILED = VqState.FAILED, Position.KNOWN, "could not be started; the next start tries again"
    INTERRUPTED = VqState.FAILED, Position.LOGGED, "failed while it was served; the next start continues by the log"
    LOST = VqState.FAILED, Position.LOST, "the ring is bad, or the log is of no use; only a reset helps"
    CLOSING = VqState.QUIESCING, Position.LOGGED, "the device stops; the worker finishes and is not replaced"
    CLOSED = VqState.STOPPED, Position.KNOWN, "the device stops; the queue is not served"
    CLOSED_LOGGED = VqState.STOPPED, Position.LOGGED, "the device stops; the worker has ended, and the log stays"
    CLOSED_FAILED = VqState.FAILED, Position.LOST, "the device stops; the queue has failed"

    def __init__(self, shown: VqState, position: Position, meaning: str) -> None:
        self.shown = shown
        self.position = position
        self.meaning = meaning

    @property
    def is_logged(self) -> bool:
        """Whether a worker that starts now must continue by the in-flight log."""
        return self.position is Position.LOGGED

    @property
    def is_closing(self) -> bool:
        """Whether no worker is replaced any more."""
        return self in _CLOSING

    @property
    def waits_for_worker(self) -> bool:
        """Whether a worker is to be replaced."""
        return self in _REPLACED

    @property
    def is_unwell(self) -> bool:
        """Whether people see that something is wrong."""
        return self.shown in (VqState.RECOVERING, VqState.FAILED)


class VqEvent(Enum):
    """An event of the machine, and what has happened."""

    SERVE = "START is sent to the worker"
    STARTED = "the worker has answered START"
    REFUSED = "the worker has refused START"
    QUIESCE = "the worker is asked to finish its requests"
    QUIESCED = "the worker has finished them, and has said where the queue stands"
    RESUMED = "the worker has finished them, and serves again"
    RESET = "the driver has reset the device"
    READY = "there is a worker for a queue that is not served"
    DIED = "the worker has died, and is to be replaced"
    FAIL = "the queue cannot be served"
    LOSE = "nobody knows any more where the queue stands"
    CLOSE = "the device begins to stop"
    ENDED = "the worker has ended because the device stops"

    @property
    def meaning(self) -> str:
        """What has happened."""
        return str(self.value)


_S, _E = VqStage, VqEvent
_NOT_SERVED = (_S.STOPPED, _S.REPLACING, _S.FAILED)
_SERVED = (_S.STARTING, _S.RUNNING, _S.QUIESCING, _S.RECOVERING, _S.INTERRUPTED)
_CLOSING = (_S.CLOSING, _S.CLOSED, _S.CLOSED_LOGGED, _S.CLOSED_FAILED)
_REPLACED = (_S.REPLACING, _S.RECOVERING)

VQ_TRANSITIONS = TransitionTable(
    [
        Transition(_E.SERVE, (_S.STOPPED,), _S.STARTING),
        Transition(_E.SERVE, (_S.REPLACING,), _S.RECOVERING),
        Transition(_E.SERVE, (_S.FAILED, _S.LOST), _S.INTERRUPTED),
        Transition(_E.SERVE, _SERVED, None),
        Transition(_E.SERVE, _CLOSING, _S.CLOSING),
        Transition(_E.STARTED, _SERVED, _S.RUNNING),
        Transition(_E.STARTED, (_S.CLOSING, _S.CLOSED_LOGGED), None),
        Transition(_E.REFUSED, (_S.STARTING, _S.RECOVERING, _S.INTERRUPTED), _S.FAILED),
        Transition(_E.REFUSED, (_S.LOST,), None),
        Transition(_E.REFUSED, _CLOSING, _S.CLOSED_FAILED),
        Transition(_E.QUIESCE, (_S.RUNNING,), _S.QUIESCING),
        Transition(_E.QUIESCED, (_S.STARTING, _S.QUIESCING), _S.STOPPED),
        Transition(_E.QUIESCED, (_S.RECOVERING,), _S.REPLACING),
        Transition(_E.QUIESCED, (_S.INTERRUPTED,), _S.FAILED),
        Transition(_E.QUIESCED, (_S.CLOSING, _S.CLOSED_LOGGED), _S.CLOSED),
        Transition(_E.RESUMED, (_S.QUIESCING,), _S.RUNNING),
        Transition(_E.RESET, (_S.STARTING, _S.RUNNING, _S.QUIESCING), _S.STOPPED),
        Transition(_E.RESET, (_S.RECOVERING,), _S.REPLACING),
        Transition(_E.RESET, (_S.INTERRUPTED, _S.LOST), _S.FAILED),
        Transition(_E.RESET, _NOT_SERVED, None),
        Transition(_E.RESET, (_S.CLOSING, _S.CLOSED_LOGGED), _S.CLOSED),
        Transition(_E.RESET, (_S.CLOSED, _S.CLOSED_FAILED), None),
        Transition(_E.READY, _NOT_SERVED, _S.STOPPED),
        Transition(_E.READY, (_S.LOST,), None),
        Transition(_E.READY, (_S.CLOSED, _S.CLOSED_FAILED), _S.CLOSED),
        Transition(_E.DIED, _NOT_SERVED, _S.REPLACING),
        Transition(_E.DIED, _SERVED, _S.RECOVERING),
        Transition(_E.FAIL, _NOT_SERVED, _S.FAILED),
        Transition(_E.FAIL, _SERVED, _S.INTERRUPTED),
        Transition(_E.FAIL, (_S.LOST,), None),
        Transition(_E.FAIL, _CLOSING, _S.CLOSED_FAILED),
        Transition(_E.LOSE, (*_NOT_SERVED, *_SERVED, _S.LOST), _S.LOST),
        Transition(_E.LOSE, _CLOSING, _S.CLOSED_FAILED),
        Transition(_E.CLOSE, (_S.STOPPED, _S.REPLACING), _S.CLOSED),
        Transition(_E.CLOSE, _SERVED, _S.CLOSING),
        Transition(_E.CLOSE, (_S.FAILED, _S.LOST), _S.CLOSED_FAILED),
        Transition(_E.CLOSE, _CLOSING, None),
        Transition(_E.ENDED, (_S.CLOSING,), _S.CLOSED_LOGGED),
        Transition(_E.ENDED, (_S.CLOSED, _S.CLOSED_LOGGED, _S.CLOSED_FAILED), None),
    ]
)


class VqLife(StateMachine[VqStage, VqEvent]):
    """The life of one queue, which begins stopped."""

    def __init__(self) -> None:
        """Begin."""
        super().__init__(VQ_TRANSITIONS, VqStage.STOPPED)
