"""The same tests on disks of ours and on loop devices of the same size, and a table of how they went."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import guest

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
OURS, LOOP = "ours", "loop"
LOOP_MARK = "guest: loop devices from here on"  # in the kernel log
KILL_S = 20.0
DETAIL_MAX = 1500
NOTE_COLUMNS = 90


@dataclass(frozen=True)
class Verdict:
    """How one test ended on one kind of disk. `detail` says why it failed or was not run."""

    test: str
    result: str
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Place:
    """Two disks to test on, and a directory that is empty at first."""

    name: str
    nodes: tuple[str, str]
    directory: Path


class NotRunError(Exception):
    """A test cannot run here; says why."""


class StuckError(Exception):
    """A process cannot be killed: nothing after it would tell anything."""


def attempt(
    words: Iterable[object],
    limit_s: float,
    *,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[int | None, str]:
    """Run a command; returns its exit status, None where it was killed after `limit_s`, and all that it printed.

    What it has started and left behind is killed as well. Raises StuckError where it cannot be killed.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=directory,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit_s)
        status = process.returncode
        kill(process)
        said.seek(0)
        return status, said.read()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its session's group. Raises StuckError where it does not end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(KILL_S)
    except subprocess.TimeoutExpired:
        raise StuckError(f"{process.args!r} cannot be killed:\n{guest.where_processes_wait()}") from None


def succeed(words: Iterable[object], limit_s: float) -> str:
    """Run a command that must succeed and return what it printed. Raises AssertionError."""
    words = [str(word) for word in words]
    status, said = attempt(words, limit_s)
    ended = f"status {status}" if status is not None else f"no end within {limit_s:g} s"
    assert status == 0, f"{' '.join(words)}: {ended}: {said[-DETAIL_MAX:]}"
    return said


def judged(test: str, function: Callable[[], object]) -> Verdict:
    """Call a function that raises AssertionError where its test fails, and NotRunError where it cannot run."""
    started_s, result, detail = time.monotonic(), PASSED, ""
    try:
        function()
    except (AssertionError, subprocess.TimeoutExpired) as error:
        result, detail = FAILED, str(error)
    except NotRunError as error:
        result, detail = NOT_RUN, str(error)
    return Verdict(test, result, time.monotonic() - started_s, detail)


@contextlib.contextmanager
def our_disks(size_bytes: int) -> Iterator[tuple[str, str]]:
    """Serve two disks with two queues each, over files in memory."""
    with (
        guest.device("vd0", f"file:{guest.image('one.img', size_bytes)}", queues=2) as one,
        guest.device("vd1", f"file:{guest.image('two.img', size_bytes)}", queues=2) as two,
    ):
        yield one, two


@contextlib.contextmanager
def loop_disks(size_bytes: int) -> Iterator[tuple[str, str]]:
    """Have two loop devices over such files."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for name in ("one.img", "two.img"):
            nodes.append(guest.sh("losetup", "--find", "--show", guest.image(name, size_bytes)).strip())
            stack.callback(guest.sh, "losetup", "--detach", nodes[-1])
        yield nodes[0], nodes[1]


def compare(suite: Callable[[Place], Iterable[Verdict]], size_bytes: int) -> int:
    """Run a suite on disks of ours, then on loop devices, and print its verdicts. Returns the exit status."""
    found: dict[str, dict[str, Verdict]] = {}
    for name, disks in ((OURS, our_disks), (LOOP, loop_disks)):
        if name == LOOP:
            Path("/dev/kmsg").write_text(f"{LOOP_MARK}\n")
        directory = guest.WORK / name
        directory.mkdir()
        with disks(size_bytes) as nodes:
            for verdict in suite(Place(name, nodes, directory)):
                found.setdefault(verdict.test, {})[name] = verdict
                why = " ".join(verdict.detail.split())[:DETAIL_MAX]
                print(
                    f"{name}  {verdict.result:7} {verdict.seconds:6.1f} s  {verdict.test}  {why}".rstrip(), flush=True
                )
    return report(found)


def report(found: Mapping[str, Mapping[str, Verdict]]) -> int:
    """Print the table, with the whole story of each failure; returns 0 when nothing fails on ours alone."""
    width = max(map(len, found), default=0)
    print(f"\n{'test':{width}}  {'ours':7}        s  {'loop':7}        s  verdict")
    alone, on_both, stories = [], [], []
    for test, verdicts in found.items():
        ours, loop = (verdicts.get(name, Verdict(test, NOT_RUN, 0, "not reached")) for name in (OURS, LOOP))
        said = f"{ours.result} on both" if ours.result == loop.result != NOT_RUN else ""
        if ours.result == FAILED != loop.result:
            alone.append(test)
            said = "FAILS ON OURS ALONE"
        elif ours.result == loop.result == PASSED:
            on_both.append(test)
        if not said:
            said = " ".join((ours.detail or loop.detail).split())[:NOTE_COLUMNS]
        print(
            f"{test:{width}}  {ours.result:7} {ours.seconds:8.1f}  {loop.result:7} {loop.seconds:8.1f}  {said}".rstrip()
        )
        stories += [
            f"\n{test} failed on {name}: {verdict.detail[-DETAIL_MAX:]}"
            for name, verdict in verdicts.items()
            if verdict.result == FAILED
        ]
    print(*stories, sep="\n")
    print(f"\n{len(on_both)} of {len(found)} tests pass on both; on ours alone fail: {', '.join(alone) or 'none'}")
    if 2 * len(on_both) < len(found):
        print("fewer than half of the tests pass on both: that shows nothing")
        return 1
    return 1 if alone else 0
