"""A run of fio that a person or a program reads: its output passes unchanged, the device is watched meanwhile."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TextIO

from vdusefast.base.columns import terminal_width, wrap
from vdusefast.base.json_types import Json
from vdusefast.bench.common.real_fio import FINISH_S, TICK_S, FioProcess, readable
from vdusefast.bench.fio.output import JsonStream
from vdusefast.bench.fio.script import Script
from vdusefast.errors import BackendError, VdusefastError
from vdusefast.server.signals import StopSignals

MEMBER = "vdusefast"
PATIENCE_S = 2.0  # after a signal: people learn what they wait for
CHUNK_BYTES = 1 << 16


class Shown:
    """Where fio's output goes, and in which formats; `Json` of ours can be added to it."""

    def __init__(self, script: Script):
        """Learn it from the options of fio itself."""
        formats = (script.option("output-format") or "normal").split(",")
        self.has_text = "normal" in formats and script.option("minimal") is None
        self.has_json = bool({"json", "json+"} & set(formats))
        output = script.option("output")
        self.file = Path(output) if output else None

    @property
    def keeps_stdout(self) -> bool:
        """Whether stdout has fio's text alone or nothing of fio's, so that notes may stand there, too."""
        return (self.has_text and not self.has_json) or self.file is not None

    def add(self, member: Json) -> None:
        """Add our member to the file of --output, when it has JSON. Raises BackendError."""
        if self.file is None or not self.has_json:
            return
        try:
            with self.file.open("r+b") as stream:
                out = BytesIO()
                passed = JsonStream(out)
                passed.write(stream.read())
                passed.finish(MEMBER, member)
                stream.seek(0)
                stream.write(out.getvalue())
        except OSError as error:
            raise BackendError(f"--output {self.file}: {error.strerror}") from None

    @property
    def width(self) -> int | None:
        """The columns for text after fio's, None for no limit."""
        return terminal_width(self._notes) if self.file is None else None

    def say(self, text: str) -> None:
        """Tell the person who waits, without mixing it into what a program reads."""
        width = terminal_width(self._notes)
        print("\n".join(wrap(line, width, 2) for line in text.split("\n")), file=self._notes, flush=True)

    @property
    def _notes(self) -> TextIO:
        return sys.stdout if self.keeps_stdout else sys.stderr

    def append(self, text: str) -> None:
        """Put text after fio's. Raises BackendError."""
        if self.file is None:
            print(text, end="", file=self._notes, flush=True)
            return
        if not self.has_text or self.has_json:
            return
        try:
            with self.file.open("a") as stream:
                stream.write(text)
        except OSError as error:
            raise BackendError(f"--output {self.file}: {error.strerror}") from None


@contextmanager
def running_on(cpus: Sequence[int]) -> Iterator[None]:
    """Have processes that this thread starts meanwhile run on these CPUs; empty: on any."""
    before = os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_shown(
    arguments: Sequence[str],
    shown: Shown,
    *,
    environment: Mapping[str, str],
    cpus: Sequence[int],
    signals: StopSignals,
    tick: Callable[[], None],
    say: Callable[[str], None],
    member: Callable[[int], Json],
) -> int:
    """Run fio to its end and return its status, negative when a signal ended it.

    signals: one lets it finish and report within FINISH_S, a second one ends it. tick: called ten times a second; an
    exception of it ends fio. say: tells the person who waits. member: asked with the status once fio has ended; it may
    raise. Whatever fails, what fio has printed reaches stdout. Raises VdusefastError, FioStuckError.
    """
    sys.stdout.flush()
    piped = shown.has_json and shown.file is None
    read_fd, write_fd = os.pipe() if piped else (-1, -1)
    stream = JsonStream(sys.stdout.buffer)
    try:
        with _started(arguments, write_fd if piped else 1, environment, cpus) as fio:
            if piped:
                os.close(write_fd)
                write_fd = -1
            status = _follow(fio, read_fd, stream, signals, tick, say)
        if piped:
            _read_rest(read_fd, stream)
        added = member(status)
        if piped:
            stream.finish(MEMBER, added)
    except BaseException:
        with suppress(OSError):  # nobody reads it, or there is no space
            if piped:
                _read_rest(read_fd, stream)
            stream.release()
        raise
    finally:
        for fd in (read_fd, write_fd):
            if fd >= 0:
                os.close(fd)
    shown.add(added)
    return status


def _read_rest(read_fd: int, stream: JsonStream) -> None:
    """Pass on what a fio that has ended left in the pipe. Programs that it started may hold the pipe for ever."""
    os.set_blocking(read_fd, False)
    with suppress(BlockingIOError):
        while data := os.read(read_fd, CHUNK_BYTES):
            stream.write(data)


def _started(arguments: Sequence[str], out_fd: int, environment: Mapping[str, str], cpus: Sequence[int]) -> FioProcess:
    with running_on(cpus):
        return FioProcess(arguments, out_fd=out_fd, environment=environment)


def _follow(
    fio: FioProcess,
    read_fd: int,
    stream: JsonStream,
    signals: StopSignals,
    tick: Callable[[], None],
    say: Callable[[str], None],
) -> int:
    end = patience_ends = math.inf
    while not fio.wait(TICK_S, read_fd, signals.fileno() if end == math.inf else -1):
        if readable(read_fd) and (data := os.read(read_fd, CHUNK_BYTES)):
            stream.write(data)
        tick()
        now = time.monotonic()
        if end == math.inf and signals.requested:
            end, patience_ends = now + FINISH_S, now + PATIENCE_S
            fio.interrupt()
        if signals.repeated:
            raise VdusefastError("fio was killed before it had finished, because a second signal came")
        if now > end:
            raise VdusefastError(f"fio did not end within {FINISH_S:.0f} s after the signal and was killed")
        if now > patience_ends:
            patience_ends = math.inf
            say(
                f"fio is finishing its requests; it is killed {FINISH_S:.0f} s after the signal, and at once when you "
                "press Ctrl-C again"
            )
    return fio.status()
