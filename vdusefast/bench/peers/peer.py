"""A peer: one way to serve a file as a block device. It is started, used and removed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vdusefast.base.json_types import Json
from vdusefast.bench.common import block_node
from vdusefast.errors import TimedOutError, VdusefastError
from vdusefast.host.cpu_topology import format_cpu_list

_T = TypeVar("_T")

START_S = 60.0  # for a server to be ready; emulated machines are slow
END_S = 10.0
LOOK_S = 0.02
TOOL_S = 60.0


@dataclass(frozen=True)
class PeerSetup:
    """What every peer gets: a file of its own, and as many queues and CPUs as the others.

    cpus: where servers may run; empty = anywhere. directory: for sockets and what servers print. tag: goes into names,
    so that two runs do not meet.
    """

    path: Path
    size_bytes: int
    queues: int
    cpus: tuple[int, ...]
    directory: Path
    tag: str


class Peer(ABC):
    """One way to serve a file. Class attributes say what it is; `start` makes `node`, `stop` removes everything."""

    name: str  # in tables and for --peers
    title: str
    cache: str  # how the bytes get from the device to the file
    modules: tuple[str, ...] = ()  # that the kernel needs, in the order in which they are loaded
    tools: tuple[str, ...] = ()  # programs, by their Debian package where that has another name
    packages: tuple[str, ...] = ()
    keeps_data = True

    def __init__(self, setup: PeerSetup):
        self.setup = setup
        self.node = ""
        self.commands: list[list[str]] = []
        self._stack = ExitStack()
        self._servers: list[ServerProcess] = []

    @classmethod
    def missing(cls) -> str:
        """Return why this peer cannot run on this machine, with the remedy; "" when it can."""
        for tool, package in zip(cls.tools, cls.packages or cls.tools, strict=True):
            if shutil.which(tool) is None:
                return f"{tool} is not installed; type: sudo apt-get install {package}"
        return cls.missing_in_kernel()

    @classmethod
    @abstractmethod
    def missing_in_kernel(cls) -> str:
        """Return what the kernel lacks, with the remedy; "" when it lacks nothing."""

    @abstractmethod
    def _start(self) -> str:
        """Serve the file, return the node; what is to be undone goes onto `_stack` at once. Raises VdusefastError."""

    def start(self) -> None:
        """Serve the file and wait until the node has its size. Raises VdusefastError; nothing is left behind then."""
        try:
            self.node = self._start()
            block_node.wait_for(self.node, self.setup.size_bytes, START_S)
        except OSError as error:
            self.stop()
            raise VdusefastError(f"{self.name}: cannot be started: {error.strerror or error}") from error
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Raise VdusefastError when a server of this peer has ended: fio would wait for ever."""
        for server in self._servers:
            server.check()

    def rest(self) -> None:  # noqa: B027 (most kinds have nothing to do)
        """Keep the servers off the CPUs while other peers are timed. Those that sleep when idle need nothing."""

    def wake(self) -> None:  # noqa: B027
        """Undo `rest`."""

    def counters(self) -> dict[str, int]:
        """Return what the server itself has counted since its start, nothing where it does not count."""
        return {}

    def stop(self, *, force: bool = False) -> None:
        """Remove device and server. force: requests that nobody would answer are failed. A second call does nothing."""
        del force
        self.node = ""
        self._stack.close()

    def version(self) -> str:
        """Return the version of the server, "" when the kernel itself serves."""
        return first_line([self.tools[0], "--version"]) if self.tools else ""

    def describe(self) -> Json:
        """Return what the report says of this peer."""
        return {
            "name": self.name,
            "title": self.title,
            "cache": self.cache,
            "version": self.version(),
            "node": self.node,
            "file": str(self.setup.path) if self.keeps_data else "",
            "commands": self.commands,
            "checked": False,
        }

    def run(self, arguments: Sequence[str]) -> str:
        """Run a tool and return its output. Raises VdusefastError with its own message."""
        self.commands.append(list(arguments))
        return run_tool(arguments)

    def serve(self, arguments: Sequence[str]) -> ServerProcess:
        """Start a server on the CPUs that servers have; it ends with `stop`."""
        self.commands.append(list(arguments))
        pinned = ["taskset", "--cpu-list", format_cpu_list(self.setup.cpus)] if self.setup.cpus else []
        server = ServerProcess(arguments[0], [*pinned, *arguments], self.setup.directory / f"{self.name}.log")
        self._stack.callback(server.end)
        self._servers.append(server)
        return server


class ServerProcess:
    """A server that we have started, in a process group of its own. `said` is the last line that it printed."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path):
        """Start it. Raises VdusefastError."""
        self.name = name
        self._log = log
        with log.open("ab") as stream:
            try:
                self.process = subprocess.Popen(
                    list(arguments), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, process_group=0
                )
            except OSError as error:
                raise VdusefastError(f"{arguments[0]}: cannot be started: {error.strerror}") from None

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def check(self) -> None:
        """Raise VdusefastError, with the end of its log, when it has ended."""
        if not self.alive:
            raise VdusefastError(f"{self.name} ended with status {self.process.returncode}: {self.said}")

    @property
    def said(self) -> str:
        """The last line that it printed."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"

    def wait_for(self, what: str, ready: Callable[[], _T | None], timeout_s: float = START_S) -> _T:
        """Wait until `ready` returns something true, and return that. Raises VdusefastError when the server ends."""
        end = time.monotonic() + timeout_s
        while True:
            found = ready()
            if found:
                return found
            self.check()
            if time.monotonic() > end:
                raise TimedOutError(f"{self.name}: no {what} after {timeout_s:g} s: {self.said}")
            time.sleep(LOOK_S)

    def end(self) -> None:
        """Ask it to end, kill it if it does not, and wait for it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.alive:
                self.process.send_signal(number)
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                continue
            return
        raise VdusefastError(f"{self.name} (pid {self.process.pid}) was killed and is not gone")


def run_tool(arguments: Sequence[str]) -> str:
    """Run a program that ends by itself; return its output. Raises VdusefastError with its own message."""
    try:
        done = subprocess.run(
            list(arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TOOL_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimedOutError(f"{arguments[0]} did not end within {TOOL_S:g} s") from None
    except OSError as error:
        raise VdusefastError(f"{arguments[0]}: cannot be started: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()
        raise VdusefastError(f"{' '.join(arguments)}: status {done.returncode}: {said[-1]}")
    return done.stdout.strip()


def first_line(arguments: Sequence[str]) -> str:
    """Return the first line that a program prints, "" when it prints none or fails."""
    try:
        return run_tool(arguments).partition("\n")[0]
    except VdusefastError:
        return ""


def load_modules(names: Sequence[str]) -> None:
    """Load kernel modules, each if it is there: what is missing afterwards is said by those who need it."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    tool = shutil.which("modprobe", path=path)
    if tool is None:
        return
    for name in dict.fromkeys(names):
        # null_blk makes a device of its own unless told not to.
        arguments = [tool, name, *(["nr_devices=0"] if name == "null_blk" else [])]
        subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_S, check=False)
