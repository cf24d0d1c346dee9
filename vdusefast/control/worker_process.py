"""One worker process as the supervisor sees it: spawn, commands and answers, death and its cause.

Everything runs in the supervisor's event loop, in the thread that lives as long as the device: a worker asks to be
killed when the thread that spawned it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vdusefast.base import spawn
from vdusefast.base.child_output import ChildOutput
from vdusefast.base.deadline import limit
from vdusefast.base.guard import Guard, Part
from vdusefast.base.handed import write_arguments
from vdusefast.base.printable import printable
from vdusefast.control.worker_states import WorkerEvent, WorkerLife, WorkerState
from vdusefast.errors import TimedOutError, VdusefastError, WorkerError, from_exit_code
from vdusefast.transport import WorkerPort
from vdusefast.worker.protocol import (
    MESSAGE_MAX_BYTES,
    Command,
    Event,
    FromWorker,
    ToWorker,
    WorkerSpec,
    pack_command,
    store_size_bytes,
    unpack_event,
)

EVENTS_A_TURN_MAX = 64
EXIT_GRACE_S = 1.0
SLOW_S = 4.0  # without being ready: people learn what they wait for
REAP_TIMEOUT_S = 5.0  # a killed process that stays longer waits inside the kernel, for its storage

_log = logging.getLogger("vdusefast")


class Pages(Protocol):
    """The methods of the shared pages (shared_pages.SharedPages) that are used here."""

    fd: int

    def ring_ctl(self, queue: int) -> None:
        """Tell the worker of `queue` that a message waits."""

    def reserve_log(self, queue: int, ring_size: int) -> None:
        """Have room for the in-flight log of a ring of that size. Raises VdusefastError."""

    def begin_log(self, queue: int, last_avail_idx: int, ring_format: int = 0, ring_size: int | None = None) -> None:
        """Make an empty in-flight log of `queue`, which starts at `last_avail_idx` (as uapi.VqInfo)."""

    def void_log(self, queue: int) -> None:
        """Say that nothing of `queue` is in flight."""

    def requests_done(self, queue: int) -> int:
        """Return how many requests of `queue` have been completed."""

    def has_inflight(self, queue: int) -> bool:
        """Return whether requests of `queue` are in flight."""


def default_command() -> list[str]:
    """Return the arguments that start a worker; its name and the descriptor of its WorkerSpec follow them.

    Site-packages are not searched (-S): a worker has no use for them, and files there may import half the standard
    library at each start. Output of a class is not buffered (-u).
    """
    return spawn.command("worker.main", options=("-S", "-u"))


class RefusedError(Exception):
    """The worker refused a command; the message is its reason."""


@dataclass(frozen=True)
class WorkerCallbacks:
    """Functions that a worker process calls in the event loop."""

    ring_failed: Callable[[str], None]  # a bad ring: the reason
    died: Callable[[WorkerError], None]  # an unexpected death
    store_size: Callable[[int], None]  # another size of the store, in bytes


class WorkerProcess:
    """A worker from its spawn to its end. `spawn` makes one; `close` or the process's end releases what it holds."""

    def __init__(self, spec: WorkerSpec, pages: Pages, guard: Guard, callbacks: WorkerCallbacks):
        """Prepare; see `spawn`. guard: runs the methods that the event loop calls."""
        self.spec = spec
        self.engine = ""
        self.last_used_idx = 0
        self._pages = pages
        self._guard = guard
        self._callbacks = callbacks
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._ctl: socket.socket | None = None
        self._output: ChildOutput | None = None
        self._pid_fd = -1
        self._life_fd = -1  # the read end of the pipe that WorkerSpec.life_fd keeps open
        self._seq = 0
        self._answers: dict[int, asyncio.Future[FromWorker]] = {}
        self._hello: asyncio.Future[str] = self._loop.create_future()
        self._life = WorkerLife()
        self._gone = asyncio.Event()
        self._end_reason = ""  # why we killed it

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        spec: WorkerSpec,
        port: WorkerPort,
        pages: Pages,
        guard: Guard,
        callbacks: WorkerCallbacks,
    ) -> WorkerProcess:
        """Start `command` with `spec`, whose `ctl_fd` is filled in here. Consumes `port`.

        The process inherits the descriptors that `spec` names (borrowed) and nothing else. Raises WorkerError.
        """
        worker = cls(spec, pages, guard, callbacks)
        try:
            worker._start(command)
        except OSError as error:
            worker._life.apply(WorkerEvent.SPAWN_FAILED)
            worker.close()
            raise WorkerError(f"{worker.title}: cannot be started: {error}") from error
        finally:
            port.close()
        return worker

    @property
    def pid(self) -> int:
        """The process id; it stays known after the end."""
        return self._process.pid if self._process else -1

    @property
    def state(self) -> WorkerState:
        """The state of its life."""
        return self._life.state

    @property
    def alive(self) -> bool:
        """Whether the process is there, or storage I/O that it began still runs."""
        return self.state is not WorkerState.GONE

    @property
    def usable(self) -> bool:
        """Whether it can be sent a command: the process is there, and nobody has killed it."""
        return self.state in (WorkerState.STARTING, WorkerState.READY, WorkerState.STOPPING)

    @property
    def hung(self) -> bool:
        """Whether the process was killed or has ended, and the kernel may still wait for its storage."""
        return self.alive and not self.usable

    @property
    def reaped(self) -> bool:
        """Whether the process has ended; storage I/O that it began may still run."""
        return self.state in (WorkerState.DIED, WorkerState.REAPED, WorkerState.GONE)

    @property
    def title(self) -> str:
        """The name of this worker in messages."""
        pid = f" (pid {self.pid})" if self._process else ""
        return f"device {self.spec.device}: queue {self.spec.queue}: worker{pid}"

    async def wait_hello(self, timeout_s: float) -> None:
        """Wait until the worker is ready to serve.

        Raises the exception that the worker's own report names, WorkerError when it ends without one,
        TimedOutError. The process is gone in all of these cases.
        """
        slow = self._loop.call_later(SLOW_S, self._say_slow)
        try:
            async with limit(timeout_s):
                self.engine = await asyncio.shield(self._hello)
        except TimeoutError:
            await self.kill(f"was not ready within {timeout_s:g} s")
            raise TimedOutError(f"{self.title} was not ready within {timeout_s:g} s") from None
        except VdusefastError:
            await self._wait_exit(EXIT_GRACE_S)  # it ends by itself after its report
            await self.kill()
            raise
        finally:
            slow.cancel()

    async def request(self, message: ToWorker, timeout_s: float) -> FromWorker:
        """Send a command (its `seq` is filled in here) and return the answer.

        Raises RefusedError, TimeoutError after `timeout_s`, WorkerError when the process ends or takes no messages.
        """
        if self._ctl is None or not self.alive:
            raise WorkerError(f"{self.title} has ended")
        self._seq += 1
        seq = self._seq
        answer: asyncio.Future[FromWorker] = self._loop.create_future()
        self._answers[seq] = answer
        try:
            self._send(pack_command(message._replace(seq=seq)), self._ctl)
            async with limit(timeout_s):
                event = await answer
        finally:
            del self._answers[seq]
        if event.event == Event.REFUSED:
            raise RefusedError(event.text)
        self.last_used_idx = event.last_used_idx
        return event

    async def stop(self, timeout_s: float) -> None:
        """Let the worker finish what it has in flight and end; kill it when that takes longer than `timeout_s`.

        Raises WorkerError when it had to be killed or ended otherwise than with status 0.
        """
        if not self.alive:
            return
        self._life.apply(WorkerEvent.STOP)
        try:
            async with limit(timeout_s):
                # The process may end before its answer arrives, which is an answer as well.
                with contextlib.suppress(WorkerError):
                    await self.request(ToWorker(Command.STOP, 0), timeout_s)
                await self._gone.wait()
        except (TimeoutError, RefusedError) as error:
            why = f"refused to stop: {error}" if isinstance(error, RefusedError) else f"did not stop in {timeout_s:g} s"
            await self.kill(why)
            raise WorkerError(f"{self.title} {why} and was killed") from None
        if self._process is not None and self._process.returncode != 0:
            raise WorkerError(f"{self.title} {self.cause()}")

    def abort(self, why: str = "") -> None:
        """Kill the process without waiting for its end, which is then not reported as a death."""
        if self._process is not None and self.alive:
            self._life.apply(WorkerEvent.KILL)
            self._end_reason = why or self._end_reason
            self._process.kill()

    async def kill(self, why: str = "", timeout_s: float = REAP_TIMEOUT_S) -> bool:
        """Kill the process and reap it. Returns whether it is gone: not if it hangs in the kernel for its storage."""
        if not self.alive:
            return True
        self.abort(why)
        return await self._wait_exit(timeout_s)

    async def wait_gone(self) -> None:
        """Wait until the process has ended, and all storage I/O that it began: without a limit."""
        await self._gone.wait()

    def cause(self) -> str:
        """Return why the process ended, as the rest of a sentence that begins with its name."""
        code = self._process.returncode if self._process else None
        if code is None:
            cause = "runs"
        elif code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            cause = f"was killed by {name}"
        else:
            cause = f"ended with status {code}"
        if self._end_reason:
            cause = f"{self._end_reason} and was killed"
        last_line = self._output.last_line if self._output is not None else ""
        return f"{cause}; its last line: {last_line}" if last_line else cause

    def close(self) -> None:
        """Close every descriptor, even if the process does not end; a second call does nothing."""
        if self._ctl is not None:
            self._loop.remove_reader(self._ctl)
            self._ctl.close()
            self._ctl = None
        if self._output is not None:
            self._output.close()
        for fd in (self._pid_fd, self._life_fd):
            if fd >= 0:
                self._loop.remove_reader(fd)
                os.close(fd)
        self._pid_fd = self._life_fd = -1

    # -- inside

    async def _wait_exit(self, timeout_s: float) -> bool:
        try:
            async with limit(timeout_s):
                await self._gone.wait()
        except TimeoutError:
            return False
        return True

    def _start(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ctl = ours
        with theirs:
            ours.setblocking(False)
            output = self._output = ChildOutput(self._guard, Part.WORKER_OUTPUT, lambda: self.title)
            life_write_fd = spec_fd = -1
            try:
                self._life_fd, life_write_fd = os.pipe2(os.O_CLOEXEC)
                self.spec = self.spec._replace(ctl_fd=theirs.fileno(), life_fd=life_write_fd)
                spec_fd = write_arguments(self.spec.to_arguments())
                fds = (
                    spec_fd,
                    self.spec.ctl_fd,
                    self.spec.life_fd,
                    self.spec.shm_fd,
                    self.spec.kick_fd,
                    self.spec.port_fd,
                    self.spec.irq_fd,
                    self.spec.user_memory_fd,
                    self.spec.store_fd,
                    self.spec.store_witness_fd,
                    self.spec.relay_fd,
                    self.spec.relay_memory_fd,
                    self.spec.store_notes_fd,
                    self.spec.store_hold_fd,
                )
                self._process = subprocess.Popen(
                    [*command, f"{self.spec.device}/{self.spec.queue}", str(spec_fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=output.write_fd,
                    stderr=output.write_fd,
                    pass_fds=[fd for fd in fds if fd >= 0],
                    process_group=0,  # the terminal's Ctrl-C is for the supervisor alone
                )
            finally:
                output.spawned()
                for fd in (life_write_fd, spec_fd):
                    if fd >= 0:
                        os.close(fd)
        try:
            self._pid_fd = os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()  # reaped when the next process is started: it may need time to end
            raise
        self._guard.reader(self._pid_fd, Part.WORKER_END, self._on_reaped, self._wait_last_io)
        self._guard.reader(ours.fileno(), Part.WORKER_EVENTS, self._on_messages, self._hear_no_more)
        output.watch()

    def _send(self, packet: bytes, ctl: socket.socket) -> None:
        try:
            ctl.send(packet)
        except OSError as error:
            raise WorkerError(f"{self.title} takes no messages: {error.strerror}") from error
        self._pages.ring_ctl(self.spec.queue)

    def _hear_no_more(self) -> None:
        """Kill a worker whose events cannot be read. Its end is reported as a death."""
        if self._ctl is not None:
            self._loop.remove_reader(self._ctl)
        self._end_reason = self._end_reason or "sent what cannot be taken"
        if self._process is not None:
            self._process.kill()

    def _on_messages(self) -> None:
        for _ in range(EVENTS_A_TURN_MAX):
            if self._ctl is None:
                return
            try:
                packet = self._ctl.recv(MESSAGE_MAX_BYTES + 1)
            except BlockingIOError:
                return
            except OSError:  # the process is gone; its end has the cause
                packet = b""
            if not packet:
                self._loop.remove_reader(self._ctl)
                return
            try:
                self._take(unpack_event(packet))
            except ValueError as error:
                self._end_reason = f"sent a malformed message ({error})"
                self._hear_no_more()
                return

    def _take(self, event: FromWorker) -> None:
        event = event._replace(text=printable(event.text))
        if event.event == Event.HELLO:
            if not self._hello.done():
                self._life.apply(WorkerEvent.HELLO)
                self._hello.set_result(event.text)
        elif event.event == Event.STARTUP_FAILED:
            if not self._hello.done():
                self._life.apply(WorkerEvent.STARTUP_FAILED)
                report = f"device {self.spec.device}: queue {self.spec.queue}: {event.text}"
                self._fail_hello(from_exit_code(report, event.exit_code, WorkerError))
        elif event.event == Event.RING_FAILED:
            self._callbacks.ring_failed(event.text)
        elif event.event == Event.LOG:
            text = f"device {self.spec.device}: queue {self.spec.queue}: {event.text}"
            if self._output is not None:
                self._output.budget.log(logging.WARNING, text)
        elif event.event == Event.STORE_SIZE:
            self._callbacks.store_size(store_size_bytes(event))
        elif event.event in (Event.DONE, Event.REFUSED):
            answer = self._answers.get(event.seq)  # absent when the answer came too late
            if answer is not None and not answer.done():
                answer.set_result(event)
        else:
            raise ValueError(f"event {event.event}")

    def _say_slow(self) -> None:
        """Say what is waited for."""
        if self._output is not None and not self._hello.done():
            self._output.budget.log(logging.WARNING, f"{self.title} has been opening its store for {SLOW_S:g} s")

    def _fail_hello(self, error: VdusefastError) -> None:
        self._hello.set_exception(error)
        self._hello.exception()  # retrieved: nobody waits any more if the start was cancelled

    def _on_reaped(self) -> None:
        """Reap the process, and wait for its I/O that the kernel may still carry out: io_uring's continues."""
        if self._process is not None and self._process.poll() is not None:
            self._wait_last_io()

    def _wait_last_io(self) -> None:
        self._life.apply(WorkerEvent.EXIT)
        self._loop.remove_reader(self._pid_fd)
        self._guard.reader(self._life_fd, Part.WORKER_END, self._on_exit, self._report_end)

    def _on_exit(self) -> None:
        """Read the last events and lines of the process, and wake everyone who waits for its end."""
        self._loop.remove_reader(self._life_fd)
        self._guard.call(Part.WORKER_EVENTS, self._on_messages)
        if self._output is not None:
            self._output.end()
        self._report_end()

    def _report_end(self) -> None:
        """Wake everyone who waits for the end of the process."""
        if self.state is WorkerState.GONE:
            return
        before, _ = self._life.apply(WorkerEvent.LAST_IO)
        self.close()
        if self._process is not None:
            self._process.poll()  # done already, unless that failed
        self._gone.set()
        error = WorkerError(f"{self.title} {self.cause()}")
        ready = self._hello.done()
        if not ready:
            self._fail_hello(error)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        if ready and before is WorkerState.DIED:  # else a failed start, which `wait_hello` raises, or an expected end
            self._callbacks.died(error)
