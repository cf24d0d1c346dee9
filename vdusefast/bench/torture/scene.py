"""The torture itself: cycles of load, one blow in each, and a look at everything afterwards."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from vdusefast.bench.torture.leaks import Leaks
from vdusefast.bench.torture.load import Lost
from vdusefast.bench.torture.plan import Blow, TortureOptions, blows
from vdusefast.bench.torture.progress import ProgressLine
from vdusefast.bench.torture.report import Findings
from vdusefast.bench.torture.server import ServerError, TorturedServer
from vdusefast.errors import ConfigError
from vdusefast.server.signals import StopSignals

_log = logging.getLogger("vdusefast")

LEAKS_EVERY = 25  # cycles between two looks at descriptors and processes
STORE_EVERY = 50  # cycles between two looks into the store
RESIZE_BYTES = 1 << 20  # a device grows by so much, and shrinks again; the load stays below


class Running(Protocol):
    """A cycle of a load that has begun."""

    def struck(self) -> None:
        """Note that the blow has fallen."""

    def finish(self) -> list[Lost]:
        """Wait for the end of the run and of its read-back. Returns the requests without an answer."""

    def abandon(self) -> None:
        """End it, whatever is in flight."""


class Load(Protocol):
    """The writer to the device, which knows the last acknowledged write of each block."""

    def begin(self) -> Running:
        """Start a cycle: some load, then a read-back of everything that was ever acknowledged."""

    def forget_gaps(self) -> None:
        """Begin to measure how long the device keeps the load waiting."""

    def gaps_s(self, queue: int | None) -> tuple[float, float | None]:
        """Return the longest wait since `forget_gaps`: of `queue`, if that can be told apart, and of the others."""

    def new_faults(self, *, errors_expected: bool = False) -> list[Lost]:
        """Return what has been found wrong in the last cycle. errors_expected: answers that are errors are not."""

    def check_store(self, path: Path) -> tuple[int, list[Lost]]:
        """Compare what is known with the file behind the device. Returns how many blocks were, and what is wrong."""

    def counts(self) -> dict[str, int]:
        """Return the counts so far: writes, reads, flushes, blocks verified."""

    def close(self) -> None:
        """Let go of the device."""


class Scene:
    """One device under load, and who harms its server."""

    def __init__(
        self, options: TortureOptions, server: TorturedServer, load: Load, store: Path | None, run_s: float
    ) -> None:
        """Take a server that serves. store: the file behind the device. run_s: of load in each cycle."""
        self._options = options
        self._server = server
        self._load = load
        self._store = store
        self._run_s = run_s
        self._numbers = random.Random(options.seed)  # noqa: S311 (what to kill when)
        self._leaks: Leaks | None = None

    def torture(self, findings: Findings, signals: StopSignals, log: TextIO) -> None:
        """Go through the blows, until one is too much. What is found goes into `findings`.

        Raises ConfigError for a process that is to be killed and that a device with this store does not have.
        """
        options = self._options
        for kind in ("relay", "keeper"):
            if options.kills.get(kind) and not self._server.side_pids(kind):
                raise ConfigError(f"--kills {kind}: a device with this store and these queues has none: leave it out")
        deadline = time.monotonic() + options.duration_s if options.duration_s else 0.0
        progress = ProgressLine(log, sum(options.kills.values()), options.duration_s)
        order = blows(options.kills, self._numbers, options.queues, self._run_s, for_ever=bool(deadline))
        try:
            self._warm_up(findings)
            for blow in order:
                if signals.requested or (deadline and time.monotonic() > deadline):
                    break
                is_well = self._cycle(blow, findings)
                progress.done(findings.cycles, len(findings.lost))
                if not is_well and not options.keep_going:
                    break
            self._end(findings)
        except ServerError as error:
            findings.failures.append(str(error))
        except ConfigError:
            raise
        except Exception as error:  # a fault of the suite: what was found until then is reported all the same
            _log.exception("the suite itself has failed")
            findings.failures.append(f"the suite itself has failed: {type(error).__name__}: {error}")
        finally:
            progress.end()
        findings.stopped_by = signals.received.name if signals.received is not None else ""
        findings.counts = self._load.counts()
        findings.starts = self._server.start_count

    def _warm_up(self, findings: Findings) -> None:
        """Run one cycle in peace: each of the others must leave the same processes and descriptors."""
        lost = self._load.begin().finish()
        findings.add_lost([*lost, *self._load.new_faults()])
        self._refuse_unanswered(lost)
        self._leaks = Leaks(self._server)

    def _cycle(self, blow: Blow, findings: Findings) -> bool:
        """Strike once while the load runs, and check everything. Returns whether all is well."""
        row = findings.row(blow.title)
        self._server.wait_worker(blow.queue)
        with self._running() as cycle:
            time.sleep(blow.delay_s)
            self._load.forget_gaps()
            self._strike(blow)
            cycle.struck()
            lost = cycle.finish()
        findings.cycles += 1
        pause_s, others_s = self._load.gaps_s(blow.queue if blow.kind == "worker" else None)
        row.pauses_s.append(pause_s)
        if others_s is not None:
            row.others_s.append(others_s)
        if lost:
            findings.add_lost([*lost, *self._load.new_faults()], row)
        self._refuse_unanswered(lost)
        lost = self._load.new_faults(errors_expected=blow.kind == "fail")
        if findings.cycles % STORE_EVERY == 0:
            lost += self._check_store(findings)
        findings.add_lost(lost, row)
        if findings.cycles % LEAKS_EVERY == 0 and self._leaks is not None:
            findings.leaks += self._leaks.left(self._server)
        return not findings.failed

    def _refuse_unanswered(self, lost: list[Lost]) -> None:
        """Raise ServerError when a cycle has left something behind.

        A request that is not answered occupies its place in the ring for ever: no load can follow.
        """
        if lost:
            raise ServerError(f"the device does not serve any more: {self._server.log_end()}")

    @contextmanager
    def _running(self) -> Iterator[Running]:
        cycle = self._load.begin()
        try:
            yield cycle
        except BaseException:
            cycle.abandon()
            raise

    def _strike(self, blow: Blow) -> None:
        """Do what `blow` says; the server is up again, or about to, when this returns. Raises ServerError."""
        server = self._server
        if blow.kind == "stall":
            server.stall(server.pid if blow.of_supervisor else server.wait_worker(blow.queue), blow.stall_s)
        elif blow.kind == "worker":
            pid = server.kill_worker(blow.queue)
            if blow.again_s >= 0:
                time.sleep(blow.again_s)
                server.kill_worker(blow.queue, not_pid=pid)
        elif blow.kind == "relay":
            pid = server.kill_side("relay")
            if blow.again_s >= 0:
                time.sleep(blow.again_s)
                server.kill_side("relay", not_pid=pid)
        elif blow.kind == "keeper":
            # The connections are lost with supervisor and keeper both, so that the next blow waits for the next keeper.
            server.wait_side("keeper", not_pid=server.kill_side("keeper"))
        elif blow.kind == "fail":
            server.fail_store(blow.stall_s)
        elif blow.kind == "restart":
            server.hand_over()
        elif blow.kind == "resize":
            assert self._store is not None
            size_bytes = self._store.stat().st_size
            server.resize(size_bytes + RESIZE_BYTES)
            server.resize(size_bytes)
        else:
            everything = blow.kind == "group"
            server.kill(with_workers=everything, workers_first=self._numbers.random() < 0.5)
            server.start_again(blow.again_s, with_workers=everything)

    def _check_store(self, findings: Findings) -> list[Lost]:
        if self._store is None:
            return []
        count, lost = self._load.check_store(self._store)
        findings.store_blocks += count
        return lost

    def _end(self, findings: Findings) -> None:
        """Read everything back once more, through the device and from its store, and let the server end."""
        lost = self._load.begin().finish()
        findings.add_lost([*lost, *self._load.new_faults()])
        if self._leaks is not None:
            findings.leaks += self._leaks.left(self._server)
        if lost:
            return
        self._load.close()
        self._server.stop()
        findings.add_lost(self._check_store(findings))
