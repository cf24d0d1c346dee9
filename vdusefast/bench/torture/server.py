"""The server of a tortured loopback device: a process of its own, which is killed and started again.

`main` is that process: supervisor and workers as anywhere else, on a bus that lives in the process that tortures it.
`LoopbackServer` is the other side: it starts it, knows its processes, and harms them, as `TorturedServer` says.
"""

from __future__ import annotations

import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from vdusefast.base import spawn
from vdusefast.config import Config
from vdusefast.errors import VdusefastError

if TYPE_CHECKING:
    import psutil

    from vdusefast.api import Device
    from vdusefast.server.signals import StopSignals

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0
WORKER_TIMEOUT_S = 60.0  # a machine with too few CPUs starts one in many seconds
LOOK_S = 0.001
SIDE_TIMEOUT_S = 30.0  # relays that die follow each other by pauses of up to 5 s
SIDE_LOOK_S = 0.02
KILL_TRIES_MAX = 20
SIDES = {"relay": "worker.relay", "keeper": "state.keeper"}  # the modules of the processes beside the workers
READY = b"ready\n"
LOG_TAIL_LINES = 5
COMMAND_MAX_BYTES = 100


class ServerError(VdusefastError):
    """The server did not do what a server has to do, without having been harmed."""


class TorturedServer(ABC):
    """A server process and its workers, to be harmed. A context manager that leaves none of them behind."""

    def __init__(self, pages: Path):
        """Make one that has not been started. pages: where its shared pages are once it has."""
        self.start_count = 0
        self._pages = pages
        self._directory = f"{pages.parent}/"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @abstractmethod
    def pid(self) -> int:
        """The supervisor's process."""

    @abstractmethod
    def start(self, *, recover: bool) -> None:
        """Start a server that makes the device, or adopts the orphan; see `wait_ready`."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Wait until it serves. Raises ServerError with what it said last."""

    @abstractmethod
    def stop(self) -> None:
        """Let it drain and end, which removes the device. Raises ServerError when it does not end well."""

    @abstractmethod
    def close(self) -> None:
        """End it by force if it still runs."""

    @abstractmethod
    def reap(self) -> None:
        """Wait until the supervisor, which was killed, is gone. Raises ServerError."""

    @abstractmethod
    def log_end(self) -> str:
        """Return the end of its log, in one line."""

    @abstractmethod
    def resize(self, size_bytes: int) -> None:
        """Have it give the device another size. Raises ServerError when it does not."""

    @abstractmethod
    def hand_over(self) -> None:
        """Have it end and leave the device to the next server, which serves when this returns. Raises ServerError."""

    def start_again(self, again_s: float, *, with_workers: bool) -> None:
        """Start the next server after a kill; unless `again_s` is negative, kill that one, too, so long afterwards.

        Raises ServerError when the last one does not serve.
        """
        self.start(recover=True)
        if again_s >= 0:
            time.sleep(again_s)
            self.kill(with_workers=with_workers)
            self.start(recover=True)
        self.wait_ready()

    def kill(self, *, with_workers: bool = False, workers_first: bool = False) -> None:
        """Kill the supervisor, and with `with_workers` every worker and the relay in the same moment; then reap it."""
        workers = [*filter(None, self.worker_pids()), *self.side_pids("relay")] if with_workers else []
        pids = [*workers, self.pid] if workers_first else [self.pid, *workers]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # a worker that dies with its supervisor
        self.reap()

    def kill_worker(self, queue: int, not_pid: int = 0) -> int:
        """Kill the worker of `queue`, once there is one other than `not_pid`. Returns its pid. Raises ServerError."""
        return self._kill(lambda: self.wait_worker(queue, not_pid))

    def kill_side(self, kind: str, not_pid: int = 0) -> int:
        """Kill the relay or the keeper, once there is one other than `not_pid`. Returns its pid. Raises ServerError."""
        return self._kill(lambda: self.wait_side(kind, not_pid))

    def _kill(self, find: Callable[[], int]) -> int:
        """Kill the process that `find` names; one that has ended by itself meanwhile is looked for again."""
        for _ in range(KILL_TRIES_MAX):
            pid = find()
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return pid
        raise ServerError(f"{KILL_TRIES_MAX} processes ended before they could be killed: {self.log_end()}")

    def wait_side(self, kind: str, not_pid: int = 0, timeout_s: float = SIDE_TIMEOUT_S) -> int:
        """Return the pid of the relay or the keeper, once there is one other than `not_pid`. Raises ServerError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for pid in self.side_pids(kind):
                if pid != not_pid:
                    return pid
            time.sleep(SIDE_LOOK_S)
        raise ServerError(f"the device has no {kind} after {timeout_s:g} s: {self.log_end()}")

    def side_pids(self, kind: str) -> list[int]:
        """Return the pids of the processes beside the workers: of the "relay", a child of the supervisor's, or of the
        "keeper", which is nobody's child and has an open file in the run directory.
        """
        import psutil

        found = []
        for process in _children(self.pid) if kind == "relay" else psutil.process_iter():
            try:
                if f"vdusefast.{SIDES[kind]} import main" not in " ".join(process.cmdline()):
                    continue
                if kind == "relay" or any(file.path.startswith(self._directory) for file in process.open_files()):
                    found.append(process.pid)
            except psutil.Error:
                continue  # it has ended meanwhile
        return found

    def stall(self, pid: int, for_s: float) -> None:
        """Stop a process of the server for a while."""
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(for_s)
        finally:
            with suppress(ProcessLookupError):  # its supervisor has killed it, as hung
                os.kill(pid, signal.SIGCONT)

    def fail_store(self, for_s: float) -> None:
        """Have every write of every worker to its file fail (EFBIG, by RLIMIT_FSIZE) for a while."""
        before: dict[int, tuple[int, int]] = {}
        try:
            for pid in filter(None, self.worker_pids()):
                with suppress(ProcessLookupError):  # it has ended, and the next worker is not hit
                    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
                    before[pid] = (soft, hard)
            time.sleep(for_s)
        finally:
            for pid, limits in before.items():
                with suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    def wait_worker(self, queue: int, not_pid: int = 0, timeout_s: float = WORKER_TIMEOUT_S) -> int:
        """Return the pid of the worker of `queue`, once there is one other than `not_pid`. Raises ServerError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            pid = self.worker_pids()[queue]
            if pid and pid != not_pid:
                return pid
            time.sleep(LOOK_S)
        raise ServerError(f"queue {queue} has no worker after {timeout_s:g} s: {self.log_end()}")

    def worker_pids(self) -> list[int]:
        """Return the pid of each queue's worker as the shared pages have it, 0 for one that is no child of ours.

        Raises ServerError when there are no shared pages.
        """
        from vdusefast.state.shared_pages import SharedPages

        try:
            with SharedPages.open(self._pages) as pages:
                pids = [pages.status(queue).pid for queue in range(pages.queue_count)]
        except VdusefastError as error:
            raise ServerError(f"{error}: {self.log_end()}") from error
        return [pid if pid and _parent(pid) == self.pid else 0 for pid in pids]


class LoopbackServer(TorturedServer):
    """A server on a bus that lives in this process."""

    def __init__(self, config: Config, bus: Path, directory: Path, *, msg_timeout_s: float):
        """Prepare; see `start`. bus: the socket of the LoopbackHost. directory: for run directory, settings, log."""
        run_dir, settings = directory / "run", directory / "config.json"
        super().__init__(run_dir / config.device.name / "pages")
        self.log = directory / "server.log"
        settings.write_bytes(msgspec.json.encode(config))
        self._arguments = [str(bus), str(run_dir), str(settings), str(msg_timeout_s)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The supervisor's process."""
        assert self._process is not None
        return self._process.pid

    def start(self, *, recover: bool) -> None:
        """Start a server."""
        self._release()
        self.start_count += 1
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*spawn.command("bench.torture.server"), *self._arguments, "recover" if recover else "create"],
                stdin=subprocess.PIPE,  # it ends when this process does
                stdout=subprocess.PIPE,
                stderr=log,
                process_group=0,
            )

    def wait_ready(self) -> None:
        """Wait until it says so."""
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], START_TIMEOUT_S)[0]:
            raise ServerError(f"the server does not serve after {START_TIMEOUT_S:g} s: {self.log_end()}")
        if self._process.stdout.readline() != READY:
            raise ServerError(f"the server has ended instead of serving: {self.log_end()}")

    def resize(self, size_bytes: int) -> None:
        """Ask it to, by a line on its standard input."""
        self._send_line(f"resize {size_bytes}")
        self.wait_ready()

    def hand_over(self) -> None:
        """Ask it to, and start the next one."""
        self._send_line("hand over")
        self._wait_end()
        self.start(recover=True)
        self.wait_ready()

    def stop(self) -> None:
        """Ask it to end by SIGTERM."""
        assert self._process is not None
        self._process.terminate()
        self._wait_end()

    def close(self) -> None:
        """Kill it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._release()

    def reap(self) -> None:
        """Wait for its end."""
        assert self._process is not None
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ServerError(f"the server, killed, is there after {END_TIMEOUT_S:g} s: {self.log_end()}") from None

    def log_end(self) -> str:
        """Return the end of what it has written to standard error."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "; ".join(lines[-LOG_TAIL_LINES:]) or "it has said nothing"

    def _send_line(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")
        except BrokenPipeError:
            raise ServerError(f"the server has ended by itself: {self.log_end()}") from None

    def _wait_end(self) -> None:
        assert self._process is not None
        try:
            status = self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ServerError(f"the server did not end in {END_TIMEOUT_S:g} s: {self.log_end()}") from None
        self._release()
        if status != 0:
            raise ServerError(f"the server has ended with status {status}: {self.log_end()}")

    def _release(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None


def _parent(pid: int) -> int:
    """Return the parent of a process that runs, 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    state, parent = status.rpartition(")")[2].split()[:2]
    return 0 if state in "ZX" else int(parent)


def _children(pid: int) -> list[psutil.Process]:
    import psutil

    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def main(arguments: list[str]) -> int:
    """Serve the device that the arguments describe, until SIGTERM or the end of standard input."""
    from vdusefast.api import Device
    from vdusefast.bench.torture.loopback_host import RemoteLoopbackTransport
    from vdusefast.server.signals import StopSignals

    bus, run_dir, settings, msg_timeout_s, how = arguments
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stderr)
    config = msgspec.json.decode(Path(settings).read_bytes(), type=Config)
    transport = RemoteLoopbackTransport(Path(bus), float(msg_timeout_s))
    with StopSignals() as signals:
        try:
            device = Device(config, run_dir=run_dir, transport=transport)
            device.start(recover=how == "recover")
            _obey(device, signals)
        except VdusefastError as error:
            logging.error("%s", error)
            return error.exit_code
    return 0


def _obey(device: Device, signals: StopSignals) -> None:
    """Serve until a signal or the end of standard input, and do what the lines on it say."""
    while True:
        os.write(1, READY)
        while not signals.requested and not signals.wait_for(0):
            pass
        match b"" if signals.requested else os.read(0, COMMAND_MAX_BYTES).split():
            case [b"resize", size_bytes]:
                device.resize(int(size_bytes), force=True)
            case [b"hand", b"over"]:
                device.hand_over()
                return
            case _:
                device.stop()
                return
