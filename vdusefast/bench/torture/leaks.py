"""The descriptors and children of processes, before and after."""

from __future__ import annotations

import time

import psutil

from vdusefast.bench.torture.server import TorturedServer

SETTLE_S = 5.0  # for what was told to end, on a busy machine
LOOK_S = 0.02


class Leaks:
    """The descriptors and children of this process, and of the server if there is one, at one moment."""

    def __init__(self, server: TorturedServer | None = None):
        self._before = _counts(server)

    def left(self, server: TorturedServer | None = None) -> list[str]:
        """Return a line for each thing of which there is more now, once it had time to end."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            now = _counts(server)
            more = [
                f"{now[what] - count} more {what}: {now[what]}, was {count}"
                for what, count in self._before.items()
                if now.get(what, 0) > count
            ]
            if not more or time.monotonic() > deadline:
                return more
            time.sleep(LOOK_S)


def _counts(server: TorturedServer | None) -> dict[str, int]:
    """Return how many descriptors and children there are."""
    ours = psutil.Process()
    counts = {
        "descriptors of this process": ours.num_fds(),
        "processes below this one": len(ours.children(recursive=True)),
        "threads of this process": ours.num_threads(),
    }
    if server is not None:
        try:
            theirs = psutil.Process(server.pid)
            counts["descriptors of the server"] = theirs.num_fds()
            counts["workers of the server"] = len(theirs.children())
        except psutil.NoSuchProcess:
            counts["descriptors of the server"] = counts["workers of the server"] = 0
    return counts
