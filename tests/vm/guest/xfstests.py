"""xfstests, from a built checkout of its repository: a part of its quick group, and its fsx and fsstress alone."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import guest
from guest import MIB
from scenario_filesystem import MOUNT, mounted
from side_by_side import FAILED, NOT_RUN, PASSED, Place, Verdict, judged, kill, succeed

SIZE_BYTES = 1024 * MIB  # of each disk
LIMIT_S = 240.0  # of each test
MAKE = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
FSCK = {"ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n")}
# Of the quick group: what reaches the disk, and does not take minutes on an emulated machine.
TESTS = (
    *("015", "029", "098", "135"),  # a full disk, mmap, kinds of writes
    *("198", "240", "538"),  # asynchronous and direct I/O
    "260",  # fstrim
    *("034", "056", "321"),  # what fsync has promised, by dm-flakey
    "042",  # the log after a shutdown
)
FSX_OPERATIONS = 2000
FSX = {
    "fsx": (),
    "fsx, direct": ("-Z", "-R", "-W", "-r", "4096", "-w", "4096", "-t", "4096"),
    "fsx, direct and asynchronous": ("-A", "-Z", "-R", "-W", "-r", "4096", "-w", "4096", "-t", "4096"),
}
FSSTRESS = ("-n", "300", "-p", "4", "-s", "7", "-m", "8")
STARTED = re.compile(r"^((?:generic|ext4|xfs)/\d+)\b(.*)$", re.MULTILINE)
SUMMARY = re.compile(r"^Ran: ", re.MULTILINE)
POLL_S = 0.5


def run(place: Place, file_system: str, checkout: Path, chosen: Sequence[str]) -> Iterator[Verdict]:
    """Test the disks of a place: the first holds a file system for all tests, the second is theirs to make new."""
    make = [*MAKE[file_system], place.nodes[0]]
    succeed(make, LIMIT_S)
    if not chosen:
        for name, words in FSX.items():
            yield judged(name, lambda words=words: fsx(place, checkout, words))
        yield judged("fsstress", lambda: fsstress(place, checkout))
        yield judged("fsck after these", lambda: succeed([*FSCK[file_system], place.nodes[0]], LIMIT_S))
    left = list(chosen or [f"generic/{number}" for number in TESTS])
    environment = prepare(place, file_system)
    while left:
        check = Check(place, checkout, environment, left)
        for verdict in check.follow():
            left.remove(verdict.test)
            yield verdict
        if left and not check.was_killed:
            raise AssertionError(f"./check ended without {' '.join(left)}:\n{check.said()}")
        clean_up(environment)
        succeed(make, LIMIT_S)


def fsx(place: Place, checkout: Path, words: Sequence[str]) -> None:
    """Random operations on a file, each compared with what the file has to hold."""
    with mounted(place.nodes[0]):
        common = ["-q", "-N", FSX_OPERATIONS, "-S", "7", "-P", place.directory]
        succeed([checkout / "ltp/fsx", *common, *words, MOUNT / "fsx"], LIMIT_S)


def fsstress(place: Place, checkout: Path) -> None:
    """Random operations on a tree of files by four processes."""
    with mounted(place.nodes[0]):
        directory = MOUNT / "fsstress"
        directory.mkdir()
        succeed([checkout / "ltp/fsstress", "-d", directory, *FSSTRESS], LIMIT_S)


def prepare(place: Place, file_system: str) -> dict[str, str]:
    """Return the environment of ./check. There is no udev here: what waits for it would wait for ever."""
    programs = place.directory / "programs"
    programs.mkdir()
    (programs / "udevadm").write_text("#!/bin/sh\n")
    (programs / "udevadm").chmod(0o755)
    (place.directory / "no-options").touch()
    mounts = {name: place.directory / name for name in ("test", "scratch")}
    for path in mounts.values():
        path.mkdir()
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "DM_DISABLE_UDEV": "1",
        "HOST_OPTIONS": str(place.directory / "no-options"),
        "RESULT_BASE": str(place.directory / "results"),
        "FSTYP": file_system,
        "TEST_DEV": place.nodes[0],
        "TEST_DIR": str(mounts["test"]),
        "SCRATCH_DEV": place.nodes[1],
        "SCRATCH_MNT": str(mounts["scratch"]),
    }


def clean_up(environment: dict[str, str]) -> None:
    """Free the disks again, also of what a killed test has left."""
    for name in ("TEST_DIR", "SCRATCH_MNT"):
        while os.path.ismount(environment[name]):
            guest.sh("umount", environment[name], timeout_s=60)
    guest.attempt("dmsetup", "remove_all", "--force", timeout_s=60)


@dataclass(frozen=True)
class Told:
    """What ./check has printed of one test so far."""

    test: str
    rest: str

    @property
    def result(self) -> str:
        """Return how the test ended, if it has."""
        first = self.rest.strip().partition("\n")[0]
        if "[not run]" in first or "[expunged]" in first:
            return NOT_RUN
        return PASSED if re.search(r"(^|\s)\d+s$", first) else FAILED


class Check:
    """A run of xfstests' ./check with some tests, whose output says how far it has come."""

    def __init__(self, place: Place, checkout: Path, environment: dict[str, str], tests: Sequence[str]):
        self._output = place.directory / "check.out"
        self.was_killed = False
        with self._output.open("wb") as output, (place.directory / "check.err").open("wb") as errors:
            self._process = subprocess.Popen(
                ["./check", *tests],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                cwd=checkout,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def said(self) -> str:
        """Return all that it has printed, up to its summary."""
        return SUMMARY.split(self._output.read_text(errors="replace"))[0]

    def told(self) -> list[Told]:
        """Return what it says of each test that it has begun."""
        said = self.said()
        found = list(STARTED.finditer(said))
        starts = [*(match.start() for match in found), len(said)]
        return [Told(match[1], said[match.start(2) : end]) for match, end in zip(found, starts[1:], strict=True)]

    def follow(self) -> Iterator[Verdict]:
        """Give the verdict of each test as it ends. One that takes too long ends the whole run."""
        done, since_s = 0, time.monotonic()
        while True:
            has_ended = self._process.poll() is not None  # asked first: its last line is there then
            told, now_s = self.told(), time.monotonic()
            for one in told[done : None if has_ended else -1]:
                yield Verdict(one.test, one.result, now_s - since_s, "" if one.result == PASSED else one.rest.strip())
                done, since_s = done + 1, now_s
            if has_ended:
                kill(self._process)
                return
            if now_s - since_s > LIMIT_S:
                self.was_killed = True
                kill(self._process)
                assert told, f"./check began no test within {LIMIT_S:g} s:\n{self.said()}"
                yield Verdict(told[-1].test, FAILED, now_s - since_s, f"no end within {LIMIT_S:g} s: {told[-1].rest}")
                return
            time.sleep(POLL_S)
