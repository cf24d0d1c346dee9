"""The relay of a device as its supervisor sees it: started before the workers, replaced when it dies, ended after them.

Everything runs in the supervisor's event loop, in the thread that lives as long as the device, because a relay is
killed when the thread that spawned it ends. The supervisor has the listening sockets, so workers can connect before the
relay has started. The sockets have no names that another process could use.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from vdusefast.backends.plugin import StoreSpec
from vdusefast.base import build
from vdusefast.base.guard import Guard, Part
from vdusefast.control.relay_process import CANNOT_BE_TAKEN, RelayProcess
from vdusefast.errors import VdusefastError, WorkerError
from vdusefast.state.run_dir import PRIVATE_PREFIX
from vdusefast.worker.relay import RelaySpec

PAUSE_S = 0.1  # pause before the next relay, twice as long each time
PAUSE_MAX_S = 5.0
STEADY_S = 10.0  # after so long, a relay's death has another cause than the previous one's
DEATHS_MAX = 3  # early deaths of relays before a failure is reported
END_S = 5.0  # to end by itself
BACKLOG = 4  # a queue has one worker at a time
CHUNK_BYTES = 128 << 10  # VF_RELAY_CHUNK_BYTES, for each slot
REAP_S = 5.0  # a killed relay that stays longer waits inside the kernel, for its storage

_log = logging.getLogger("vdusefast")


class RelayControl:
    """One relay after another. `start` and `stop` are to be called in one event loop."""

    def __init__(
        self,
        device: str,
        spec: StoreSpec,
        *,
        slot_count: int,
        directory: Path,
        on_store_size: Callable[[int], None],
        on_failure: Callable[[VdusefastError], None],
        lock_memory: bool = False,
    ):
        """Make sockets and memory, one of each for each queue, so that no worker can reach another one's.

        `socket_fds` are what workers connect to, by /proc/self/fd; `memory_fds` is what they share with the relay.

        spec: the store, for the relay. slot_count: requests in flight of a queue. directory: where a socket
        can be made for a moment. on_store_size: called when the store has another size (bytes). on_failure: called
        in the loop with what people are to know. lock_memory: whether relays are prepared for memory reclaim. Raises
        OSError.
        """
        self._device = device
        self._spec = spec
        self._slot_count = slot_count
        self._lock_memory = lock_memory
        self._on_store_size = on_store_size
        self._on_failure = on_failure
        self._guard = Guard(device, on_failure)
        self._task: asyncio.Task[None] | None = None
        self._pid = -1
        self._sockets: list[tuple[socket.socket, int]] = []
        self.memory_fds: list[int] = []
        try:
            self._sockets = _make_sockets(directory, spec.queue_count)
            for _ in range(spec.queue_count):
                self.memory_fds.append(_make_memory(slot_count * CHUNK_BYTES))
        except BaseException:
            self.close()
            raise

    @property
    def socket_fds(self) -> list[int]:
        """The sockets that workers connect to, one per queue."""
        return [fd for _, fd in self._sockets]

    @property
    def pid(self) -> int:
        """The process id of the relay, -1 while there is none."""
        return self._pid

    @property
    def upgraded(self) -> str:
        """Why there is no relay: the installed files are of another build now. Else empty."""
        return build.upgraded() if self._pid < 0 else ""

    def start(self) -> None:
        """Start a relay, and another one whenever it ends."""
        self._begin(0.0)

    async def stop(self) -> None:
        """End the relay, when its workers have ended or must get no more answers. A second call does nothing."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self._guard.close()
        self.close()

    def close(self) -> None:
        """Close sockets and memory; the relay has ended. A second call does nothing."""
        _close_sockets(self._sockets)
        for fd in self.memory_fds:
            os.close(fd)
        self._sockets, self.memory_fds = [], []

    def resized(self, size_bytes: int) -> None:
        """Note the spec of the next relay."""
        self._spec = self._spec._replace(size_bytes=size_bytes)

    def _begin(self, pause_s: float) -> None:
        self._task = self._guard.task(Part.RELAY, self._keep(pause_s), lambda: self._begin(PAUSE_MAX_S))

    async def _keep(self, wait_s: float) -> None:
        """Run one relay after another, for ever. One whose class hangs has lived for the time limit of its request."""
        pause_s, deaths = PAUSE_S, 0
        loop = asyncio.get_running_loop()
        await asyncio.sleep(wait_s)
        while True:
            began = loop.time()
            try:
                cause, hung = await self._run()
            except OSError as error:
                cause, hung = f"cannot be started: {error.strerror}", False
            steady = loop.time() - began > STEADY_S and not hung
            pause_s, deaths = (PAUSE_S, 1) if steady else (min(2 * pause_s, PAUSE_MAX_S), deaths + 1)
            message = f"device {self._device}: the relay of its store {cause}; it is restarted"
            if deaths >= DEATHS_MAX:
                self._on_failure(WorkerError(f"{message} after a pause, as earlier ones died, too"))
            else:
                _log.warning("%s", message)
            await asyncio.sleep(pause_s)

    async def _run(self) -> tuple[str, bool]:
        """Run one relay to its end. Returns why it ended, as the rest of a sentence, and `has_hung`. Raises OSError."""
        spec = RelaySpec(
            supervisor_pid=os.getpid(),
            event_fd=-1,
            slot_count=self._slot_count,
            lock_memory=int(self._lock_memory),
            store_spec=self._spec.to_json(),
            places=tuple(zip((listener.fileno() for listener, _ in self._sockets), self.memory_fds, strict=True)),
        )
        fds = [self._spec.hold_fd, self._spec.notes_fd, *(fd for place in spec.places for fd in place)]
        relay = RelayProcess(self._device, self._guard, self._take_size, lambda: self._reap_faulty(relay))
        try:
            relay.spawn(spec, [fd for fd in fds if fd >= 0])
            self._pid = relay.pid
            await relay.wait()  # without a limit: until its end it may write data that the next one is asked to write
            return relay.cause(), relay.has_hung()
        except BaseException:
            await self._end(relay)
            raise
        finally:
            self._pid = -1
            relay.close()

    async def _end(self, relay: RelayProcess) -> None:
        """End a relay: it finishes its requests, and is killed if that takes too long."""
        relay.ask_to_end()
        if relay.pid < 0 or await relay.wait(END_S):
            return
        relay.kill()
        await self._reap(relay)

    def _reap_faulty(self, relay: RelayProcess) -> None:
        """Report a relay that was killed for a malformed message, and check that it ends."""
        if relay.fault != CANNOT_BE_TAKEN:  # otherwise it has been reported already
            self._on_failure(WorkerError(f"device {self._device}: the relay of its store {relay.cause()}"))
        self._guard.task(Part.RELAY, self._reap(relay))

    async def _reap(self, relay: RelayProcess) -> None:
        """Wait for the end of a killed relay; report one that does not end."""
        if not await relay.wait(REAP_S):
            why = f"relay (pid {relay.pid}) waits in the kernel for its storage and cannot be killed"
            self._on_failure(
                WorkerError(f"device {self._device}: {why}; no other can take its place; see /proc/{relay.pid}/stack")
            )

    def _take_size(self, size_bytes: int) -> None:
        self.resized(size_bytes)
        self._on_store_size(size_bytes)


def check_relay() -> None:
    """Raise WorkerError where the extension of the relay is missing."""
    try:
        from vdusefast.backends import _relay  # noqa: F401
    except ImportError as error:
        raise WorkerError(f"the relay's extension cannot be loaded: {error}; build it: make build") from None


def _make_sockets(directory: Path, count: int) -> list[tuple[socket.socket, int]]:
    """Return listening sockets without names, each with an O_PATH descriptor, reachable by /proc/self/fd.

    The caller closes them. Raises OSError.
    """
    made: list[tuple[socket.socket, int]] = []
    with tempfile.TemporaryDirectory(dir=directory, prefix=PRIVATE_PREFIX) as private:
        directory_fd = os.open(private, os.O_PATH | os.O_CLOEXEC)  # its own path may be too long for a socket's
        try:
            for index in range(count):
                path = f"/proc/self/fd/{directory_fd}/{index}"
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                made.append((listener, -1))
                listener.bind(path)
                listener.listen(BACKLOG)
                made[-1] = (listener, os.open(path, os.O_PATH | os.O_CLOEXEC))
        except BaseException:
            _close_sockets(made)
            raise
        finally:
            os.close(directory_fd)
    return made


def _close_sockets(sockets: list[tuple[socket.socket, int]]) -> None:
    for listener, fd in sockets:
        listener.close()
        if fd >= 0:
            os.close(fd)


def _make_memory(length_bytes: int) -> int:
    """Return memory that a worker and the relay share: neither can remove pages of it. Raises OSError."""
    fd = os.memfd_create("vdusefast-relay", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd
