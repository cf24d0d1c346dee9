"""Storage in trouble: a full file system, and one that does not answer. The device says so, and continues."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import guest
from checks import check
from guest import MIB
from hanging_store import hanging_store

SMALL = guest.WORK / "small"


@contextlib.contextmanager
def small_tmpfs(size_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs of that size."""
    SMALL.mkdir(exist_ok=True)
    guest.sh("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", SMALL)
    try:
        yield SMALL
    finally:
        guest.sh("umount", SMALL)


def counters() -> dict[str, int]:
    """Return the sums over all queues of vd0."""
    return dict(guest.call("vd0", "stats")["total"])  # type: ignore[call-overload]


@check(limit_s=90)
def full_file_system() -> dict[str, object]:
    """Writes fail while there is no space, reads and the rest go on, and writes succeed once there is space again."""
    source = guest.WORK / "source"
    source.write_bytes(os.urandom(8 * MIB))
    with small_tmpfs(12 * MIB) as directory:
        image, ballast = directory / "disk.img", directory / "ballast"
        ballast.write_bytes(bytes(8 * MIB))
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        with guest.device("vd0", f"file:{image}", queues=2) as node:
            words = ["dd", f"if={source}", f"of={node}", "bs=1M", "oflag=direct"]
            done = guest.attempt(*words)
            assert done.returncode != 0, "there is no space for that"
            assert "Input/output error" in done.stderr or "No space left" in done.stderr, done.stderr
            full = counters()
            assert full["host_enospc"] > 0, full
            assert full["errors"] == full["host_errors"] == full["host_enospc"], full
            guest.sh("dd", f"if={node}", "of=/dev/null", "bs=1M", "iflag=direct")
            assert guest.info("vd0")["failure"] == "", guest.info("vd0")
            ballast.unlink()
            guest.sh(*words, "conv=fsync")
            assert counters()["host_errors"] == full["host_errors"], counters()
            assert image.read_bytes()[: 8 * MIB] == source.read_bytes()
    source.unlink()
    return {"said": done.stderr.splitlines()[0], "host_enospc": full["host_enospc"]}


@check(limit_s=120)
def store_that_hangs_is_named() -> dict[str, object]:
    """`show` names the queue that waits and since when; messages are answered; all continues when the store does."""
    with hanging_store(32 * MIB) as store, guest.device("vd0", f"file:{store.node}", queues=2, cache="none") as node:
        store.hang()
        words = ["dd", "if=/dev/zero", f"of={node}", "bs=4k", "count=4", "oflag=direct"]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as dd:
            try:
                guest.wait_for("a queue that waits", waiting, 20)
                text = guest.vdusefast("show", "vd0")
                index, seconds = waiting()[0]
                assert f"queue {index} waits for its storage since " in text, text
                assert f"queue {index} waits " in guest.vdusefast("list")
                assert seconds >= 1.0
                assert dd.poll() is None, "dd has ended"
            finally:
                store.go_on()
            assert dd.wait(30) == 0, "dd has failed"
        guest.wait_for("the queue to go on", lambda: not waiting())
        assert counters()["errors"] == 0, counters()
    return {"said": next(line.strip() for line in text.splitlines() if "waits" in line)}


def waiting() -> list[tuple[int, float]]:
    """Return the queues of vd0 that wait for their storage, and for how long."""
    queues = guest.info("vd0")["queues"]
    return [(queue["index"], queue["waiting_s"]) for queue in queues if queue["waiting_s"]]  # type: ignore[attr-defined]
