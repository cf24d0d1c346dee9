"""blktests, from a built checkout of its repository: the tests of its block group that take a disk."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import guest
from guest import MIB
from side_by_side import FAILED, NOT_RUN, PASSED, Place, Verdict, attempt

GROUP = "block"
MODULES = ("bfq", "kyber-iosched")  # schedulers besides mq-deadline, where the kernel has them
SIZE_BYTES = 1024 * MIB  # what its jobs of fio read
TEST_S = 10  # how long a test with a time limit of its own works
LIMIT_S = 240.0


def names(checkout: Path) -> list[str]:
    """Return the tests that take a disk, in order. The others bring one of their own (null_blk, scsi_debug, ublk)."""
    paths = sorted((checkout / "tests" / GROUP).glob("[0-9][0-9][0-9]"))
    return [f"{GROUP}/{path.name}" for path in paths if "\ntest_device()" in path.read_text()]


def run(place: Place, checkout: Path, chosen: Sequence[str]) -> Iterator[Verdict]:
    """Test the first disk of a place."""
    for module in MODULES:
        guest.attempt("modprobe", module)
    config = place.directory / "config"
    config.write_text(f"TEST_DEVS=({place.nodes[0]})\n")
    for name in chosen or names(checkout):
        yield _run_one(place, checkout, config, name)


def _run_one(place: Place, checkout: Path, config: Path, name: str) -> Verdict:
    words = ["./check", "-c", config, "-o", place.directory / "results", f"--quick={TEST_S}", name]
    started_s = time.monotonic()
    status, said = attempt(words, LIMIT_S, directory=checkout)
    took_s = time.monotonic() - started_s
    if status is None:
        return Verdict(name, FAILED, took_s, f"no end within {LIMIT_S:g} s: {said}")
    found = re.findall(r"\[(passed|failed|not run)\]$", said, re.MULTILINE)
    detail = "\n".join(line.strip() for line in said.splitlines() if line.startswith("    "))
    for result in (FAILED, PASSED, NOT_RUN):  # a test may run in more than one way
        if result in found:
            return Verdict(name, result, took_s, "" if result == PASSED else detail)
    return Verdict(name, FAILED, took_s, f"no verdict: {said}")
