"""One relay process as the supervisor sees it: its spawn, its events, its output, its end.

Everything runs in the supervisor's event loop, and nothing here blocks the loop to wait for the process: a killed
process may stay for as long as the kernel waits for its storage.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable

from vdusefast.base import spawn
from vdusefast.base.child_output import ChildOutput
from vdusefast.base.deadline import limit
from vdusefast.base.guard import Guard, Part
from vdusefast.base.handed import write_arguments
from vdusefast.base.printable import printable
from vdusefast.worker.protocol import MESSAGE_MAX_BYTES, Event, FromWorker, store_size_bytes, unpack_event
from vdusefast.worker.relay import RelaySpec

EVENTS_A_TURN_MAX = 64
EXIT_HANGS = 70  # of a process whose class could not be interrupted (backends/_python.pyx)
CANNOT_BE_TAKEN = "sent what cannot be taken"  # the relay's fault if our own code failed on its event


class RelayProcess:
    """A relay from its spawn to its end; `close` releases its descriptors."""

    def __init__(self, device: str, guard: Guard, on_store_size: Callable[[int], None], on_fault: Callable[[], None]):
        """Prepare; see `spawn`.

        Called in the loop: on_store_size when the store has another size (bytes), on_fault when the process has been
        killed because it broke the rules, and may not have ended yet.
        """
        self.pid = -1
        self.fault = ""  # how it broke the rules; it has been killed for that
        self.ready = False  # it has opened its store
        self._device = device
        self._guard = guard
        self._on_store_size = on_store_size
        self._on_fault = on_fault
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._refusal = ""  # why it could not start, as it reported
        self._process: subprocess.Popen[bytes] | None = None
        self._events: socket.socket | None = None
        self._pid_fd = -1
        self._output = ChildOutput(guard, Part.RELAY_OUTPUT, lambda: f"device {device}: relay (pid {self.pid})")

    def spawn(self, spec: RelaySpec, inherited_fds: list[int]) -> None:
        """Start the process. `event_fd` of `spec` is filled in here.

        Raises OSError; `close` is to follow in any case. `pid` is -1 until the process is watched.
        """
        self._events, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._events.setblocking(False)
        spec_fd = -1
        try:
            with theirs:
                spec_fd = write_arguments(spec._replace(event_fd=theirs.fileno()).to_arguments())
                self._process = subprocess.Popen(
                    [*spawn.command("worker.relay", options=("-u",), at_once=True), self._device, str(spec_fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=self._output.write_fd,
                    stderr=self._output.write_fd,
                    pass_fds=[spec_fd, theirs.fileno(), *inherited_fds],
                    process_group=0,  # the terminal's Ctrl-C is for the supervisor alone
                )
        finally:
            self._output.spawned()
            if spec_fd >= 0:
                os.close(spec_fd)
        self._pid_fd = os.pidfd_open(self._process.pid)
        self.pid = self._process.pid
        self._guard.reader(self._pid_fd, Part.RELAY, self._on_end, self._ended.set)
        self._guard.reader(self._events.fileno(), Part.RELAY_EVENTS, self._on_events, self._hear_no_more)
        self._output.watch()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for its end. Returns whether it has come within `timeout_s`; None = there is no limit."""
        try:
            async with limit(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def ask_to_end(self) -> None:
        """Ask it to end by itself."""
        if self._events is not None:
            self._events.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Kill it, without waiting for its end."""
        if self._process is not None:
            self._process.kill()

    def cause(self) -> str:
        """Return why it ended, as the rest of a sentence that begins with the relay's name."""
        code = self._process.poll() if self._process is not None else None
        if self.fault:
            cause = f"{self.fault} and was killed"
        elif self._refusal:
            return f"(pid {self.pid}) cannot start: {self._refusal}"
        elif code is None:
            cause = "is not known to have ended"
        elif code < 0:
            cause = f"was killed by {_signal_name(-code)}"
        else:
            cause = f"ended with status {code}"
        last_line = self._output.last_line
        return f"(pid {self.pid}) {cause}{f'; its last line: {last_line}' if last_line else ''}"

    def has_hung(self) -> bool:
        """Return whether it has ended itself because a user's class did not return within its time limit."""
        return self._process is not None and self._process.poll() == EXIT_HANGS

    def close(self) -> None:
        """Close every descriptor; kill the process if it still runs. A second call does nothing."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # reaped when the next process is started
        self._stop_hearing()
        if self._pid_fd >= 0:
            self._loop.remove_reader(self._pid_fd)
            os.close(self._pid_fd)
            self._pid_fd = -1
        self._output.close()

    # -- inside

    def _stop_hearing(self) -> None:
        if self._events is not None:
            self._loop.remove_reader(self._events)
            self._events.close()
            self._events = None

    def _hear_no_more(self) -> None:
        """Kill a relay whose events cannot be processed."""
        self.fault = self.fault or CANNOT_BE_TAKEN
        self._stop_hearing()
        self.kill()
        self._on_fault()

    def _on_end(self) -> None:
        if self._process is None or self._process.poll() is None:
            return
        self._loop.remove_reader(self._pid_fd)
        self._guard.call(Part.RELAY_EVENTS, self._on_events)
        self._output.end()
        self._ended.set()

    def _on_events(self) -> None:
        for _ in range(EVENTS_A_TURN_MAX):
            if self._events is None:
                return
            try:
                packet = self._events.recv(MESSAGE_MAX_BYTES + 1)
            except BlockingIOError:
                return
            except OSError:  # it has ended; its exit status has the cause
                packet = b""
            if not packet:
                self._stop_hearing()
                return
            try:
                self._take(unpack_event(packet))
            except ValueError as error:
                self.fault = f"sent a malformed event ({error})"
                self._hear_no_more()

    def _take(self, event: FromWorker) -> None:
        text = printable(event.text)
        if event.event == Event.HELLO:
            self.ready = True
        elif event.event == Event.STARTUP_FAILED:
            self._refusal = text
        elif event.event == Event.LOG:
            self._output.budget.log(logging.WARNING, f"device {self._device}: relay: {text}")
        elif event.event == Event.STORE_SIZE:
            self._on_store_size(store_size_bytes(event))
        else:
            raise ValueError(f"event {event.event}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
