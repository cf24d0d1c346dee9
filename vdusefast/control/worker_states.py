"""A worker process's life: its states, its events, and the table of transitions.

docs/design/control-plane.md shows the same tables; a test compares them.
"""

from __future__ import annotations

from enum import Enum

from vdusefast.control.state_machine import StateMachine, Transition, TransitionTable


class WorkerState(Enum):
    """A state of the machine, and what it means."""

    STARTING = "spawned, and not yet ready"
    READY = "takes commands"
    STOPPING = "ends by itself; its end is expected"
    KILLED = "was killed; the kernel may still wait for its storage"
    DIED = "the process has ended unasked; storage I/O that it began may still run"
    REAPED = "the process has ended as expected; storage I/O that it began may still run"
    GONE = "nothing of it runs any more"

    @property
    def meaning(self) -> str:
        """What it means."""
        return str(self.value)


class WorkerEvent(Enum):
    """An event of the machine, and what has happened."""

    SPAWN_FAILED = "the process could not be started"
    HELLO = "the worker has said that it is ready"
    STARTUP_FAILED = "the worker has said why it cannot start"
    STOP = "the worker is asked to end"
    KILL = "the process is killed"
    EXIT = "the process has ended"
    LAST_IO = "all storage I/O of the process has ended"

    @property
    def meaning(self) -> str:
        """What has happened."""
        return str(self.value)


_S, _E = WorkerState, WorkerEvent

WORKER_TRANSITIONS = TransitionTable(
    [
        Transition(_E.SPAWN_FAILED, (_S.STARTING,), _S.GONE),
        Transition(_E.HELLO, (_S.STARTING,), _S.READY),
        Transition(_E.HELLO, (_S.STOPPING, _S.KILLED, _S.DIED, _S.REAPED), None),
        Transition(_E.STARTUP_FAILED, (_S.STARTING,), _S.STOPPING),
        Transition(_E.STARTUP_FAILED, (_S.DIED,), _S.REAPED),
        Transition(_E.STARTUP_FAILED, (_S.STOPPING, _S.KILLED, _S.REAPED), None),
        Transition(_E.STOP, (_S.STARTING, _S.READY, _S.STOPPING), _S.STOPPING),
        Transition(_E.STOP, (_S.DIED,), _S.REAPED),
        Transition(_E.STOP, (_S.KILLED, _S.REAPED), None),
        Transition(_E.KILL, (_S.STARTING, _S.READY, _S.STOPPING, _S.KILLED), _S.KILLED),
        Transition(_E.KILL, (_S.DIED, _S.REAPED), _S.REAPED),
        Transition(_E.EXIT, (_S.STARTING, _S.READY), _S.DIED),
        Transition(_E.EXIT, (_S.STOPPING, _S.KILLED), _S.REAPED),
        Transition(_E.EXIT, (_S.DIED, _S.REAPED), None),
        Transition(_E.LAST_IO, (_S.DIED, _S.REAPED), _S.GONE),
    ]
)


class WorkerLife(StateMachine[WorkerState, WorkerEvent]):
    """The life of one worker process."""

    def __init__(self) -> None:
        """Begin."""
        super().__init__(WORKER_TRANSITIONS, WorkerState.STARTING)
