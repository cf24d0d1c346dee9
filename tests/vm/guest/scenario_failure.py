"""A worker dies: another one takes its queue over, and nobody but the log notices."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import guest
from checks import check
from guest import MIB
from verified_fio import verified_fio, wait_for_writes

KILLS = 3


def queues(name: str) -> list[dict[str, object]]:
    """Return what is known of each queue."""
    return list(guest.info(name)["queues"])  # type: ignore[call-overload]


def wait_for_next(index: int, victim: int) -> None:
    """Wait until another worker than `victim` serves the queue."""

    def served() -> bool:
        queue = queues("vd0")[index]
        return queue["state"] == "running" and queue["pid"] not in (victim, -1)

    guest.wait_for("the next worker", served, 20)


@check(limit_s=120)
def idle_worker_killed() -> dict[str, object]:
    """It is replaced, and its bytes are there still; the other queue's worker stays. `show` counts it."""
    with guest.device("vd0", f"file:{guest.image('failure.img', 16 * MIB)}", queues=2) as node:
        guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=64k", "count=16", "oflag=direct")
        victim, other = (int(str(queue["pid"])) for queue in queues("vd0"))
        before = guest.checksum(node)
        os.kill(victim, signal.SIGKILL)
        wait_for_next(0, victim)
        shown = guest.show("vd0")
        replaced, kept = shown["queues"]  # type: ignore[misc]
        assert (kept["pid"], kept["restarts"], replaced["restarts"]) == (other, 0, 1), shown["queues"]
        assert (shown["state"], shown["failure"]) == ("running", ""), shown
        Path("/proc/sys/vm/drop_caches").write_text("1")
        assert guest.checksum(node) == before
        return dict(replaced)


@check(limit_s=150)
def worker_killed_under_load() -> dict[str, float]:
    """Again and again: what it had in flight is finished by the next one."""
    node = guest.fork_server("vd0", f"file:{guest.image('failure.img', 64 * MIB)}", queues=2)
    with verified_fio(node) as found:
        for _ in range(KILLS):
            busy = max(queues("vd0"), key=lambda queue: int(str(queue["requests"])))
            victim = int(str(busy["pid"]))
            os.kill(victim, signal.SIGKILL)
            wait_for_next(int(str(busy["index"])), victim)
            wait_for_writes(20)
    assert guest.info("vd0")["failure"] == ""
    guest.delete("vd0")
    return found
