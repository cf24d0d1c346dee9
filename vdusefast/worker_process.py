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
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from vdusefast.control import (
    MESSAGE_MAX_BYTES,
    Command,
    Event,
    FromWorker,
    ToWorker,
    WorkerSpec,
    pack_command,
    unpack_event,
)
from vdusefast.errors import TimedOutError, VdusefastError, WorkerError, from_exit_code
from vdusefast.transport import WorkerPort

STDERR_LINE_COUNT_MAX = 16
STDERR_LINE_MAX_BYTES = 1024
STDERR_READ_COUNT_MAX = 64  # reads of 4 KiB for each time the pipe is looked at
EXIT_GRACE_S = 1.0
REAP_TIMEOUT_S = 5.0  # a killed process that stays longer waits inside the kernel, for its storage

_log = logging.getLogger("vdusefast")


class Pages(Protocol):
    """What is needed of the shared pages (shm.SharedPages)."""

    fd: int

    def ring_ctl(self, queue: int) -> None:
        """Tell the worker of `queue` that a message waits."""

    def begin_log(self, queue: int, last_avail_idx: int, ring_format: int = 0) -> None:
        """Make an empty in-flight log of `queue`, which starts at `last_avail_idx` (as uapi.VqInfo)."""

    def void_log(self, queue: int) -> None:
        """Say that nothing of `queue` is in flight."""

    def requests_done(self, queue: int) -> int:
        """Return how many requests of `queue` have been completed."""

    def has_inflight(self, queue: int) -> bool:
        """Return whether requests of `queue` are in flight."""


def default_command() -> list[str]:
    """Return the words that start a worker; those of its WorkerSpec follow.

    Nothing is imported from the directory that we happen to be in (-P), and our own package from where it is, behind
    the standard library. What lies in site-packages is not even looked for (-S): a worker has no use for it, and files
    there may import half the standard library at each start.
    """
    here = str(Path(__file__).resolve().parent.parent)
    code = f"import sys; sys.path.append({here!r}); from vdusefast.worker import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-P", "-S", "-c", code]


def socket_to_itself() -> socket.socket:
    """Return a socket that receives what is sent to it: descriptors in it stay open while it does."""
    hold = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        hold.bind("")  # a name of the kernel's choice
        hold.connect(hold.getsockname())
    except OSError:
        hold.close()
        raise
    return hold


class RefusedError(Exception):
    """The worker refused a command; the message is its reason."""


class WorkerProcess:
    """A worker from its spawn to its end. `spawn` makes one; `close` or the process's end releases what it holds."""

    def __init__(
        self,
        spec: WorkerSpec,
        pages: Pages,
        on_ring_failed: Callable[[str], None],
        on_death: Callable[[WorkerError], None],
        on_store_size: Callable[[int], None],
    ):
        """Prepare; see `spawn`.

        The callbacks run in the event loop: a bad ring (reason), a death nobody asked for, another size of the store in
        bytes.
        """
        self.spec = spec
        self.engine = ""
        self.last_used_idx = 0
        self._pages = pages
        self._on_ring_failed = on_ring_failed
        self._on_death = on_death
        self._on_store_size = on_store_size
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._ctl: socket.socket | None = None
        self._stderr_fd = -1
        self._pid_fd = -1
        self._life_fd = -1  # the read end of the pipe that WorkerSpec.life_fd keeps open
        self._stderr_lines: deque[str] = deque(maxlen=STDERR_LINE_COUNT_MAX)
        self._stderr_part = b""
        self._seq = 0
        self._answers: dict[int, asyncio.Future[FromWorker]] = {}
        self._hello: asyncio.Future[str] = self._loop.create_future()
        self._exited = asyncio.Event()
        self._end_expected = False
        self._killed = False
        self.reaped = False  # the process has ended; storage I/O that it began may go on
        self._end_reason = ""  # why we killed it

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        spec: WorkerSpec,
        port: WorkerPort,
        pages: Pages,
        on_ring_failed: Callable[[str], None],
        on_death: Callable[[WorkerError], None],
        on_store_size: Callable[[int], None],
    ) -> WorkerProcess:
        """Start `command` with the words of `spec`, whose `ctl_fd` is filled in here. Consumes `port`.

        The process inherits the descriptors that `spec` names (borrowed) and nothing else. Raises WorkerError.
        """
        worker = cls(spec, pages, on_ring_failed, on_death, on_store_size)
        try:
            worker._start(command)
        except OSError as error:
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
    def alive(self) -> bool:
        """Whether the process is there, or storage I/O that it began is still going on."""
        return self._process is not None and not self._exited.is_set()

    @property
    def hung(self) -> bool:
        """Whether the process has been killed or has ended, but the kernel still waits for its storage."""
        return self.alive and (self._killed or self.reaped)

    @property
    def title(self) -> str:
        """What messages call this worker."""
        pid = f" (pid {self.pid})" if self._process else ""
        return f"device {self.spec.device}: queue {self.spec.queue}: worker{pid}"

    async def wait_hello(self, timeout_s: float) -> None:
        """Wait until the worker is ready to serve.

        Raises the exception that the worker's own report asks for, WorkerError when it ends without one,
        TimedOutError. The process is gone in all of these cases.
        """
        try:
            async with asyncio.timeout(timeout_s):
                self.engine = await asyncio.shield(self._hello)
        except TimeoutError:
            await self.kill(f"was not ready within {timeout_s:g} s")
            raise TimedOutError(f"{self.title} was not ready within {timeout_s:g} s") from None
        except VdusefastError:
            await self._wait_exit(EXIT_GRACE_S)  # it ends by itself after its report
            await self.kill()
            raise

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
            async with asyncio.timeout(timeout_s):
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
        self._end_expected = True
        try:
            async with asyncio.timeout(timeout_s):
                # The answer may be overtaken by the end, which is an answer as well.
                with contextlib.suppress(WorkerError):
                    await self.request(ToWorker(Command.STOP, 0), timeout_s)
                await self._exited.wait()
        except (TimeoutError, RefusedError) as error:
            why = f"refused to stop: {error}" if isinstance(error, RefusedError) else f"did not stop in {timeout_s:g} s"
            await self.kill(why)
            raise WorkerError(f"{self.title} {why} and was killed") from None
        if self._process is not None and self._process.returncode != 0:
            raise WorkerError(f"{self.title} {self.cause()}")

    def abort(self, why: str = "") -> None:
        """Kill the process without waiting for its end, which is then not reported as a death."""
        if self._process is not None and self.alive:
            self._end_expected = self._killed = True
            self._end_reason = why or self._end_reason
            self._process.kill()

    async def kill(self, why: str = "", timeout_s: float = REAP_TIMEOUT_S) -> bool:
        """Kill the process and reap it. Returns whether it is gone: not if it hangs in the kernel, for its storage."""
        if not self.alive:
            return True
        self.abort(why)
        return await self._wait_exit(timeout_s)

    async def wait_gone(self) -> None:
        """Wait until the process has ended, and all storage I/O that it began: without any limit."""
        await self._exited.wait()

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
        return f"{cause}; its last line: {self._stderr_lines[-1]}" if self._stderr_lines else cause

    def close(self) -> None:
        """Close every descriptor, also of a process that does not end; a second call does nothing."""
        if self._ctl is not None:
            self._loop.remove_reader(self._ctl)
            self._ctl.close()
            self._ctl = None
        for fd in (self._stderr_fd, self._pid_fd, self._life_fd):
            if fd >= 0:
                self._loop.remove_reader(fd)
                os.close(fd)
        self._stderr_fd = self._pid_fd = self._life_fd = -1

    # -- inside

    async def _wait_exit(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        except TimeoutError:
            return False
        return True

    def _start(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ctl = ours
        with theirs:
            ours.setblocking(False)
            self._stderr_fd, stderr_write_fd = os.pipe2(os.O_CLOEXEC)
            life_write_fd = -1
            try:
                self._life_fd, life_write_fd = os.pipe2(os.O_CLOEXEC)
                os.set_blocking(self._stderr_fd, False)
                self.spec = self.spec._replace(ctl_fd=theirs.fileno(), life_fd=life_write_fd)
                fds = (
                    self.spec.ctl_fd,
                    self.spec.life_fd,
                    self.spec.shm_fd,
                    self.spec.kick_fd,
                    self.spec.port_fd,
                    self.spec.irq_fd,
                    self.spec.user_memory_fd,
                    self.spec.store_fd,
                    self.spec.relay_fd,
                    self.spec.store_notes_fd,
                    self.spec.store_hold_fd,
                )
                self._process = subprocess.Popen(
                    [*command, *self.spec.to_argv()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr_write_fd,
                    pass_fds=[fd for fd in fds if fd >= 0],
                    process_group=0,  # the terminal's Ctrl-C is for the supervisor alone
                )
            finally:
                os.close(stderr_write_fd)
                if life_write_fd >= 0:
                    os.close(life_write_fd)
        try:
            self._pid_fd = os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise
        self._loop.add_reader(self._pid_fd, self._on_reaped)
        self._loop.add_reader(self._ctl, self._on_messages)
        self._loop.add_reader(self._stderr_fd, self._on_stderr)

    def _send(self, packet: bytes, ctl: socket.socket) -> None:
        try:
            ctl.send(packet)
        except OSError as error:
            raise WorkerError(f"{self.title} takes no messages: {error.strerror}") from error
        self._pages.ring_ctl(self.spec.queue)

    def _on_messages(self) -> None:
        while self._ctl is not None:
            try:
                packet = self._ctl.recv(MESSAGE_MAX_BYTES + 1)
            except BlockingIOError:
                return
            except OSError:  # the process is gone; its end tells the cause
                packet = b""
            if not packet:
                self._loop.remove_reader(self._ctl)
                return
            try:
                self._take(unpack_event(packet))
            except ValueError as error:
                self._end_reason = f"sent a malformed message ({error})"
                if self._process is not None:
                    self._process.kill()
                return

    def _take(self, event: FromWorker) -> None:
        if event.event == Event.HELLO:
            if not self._hello.done():
                self._hello.set_result(event.text)
        elif event.event == Event.STARTUP_FAILED:
            if not self._hello.done():
                told = f"device {self.spec.device}: queue {self.spec.queue}: {event.text}"
                self._fail_hello(from_exit_code(told, event.exit_code, WorkerError))
        elif event.event == Event.RING_FAILED:
            self._on_ring_failed(event.text)
        elif event.event == Event.LOG:
            _log.warning("device %s: queue %d: %s", self.spec.device, self.spec.queue, event.text)
        elif event.event == Event.STORE_SIZE:
            self._on_store_size(int(event.text))
        elif event.event in (Event.DONE, Event.REFUSED):
            answer = self._answers.get(event.seq)  # absent when it came too late
            if answer is not None and not answer.done():
                answer.set_result(event)
        else:
            raise ValueError(f"event {event.event}")

    def _fail_hello(self, error: VdusefastError) -> None:
        self._hello.set_exception(error)
        self._hello.exception()  # retrieved: nobody waits any more where the start was cancelled

    def _on_stderr(self) -> None:
        """Forward the worker's lines to the log and keep the last ones."""
        for _ in range(STDERR_READ_COUNT_MAX):
            try:
                data = os.read(self._stderr_fd, 4096)
            except BlockingIOError:
                return
            if not data:
                self._loop.remove_reader(self._stderr_fd)
                self._keep_line(self._stderr_part)
                self._stderr_part = b""
                return
            *lines, rest = (self._stderr_part + data).split(b"\n")
            for line in lines:
                self._keep_line(line)
            self._stderr_part = rest[:STDERR_LINE_MAX_BYTES]

    def _keep_line(self, line: bytes) -> None:
        text = line[:STDERR_LINE_MAX_BYTES].decode(errors="replace").strip()
        if text:
            self._stderr_lines.append(text)
            _log.info("%s: %s", self.title, text)

    def _on_reaped(self) -> None:
        """Reap the process, and wait for the I/O that it may have left in the kernel: io_uring's goes on."""
        if self._process is None or self._process.poll() is None:
            return
        self.reaped = True
        self._loop.remove_reader(self._pid_fd)
        self._loop.add_reader(self._life_fd, self._on_exit)

    def _on_exit(self) -> None:
        """Take what the process said last, and tell who waits: all of it has ended."""
        self._loop.remove_reader(self._life_fd)
        self._on_messages()
        self._on_stderr()
        self._keep_line(self._stderr_part)
        self._stderr_part = b""
        self.close()
        self._exited.set()
        error = WorkerError(f"{self.title} {self.cause()}")
        ready = self._hello.done()
        if not ready:
            self._fail_hello(error)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        # A failed start is reported to who waits for the HELLO.
        if ready and not self._hello.exception() and not self._end_expected:
            self._on_death(error)
