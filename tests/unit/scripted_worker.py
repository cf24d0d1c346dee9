"""Workers that a seeded script plays, in this process and in a time that passes at once: for tests of VqControl.

Everything but the process itself is real: WorkerProcess with its sockets, its states and its time limits.
"""

from __future__ import annotations

import asyncio
import os
import random
import selectors
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vdusefast.base.child_output import ChildOutput
from vdusefast.base.guard import Part
from vdusefast.control.worker_process import REAP_TIMEOUT_S, WorkerProcess
from vdusefast.transport import WorkerPort
from vdusefast.transport.uapi import VqInfo
from vdusefast.worker.protocol import (
    MESSAGE_MAX_BYTES,
    Command,
    Event,
    FromWorker,
    ToWorker,
    pack_event,
    unpack_command,
)


class _Selector(selectors.DefaultSelector):
    """Waits for nothing: where no descriptor is ready, the time that was to pass has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout != 0:
            assert timeout is not None, "everything waits, and nothing will ever happen"
            self.now_s += timeout
        return ready


class QuickLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer."""

    def __init__(self) -> None:
        self._quick_selector = _Selector()
        super().__init__(self._quick_selector)

    def time(self) -> float:
        return self._quick_selector.now_s


@dataclass
class Script:
    """The workers of one queue: their actions, and their real state, which the control plane may not know."""

    chosen: random.Random
    chance: float = 0.0  # of a fault, at each step
    broken_rules: list[str] = field(default_factory=list)
    is_logged: bool = False  # a worker may have had requests since the position was last known
    is_lost: bool = False  # a worker was heard to say that its ring is bad, since the last reset
    serving: ScriptedWorker | None = None
    idx: int = 0
    void_ids: set[int] = field(default_factory=set)  # starts before a reset or a quiesce that has ended

    def fault(self) -> bool:
        return self.chosen.random() < self.chance

    def delay_s(self) -> float:
        return self.chosen.choice((0.0, 0.0, 0.0, 0.01, 0.3)) if self.chance else 0.0

    def expect(self, condition: bool, rule: str) -> None:
        if not condition:
            self.broken_rules.append(rule)


class ScriptedPages:
    """The shared pages: whatever is done to the log of a queue is checked against the truth."""

    fd = -1

    def __init__(self, script: Script) -> None:
        self._script = script

    def ring_ctl(self, queue: int) -> None:
        pass

    def reserve_log(self, queue: int, ring_size: int) -> None:
        pass

    def begin_log(self, queue: int, last_avail_idx: int, ring_format: int = 0, ring_size: int | None = None) -> None:
        self._script.expect(not self._script.is_logged, "a log in use was begun again")

    def void_log(self, queue: int) -> None:
        self._script.expect(not self._script.is_logged, "a log in use was voided")

    def requests_done(self, queue: int) -> int:
        return self._script.idx

    def has_inflight(self, queue: int) -> bool:
        return self._script.chosen.random() < 0.5


class ScriptedTransport:
    """The parts of a transport that a queue uses."""

    def worker_port(self, queue: int) -> WorkerPort:
        return WorkerPort("loopback")

    def vq_info(self, queue: int) -> VqInfo:
        return VqInfo(queue)


class _Process:
    """The part of subprocess.Popen that WorkerProcess uses."""

    pid = 1 << 22  # no process has it

    def __init__(self, worker: ScriptedWorker) -> None:
        self._worker = worker
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._worker.end(-signal.SIGKILL)


class ScriptedWorker(WorkerProcess):
    """A WorkerProcess whose process is a script."""

    script: Script  # of the class that a test makes

    def _start(self, command: Sequence[str]) -> None:
        if self.script.fault():
            raise OSError(11, os.strerror(11))
        self._ctl, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ctl, self._theirs):
            end.setblocking(False)
        self._pid_fd, self._pid_write_fd = os.pipe()
        self._life_fd, self._life_write_fd = os.pipe()
        self._ends = False
        self._output = ChildOutput(self._guard, Part.WORKER_OUTPUT, lambda: self.title)
        self._output.spawned()
        fake: Any = _Process(self)
        self._process = fake
        self._guard.reader(self._pid_fd, Part.WORKER_END, self._on_reaped, self._wait_last_io)
        self._guard.reader(self._ctl.fileno(), Part.WORKER_EVENTS, self._on_messages, self._hear_no_more)
        self._loop.call_later(self.script.delay_s(), self._say_hello)

    def _say_hello(self) -> None:
        if self._ends:
            return
        how = self.script.chosen.randrange(5) if self.script.fault() else -1
        if how == 0:
            return  # never ready
        if how == 1:
            self._say(Event.STARTUP_FAILED, text="no engine today")
        elif how != 2:
            self._say(Event.HELLO, text="script")
        if how in (1, 2, 3):
            self.end(7)
        elif how == 4:
            self._ring_is_bad()

    def _send(self, packet: bytes, ctl: socket.socket) -> None:
        super()._send(packet, ctl)
        message = unpack_command(self._theirs.recv(MESSAGE_MAX_BYTES))
        script = self.script
        if message.command == Command.START:
            self._check_start(message)
        how = script.chosen.randrange(9) if script.fault() else -1
        self._loop.call_later(script.delay_s(), self._carry_out, message, how)

    def _check_start(self, message: ToWorker) -> None:
        script, fails = self.script, self.spec.engine == "fail"
        script.expect(fails or message.desc_addr not in script.void_ids, "a start was served after a later reset")
        script.expect(fails or not script.is_lost, "a lost queue was served before a reset")
        script.expect(bool(message.recover) or not script.is_logged, "a log in use was not continued")
        script.expect(fails or script.serving in (None, self), "two workers serve one queue")
        script.is_logged = True

    def _carry_out(self, message: ToWorker, how: int) -> None:
        """Answer a command. how: the fault, -1 for none."""
        if self._ends:
            return
        script = self.script
        if how == 0:
            return  # no answer: its storage waits
        if how == 1:
            self.end(3)
            return
        if how == 2:
            self._theirs.send(b"?")
            return
        if how == 3:
            if message.command == Command.START and not message.recover:
                script.is_logged = False
            self._say(Event.REFUSED, message.seq, text="not today")
            return
        if how in (4, 5):
            self._ring_is_bad()
        if how == 6:  # more events than are taken in one turn
            for _ in range(70):
                self._say(Event.LOG, text="busy")
        self._done(message, 0x10000 if how == 7 else script.idx)
        if how == 8 and message.command == Command.START:
            self._ring_is_bad()
        if how in (5, 6):
            self.end(-signal.SIGSEGV)

    def _done(self, message: ToWorker, idx: int) -> None:
        script = self.script
        if message.command == Command.START:
            script.serving = self
        elif message.command in (Command.QUIESCE, Command.RESET, Command.STOP):
            if script.serving is self:
                script.serving = None
            if message.command != Command.STOP and idx == script.idx:
                script.is_logged = False
        self._say(Event.DONE, message.seq, idx)
        if message.command == Command.STOP:
            self.end(0)

    def _take(self, event: FromWorker) -> None:
        self.script.is_lost |= event.event == Event.RING_FAILED  # from here on the control plane knows
        super()._take(event)

    def _ring_is_bad(self) -> None:
        self._say(Event.RING_FAILED, text="head 99 is out of range")

    def _say(self, event: Event, seq: int = 0, idx: int = 0, text: str = "") -> None:
        self._theirs.send(pack_event(FromWorker(event, seq, idx, 0, 1, text)))

    def end(self, status: int) -> None:
        """End the process, now or when the kernel lets it, and then its last I/O."""
        if self._ends:
            return
        self._ends = True
        script = self.script
        if script.serving is self:
            script.serving = None  # it takes no request any more
        waits_s = [script.chosen.choice((0.01, 0.5, REAP_TIMEOUT_S * 2)) if script.fault() else 0.0 for _ in range(2)]
        if waits_s[0]:
            self._loop.call_later(waits_s[0], self._exit, status, waits_s[1])
        else:
            self._exit(status, waits_s[1])

    def _exit(self, status: int, last_io_s: float) -> None:
        assert self._process is not None
        self._process.returncode = status
        self._theirs.close()
        os.close(self._pid_write_fd)
        if last_io_s:
            self._loop.call_later(last_io_s, os.close, self._life_write_fd)
        else:
            os.close(self._life_write_fd)


def scripted(script: Script) -> type[ScriptedWorker]:
    """Return the class of the workers of `script`."""
    members: Mapping[str, Any] = {"script": script}
    return type("Scripted", (ScriptedWorker,), dict(members))
