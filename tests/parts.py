"""Run the whole suite in parts side by side, as `make test` does. Arguments go to pytest: --durations=20, -m "not vm".

Each part is a pytest of its own, `pytest --part NAME`, and each test belongs to one part. Side by side they keep the
CPUs busy: a guest computes, while most other tests wait. Each line of a part's output begins with its name. The report
of a part that fails is printed whole at the end.

With --fast first, as `make check` does: the tests that take little time, in parts by their files, each `pytest --fast`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent
NEWEST_KERNEL = "7.3"
NOT_COLLECTED = 5  # pytest's exit status where no test was chosen
# Where the tests of a part are; those that belong to another part are left out. The longest part is the first.
PARTS = {
    "newest": ("tests/vm/test_scenarios.py",),
    "guests": ("tests/vm",),
    "rings": ("tests/datapath",),
    "servers": ("tests",),
}
# Checks of the newest kernel that a second guest of it runs in the part of the others, so that both take about as long.
SHARED = ("many.", "documents.", "kernel_log.")
FAST_PARTS = 4  # more than CPUs: many tests wait


def fast_parts() -> dict[str, tuple[str, ...]]:
    """Return the parts of the fast tests. Each has its share of the files, so that it imports no others."""
    files = sorted(str(path.relative_to(TESTS.parent)) for path in TESTS.rglob("test_*.py"))
    return {f"fast {n}": ("--fast", "-q", *files[n::FAST_PARTS]) for n in range(FAST_PARTS)}


def part_of(path: Path, kernel: object, check: object = None) -> str:
    """Return the part of a test, by its file, and by kernel and name of a check in a guest."""
    words = path.relative_to(TESTS).parts
    if words == ("vm", "test_scenarios.py") and kernel == NEWEST_KERNEL and not str(check).startswith(SHARED):
        return "newest"
    if words[0] == "vm" and words[-1] != "test_rbd_guest.py":  # that one shares the Ceph cluster of tests/rbd
        return "guests"
    return "rings" if words[0] == "datapath" else "servers"


class Part:
    """A pytest that runs. Its output appears as it comes, except for its report."""

    def __init__(self, name: str, words: Sequence[str], directory: Path) -> None:
        self.name = name
        self.failed = False
        self.report: list[str] = []
        self._started_s = time.monotonic()
        self._process = subprocess.Popen(
            # Ends when we are killed, and with it what it has started.
            ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "pytest", *words],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C reaches us alone, and we pass it on
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if self.report or (line.startswith("=") and "test session starts" not in line):
                self.report.append(line)
            elif line.strip():
                self._say(line.rstrip())

    def _say(self, text: str) -> None:
        print(f"{self.name:8}| {text}", flush=True)

    def interrupt(self) -> None:
        """Stop it as Ctrl-C does, unless it has ended. Not by send_signal(), which reaps what `wait` will ask for."""
        if self._process.returncode is None:
            os.kill(self._process.pid, signal.SIGINT)

    def wait(self) -> None:
        """Wait for its end, and say how it went."""
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._reader.join()
        self.failed = self._process.returncode not in (0, NOT_COLLECTED)
        minutes, seconds = divmod(int(time.monotonic() - self._started_s), 60)
        cpu_s = usage.ru_utime + usage.ru_stime
        said = self.report[-1].strip("=\n ") if self.report else f"exit status {self._process.returncode}"
        self._say(f"{minutes}:{seconds:02} minutes, {cpu_s:.0f} s of CPU time: {said}")


def run(parts: Mapping[str, Sequence[str]], directory: Path) -> int:
    """Run pytest with the arguments of each part, in `directory`; returns the exit status."""
    started: list[Part] = []
    before = signal.signal(signal.SIGINT, lambda *_: [part.interrupt() for part in started])
    started += [Part(name, words, directory) for name, words in parts.items()]
    for part in started:
        part.wait()
    signal.signal(signal.SIGINT, before)
    failed = [part for part in started if part.failed]
    for part in failed:
        print(f"\n{part.name}\n{''.join(part.report)}", flush=True)
    return 1 if failed else 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    if arguments[:1] == ["--fast"]:
        chosen = fast_parts()
        arguments = arguments[1:]
    else:
        chosen = {name: ("--part", name, *where) for name, where in PARTS.items()}
    return run({name: (*part, *arguments) for name, part in chosen.items()}, TESTS.parent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
