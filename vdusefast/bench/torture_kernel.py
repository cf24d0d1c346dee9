"""The torture suite on a real disk of the kernel's.

The device is added as `vdusefast add` does, and taken over as `vdusefast recover` does; whoever writes to /dev/vdX is a
thread for each slice of it, with O_DIRECT and a journal of its own. Which queue a request goes through is the kernel's
choice, so that a pause is the longest that any thread has seen.
"""

from __future__ import annotations

import array
import mmap
import os
import random
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from vdusefast import _driver, run_dir
from vdusefast.bench import block_node
from vdusefast.bench.torture_load import ERRORS, Lost, compare_block
from vdusefast.bench.torture_plan import TortureOptions
from vdusefast.bench.torture_report import Findings
from vdusefast.bench.torture_scene import Scene
from vdusefast.bench.torture_server import LOG_TAIL_LINES, ServerError, TorturedServer
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.errors import VdusefastError
from vdusefast.signals import StopSignals

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN_S = 0.3
READ_SHARE = 0.3
FSYNC_EVERY = 16  # requests of one thread
THREADS_A_QUEUE = 2
CHECK_BLOCKS = 32  # read at once when everything is read back
STOP_TIMEOUT_S = 60.0
LOST_KEPT_MAX = 100  # of one writer in one cycle
START_LOOK_S = 0.005


def torture_kernel(options: TortureOptions, uri: str, findings: Findings, signals: StopSignals, log: TextIO) -> None:
    """Torture a disk of the kernel's. Raises VdusefastError."""
    config = make_config(
        name=f"torture-{os.getpid()}",
        uri=f"file:{Path(uri.removeprefix('file:')).absolute()}",
        transport="kernel",
        queues=options.queues,
        queue_size=options.queue_size,
        engine=options.engine,
        cache=options.cache,
    )
    with ExitStack() as opened:
        server = opened.enter_context(KernelServer(resolve_cpus(config)))
        server.start(recover=False)
        load = DiskLoad(server.node, options, RUN_S)
        opened.callback(load.close)
        Scene(options, server, load, Path(config.backend.uri.removeprefix("file:")), RUN_S).torture(
            findings, signals, log
        )


class KernelServer(TorturedServer):
    """The server of a kernel device, in the background."""

    def __init__(self, config: Config):
        """Prepare; see `start`."""
        from vdusefast import registry

        self._path = registry.base_directory() / config.device.name
        super().__init__(self._path / "pages")
        self.node = ""
        self._config = config
        self._pid = 0

    @property
    def pid(self) -> int:
        """The supervisor's process."""
        return self._pid

    def start(self, *, recover: bool) -> None:
        """Start a server, as `add` or `recover` does. Raises ServerError when it does not serve."""
        from vdusefast import background
        from vdusefast.cli_recover import recover_dead

        self.start_count += 1
        try:
            if recover:
                info = recover_dead(self._path)
            else:
                info = background.start(self._config, self._config.device.attach_timeout_s + background.START_MARGIN_S)
        except VdusefastError as error:
            raise ServerError(str(error)) from error
        self._pid, self.node = int(info["pid"]), str(info["node"])

    def wait_ready(self) -> None:
        """Do nothing: `start` has waited."""

    def resize(self, size_bytes: int) -> None:
        """Ask it to, as `vdusefast resize` does."""
        from vdusefast.rpc_client import RpcClient

        try:
            with RpcClient(self._path) as client:
                client.call("resize", {"size_bytes": size_bytes, "force": True})
        except VdusefastError as error:
            raise ServerError(str(error)) from error

    def hand_over(self) -> None:
        """Start the next one, which asks it to, as `vdusefast restart` does."""
        from vdusefast import background

        self.start_count += 1
        limit_s = self._config.device.attach_timeout_s + background.START_MARGIN_S
        try:
            info = background.start(self._config, limit_s, mode=background.Mode.TAKE_OVER)
        except VdusefastError as error:
            raise ServerError(str(error)) from error
        self.reap()
        self._pid, self.node = int(info["pid"]), str(info["node"])

    def start_again(self, again_s: float, *, with_workers: bool) -> None:
        """Start the next server; when that one is to be killed, too, do it from a thread while it is waited for."""
        if again_s < 0:
            self.start(recover=True)
            return
        killed = threading.Event()
        killer = threading.Thread(target=self._kill_starting, args=(again_s, with_workers, killed))
        killer.start()
        try:
            self.start(recover=True)
        except ServerError:
            killer.join()
            if not killed.is_set():
                raise
            self.start(recover=True)
        else:
            killer.join()
            if killed.is_set():  # it had just begun to serve
                self.reap()
                self.start(recover=True)

    def stop(self) -> None:
        """Remove the device. Raises ServerError."""
        from vdusefast.rpc_client import RpcClient

        try:
            with RpcClient(self._path) as client:
                client.call("delete")
            self.reap()
        except VdusefastError as error:
            raise ServerError(str(error)) from error

    def close(self) -> None:
        """Remove the device by force if it is still there."""
        if not self._path.is_dir():
            return
        from vdusefast import cli

        cli.run(["del", self._config.device.name, "--force"])
        if self._pid:
            _reap(self._pid, STOP_TIMEOUT_S)
            self._pid = 0

    def reap(self) -> None:
        """Wait for its end: it is a child of ours."""
        if self._pid and not _reap(self._pid, STOP_TIMEOUT_S):
            raise ServerError(f"pid {self._pid} did not end in {STOP_TIMEOUT_S:g} s")

    def last_words(self) -> str:
        """Return the end of its log."""
        try:
            lines = (self._path / "log").read_text(errors="replace").splitlines()
        except OSError as error:
            return f"no log: {error.strerror}"
        return "; ".join(lines[-LOG_TAIL_LINES:]) or "it has said nothing"

    def _kill_starting(self, again_s: float, with_workers: bool, killed: threading.Event) -> None:
        """Kill the server that holds the run directory next, `again_s` after it has taken it."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            pid = run_dir.holder_pid(self._path)
            if pid and pid != self._pid and run_dir.is_held(self._path):
                break
            time.sleep(START_LOOK_S)
        else:
            return
        time.sleep(again_s)
        workers = self._workers_of(pid) if with_workers else []
        for one in (pid, *workers):
            try:
                os.kill(one, signal.SIGKILL)
                killed.set()
            except ProcessLookupError:
                continue

    def _workers_of(self, pid: int) -> list[int]:
        import psutil

        try:
            return [child.pid for child in psutil.Process(pid).children()]
        except psutil.NoSuchProcess:
            return []


def _reap(pid: int, timeout_s: float) -> bool:
    """Wait for the end of a child. Returns whether it has come."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return True
        except ChildProcessError:
            return True  # reaped already
        time.sleep(START_LOOK_S)
    return False


class DiskLoad:
    """Writers on slices of a disk."""

    def __init__(self, node: str, options: TortureOptions, run_s: float):
        """Open the node. Raises VdusefastError."""
        count = options.queues * THREADS_A_QUEUE
        blocks = options.area_bytes(block_node.size_bytes(node)) // options.block_bytes // count
        slice_bytes = blocks * options.block_bytes
        self._give_up_s = options.give_up_s
        self._run_s = run_s
        try:
            self._fd = os.open(node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            raise VdusefastError(f"{node}: {error.strerror}") from None
        seed = int.from_bytes(os.urandom(4), "little") | 1
        self._writers = [
            _Writer(self._fd, place * slice_bytes, slice_bytes, options.block_bytes, seed, options.seed + place)
            for place in range(count)
        ]

    def close(self) -> None:
        """Close the node and free the buffers."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for writer in self._writers:
            writer.close()

    def begin(self) -> DiskCycle:
        """Start a cycle: the load runs when this returns."""
        return DiskCycle(self._writers, self._run_s, self._give_up_s)

    def forget_gaps(self) -> None:
        """Begin to measure how long the disk keeps its writers waiting."""
        for writer in self._writers:
            writer.gap_s = 0.0

    def gaps_s(self, queue: int | None) -> tuple[float, float | None]:
        """Return the longest wait of any writer; nobody knows which queue it waited for."""
        return max(writer.gap_s for writer in self._writers), None

    def new_faults(self, *, errors_expected: bool = False) -> list[Lost]:
        """Return what the writers have found wrong in the last cycle. errors_expected: errors of the disk are not."""
        lost = [one for writer in self._writers for one in writer.lost]
        if errors_expected:
            lost = [one for one in lost if one.what not in ERRORS]
        for writer in self._writers:
            writer.lost = []
        return lost

    def counts(self) -> dict[str, int]:
        """Return what has been done so far."""
        names = ("writes", "reads", "flushes", "verified")
        return {name: sum(writer.counts[name] for writer in self._writers) for name in names}

    def check_store(self, path: Path) -> tuple[int, list[Lost]]:
        """Compare the journals with the file behind the device."""
        count, lost = 0, []
        with path.open("rb") as file:
            for writer in self._writers:
                for place, generation in enumerate(writer.journal):
                    if not generation:
                        continue
                    at = writer.offset + place * writer.block_bytes
                    block = os.pread(file.fileno(), writer.block_bytes, at)
                    lost += compare_block(block, at, generation, writer.seed, "store")
                    count += 1
        return count, lost


class DiskCycle:
    """One run of all writers, a thread each."""

    def __init__(self, writers: list[_Writer], run_s: float, give_up_s: float):
        self._give_up_s = give_up_s
        self._struck = threading.Event()
        words = (time.monotonic() + run_s, self._struck)
        # Daemons: one that waits in the kernel for its disk must not keep us from ending.
        self._threads = [threading.Thread(target=writer.run, args=words, daemon=True) for writer in writers]
        for thread in self._threads:
            thread.start()

    def struck(self) -> None:
        """Let the load end when its time is up: a blow that falls late, on a busy CPU, is to meet it all the same."""
        self._struck.set()

    def finish(self) -> list[Lost]:
        """Wait for the end of the run and of its read-back. Returns what was never answered."""
        self.struck()
        deadline = time.monotonic() + self._give_up_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        waiting = sum(thread.is_alive() for thread in self._threads)
        if not waiting:
            return []
        return [Lost("unanswered", "driver", text=f"{waiting} writers wait since {self._give_up_s:g} s")]

    def abandon(self) -> None:
        """Leave the threads to their disk, which fails their requests when it is removed."""
        self.struck()


class _Writer:
    """Writes and reads single blocks of a slice, and knows what each of them must hold."""

    def __init__(self, fd: int, offset: int, size: int, block_bytes: int, seed: int, order_seed: int):
        self.offset = offset
        self.block_bytes = block_bytes
        self.seed = seed
        self.journal = array.array("I", bytes(4 * (size // block_bytes)))  # generation of the last acknowledged write
        self.lost: list[Lost] = []
        self.gap_s = 0.0
        self.counts = dict.fromkeys(("writes", "reads", "flushes", "verified"), 0)
        self._fd = fd
        self._numbers = random.Random(order_seed)  # noqa: S311 (where to write)
        self._generation = 0
        self._buffer = mmap.mmap(-1, CHECK_BLOCKS * block_bytes)  # O_DIRECT wants it aligned

    def close(self) -> None:
        """Free the buffer."""
        self._buffer.close()

    def run(self, until: float, struck: threading.Event) -> None:
        """Write and read until that moment and that event, then read everything back."""
        try:
            while time.monotonic() < until or not struck.is_set():
                try:
                    self._one()
                except OSError as error:
                    self._note(error)
            self._flush()
            for first in range(0, len(self.journal), CHECK_BLOCKS):
                self._read(first, min(CHECK_BLOCKS, len(self.journal) - first))
        except OSError as error:
            self._note(error)

    def _note(self, error: OSError) -> None:
        if len(self.lost) < LOST_KEPT_MAX:
            self.lost.append(Lost("status", "driver", text=f"the disk has said {error.strerror}"))

    def _one(self) -> None:
        place = self._numbers.randrange(len(self.journal))
        if self._numbers.random() < READ_SHARE:
            self._read(place, 1)
            self.counts["reads"] += 1
            return
        self._generation += 1
        at = self.offset + place * self.block_bytes
        with memoryview(self._buffer) as whole, whole[: self.block_bytes] as block:
            _driver.fill_block(block, at, self._generation, self.seed)
            self.journal[place] = 0  # should it fail, nobody knows
            with self._timed():
                done = os.pwritev(self._fd, [block], at)
        if done != self.block_bytes:
            raise OSError(0, f"{done} bytes written of {self.block_bytes}")
        self.journal[place] = self._generation
        self.counts["writes"] += 1
        if self.counts["writes"] % FSYNC_EVERY == 0:
            self._flush()

    def _flush(self) -> None:
        with self._timed():
            os.fsync(self._fd)
        self.counts["flushes"] += 1

    def _read(self, first: int, count: int) -> None:
        """Read blocks and compare those that were written."""
        size = count * self.block_bytes
        with memoryview(self._buffer) as whole, whole[:size] as part, self._timed():
            done = os.preadv(self._fd, [part], self.offset + first * self.block_bytes)
        if done != size:
            raise OSError(0, f"{done} bytes read of {size}")
        for index in range(count):
            generation = self.journal[first + index]
            if generation:
                block = self._buffer[index * self.block_bytes : (index + 1) * self.block_bytes]
                at = self.offset + (first + index) * self.block_bytes
                self.lost += compare_block(block, at, generation, self.seed, "driver")
                self.counts["verified"] += 1

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.gap_s = max(self.gap_s, time.monotonic() - begin)
