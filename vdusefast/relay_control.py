"""The relay of a device as its supervisor sees it: started before the workers, replaced when it dies, ended after them.

Everything runs in the supervisor's event loop, in the thread that lives as long as the device: a relay asks to be
killed when the thread that spawned it ends. The listening socket is ours, so that workers can ask for a relay that is
not there yet; it has no name that anybody else could use.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from vdusefast.backends.plugin import StoreSpec
from vdusefast.errors import WorkerError
from vdusefast.relay import RelaySpec
from vdusefast.worker_process import socket_to_itself

PAUSE_S = 0.1  # before the next relay, twice as long each time
PAUSE_MAX_S = 5.0
STEADY_S = 10.0  # one that has served for so long died of something else
END_S = 5.0  # to end by itself
LINE_MAX_BYTES = 4096
READ_BYTES = 4096

_log = logging.getLogger("vdusefast")


class RelayControl:
    """One relay after another. `start` and `stop` are to be called in one event loop."""

    def __init__(
        self, device: str, spec: StoreSpec, *, slot_count: int, directory: Path, on_store_size: Callable[[int], None]
    ):
        """Make the socket; `socket_fd` is what a worker connects to, by /proc/self/fd.

        spec: what the relay is told of the store. slot_count: requests in flight of a queue. directory: where a socket
        can be made for a moment. on_store_size: called when the store has another size (bytes). Raises OSError.
        """
        self._device = device
        self._spec = spec
        self._slot_count = slot_count
        self._on_store_size = on_store_size
        self._task: asyncio.Task[None] | None = None
        self._pid = -1
        self._hold = socket_to_itself()  # for what one relay leaves to the next
        try:
            self._listener, self.socket_fd = _make_socket(directory, spec.queue_count)
        except BaseException:
            self._hold.close()
            raise

    @property
    def pid(self) -> int:
        """The process id of the relay, -1 while there is none."""
        return self._pid

    def start(self) -> None:
        """Start a relay, and another one whenever it ends."""
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def stop(self) -> None:
        """End the relay. Its workers are gone, or are to get no answers any more. A second call does nothing."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self.close()

    def close(self) -> None:
        """Close the socket; the relay has ended. A second call does nothing."""
        self._listener.close()
        self._hold.close()
        if self.socket_fd >= 0:
            os.close(self.socket_fd)
            self.socket_fd = -1

    def resized(self, size_bytes: int) -> None:
        """Note what the next relay is told."""
        self._spec = self._spec._replace(size_bytes=size_bytes)

    async def _keep(self) -> None:
        """Run one relay after another, without an end."""
        pause_s = PAUSE_S
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                cause = await self._run()
            except OSError as error:
                cause = f"cannot be started: {error.strerror}"
            pause_s = PAUSE_S if loop.time() - began > STEADY_S else min(2 * pause_s, PAUSE_MAX_S)
            _log.warning("device %s: the relay of its store %s; the next one follows", self._device, cause)
            await asyncio.sleep(pause_s)

    async def _run(self) -> str:
        """Run one relay to its end. Returns why it ended, as the rest of a sentence. Raises OSError."""
        spec = RelaySpec(
            supervisor_pid=os.getpid(),
            listen_fd=self._listener.fileno(),
            queue_count=self._spec.queue_count,
            slot_count=self._slot_count,
            store_spec=self._spec._replace(hold_fd=self._hold.fileno()).to_json(),
        )
        here = str(Path(__file__).resolve().parent.parent)
        code = (
            f"import os, sys; sys.path.append({here!r}); from vdusefast.relay import main; os._exit(main(sys.argv[1:]))"
        )
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, *spec.to_argv()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[fd for fd in (spec.listen_fd, self._hold.fileno(), self._spec.notes_fd) if fd >= 0],
            process_group=0,  # the terminal's Ctrl-C is for the supervisor alone
        )
        self._pid = process.pid
        try:
            with process:
                return await self._attend(process)
        finally:
            self._pid = -1

    async def _attend(self, process: subprocess.Popen[bytes]) -> str:
        """Listen to a relay until it ends; end it when that is cut short."""
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdin is not None
        said: list[str] = []
        try:
            await asyncio.gather(
                _lines(process.stdout, self._take),
                _lines(process.stderr, lambda line: self._note(process.pid, said, line)),
            )
            await _ended(process, END_S)
        except asyncio.CancelledError:
            process.stdin.close()
            await _ended(process, END_S)
            raise
        finally:
            if process.poll() is None:
                process.kill()
        code = process.wait()
        cause = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"(pid {process.pid}) {cause}{f'; its last line: {said[-1]}' if said else ''}"

    def _take(self, line: str) -> None:
        """Take what a relay has to say."""
        try:
            news = json.loads(line)
        except ValueError:
            _log.warning("device %s: relay: %s", self._device, line)
            return
        if "size_bytes" in news:
            self.resized(news["size_bytes"])
            self._on_store_size(news["size_bytes"])
        else:
            _log.warning("device %s: relay: %s", self._device, news["log"])

    def _note(self, pid: int, said: list[str], line: str) -> None:
        said[:] = [line]
        _log.info("device %s: relay (pid %d): %s", self._device, pid, line)


def check_relay() -> None:
    """Raise WorkerError where the extension of the relay is missing."""
    try:
        from vdusefast.backends import _relay  # noqa: F401
    except ImportError as error:
        raise WorkerError(f"the relay's extension cannot be loaded: {error}; build it: make build") from None


def _make_socket(directory: Path, backlog: int) -> tuple[socket.socket, int]:
    """Return a listening socket without a name, and an O_PATH descriptor of it, which /proc/self/fd makes a name of."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix="relay-") as private:
            directory_fd = os.open(private, os.O_PATH | os.O_CLOEXEC)  # its own path may be too long for a socket's
            try:
                path = f"/proc/self/fd/{directory_fd}/socket"
                listener.bind(path)
                listener.listen(2 * backlog)
                return listener, os.open(path, os.O_PATH | os.O_CLOEXEC)
            finally:
                os.close(directory_fd)
    except BaseException:
        listener.close()
        raise


async def _lines(file: IO[bytes], take: Callable[[str], None]) -> None:
    """Give each line that comes out of a pipe to `take`, until its end."""
    loop = asyncio.get_running_loop()
    os.set_blocking(file.fileno(), False)
    ready = asyncio.Event()
    loop.add_reader(file.fileno(), ready.set)
    part = b""
    try:
        while True:
            await ready.wait()
            ready.clear()
            try:
                data = os.read(file.fileno(), READ_BYTES)
            except BlockingIOError:
                continue
            if not data:
                break
            *lines, part = (part + data).split(b"\n")
            part = part[:LINE_MAX_BYTES]
            for line in lines:
                take(line[:LINE_MAX_BYTES].decode(errors="replace"))
    finally:
        loop.remove_reader(file.fileno())
    if part:
        take(part.decode(errors="replace"))


async def _ended(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait for the end of a process, for so long at most."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while process.poll() is None and loop.time() < deadline:
        await asyncio.sleep(0.01)
