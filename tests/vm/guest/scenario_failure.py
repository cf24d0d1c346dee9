"""A process dies: what failed is named, the rest goes on, and the device can be removed."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import guest
from checks import check

FORCE_MAX_S = 25.0


def queues(name: str) -> list[dict[str, object]]:
    """Return what is known of each queue."""
    return list(guest.info(name)["queues"])  # type: ignore[call-overload]


@check(limit_s=120)
def idle_worker_killed() -> str:
    """Its queue has failed, with a reason; `show` says so, the other queue serves on, and --force removes all."""
    guest.fork_server("vd0", "memory:16M", queues=2)
    victim = int(str(queues("vd0")[1]["pid"]))
    os.kill(victim, signal.SIGKILL)
    guest.wait_for("the queue to fail", lambda: queues("vd0")[1]["state"] == "failed", 20)
    shown = guest.show("vd0")
    failed, other = shown["queues"][1], shown["queues"][0]  # type: ignore[index]
    assert failed["reason"], failed
    assert str(victim) in str(shown["failure"]), shown["failure"]
    assert other["state"] == "running", other
    started_s = time.monotonic()
    guest.delete("vd0", "--force")
    assert time.monotonic() - started_s < FORCE_MAX_S
    return str(shown["failure"])


@check(limit_s=150)
def worker_killed_under_load() -> dict[str, object]:
    """Requests that its queue has taken wait; del --force fails them, and ends in seconds."""
    node = guest.fork_server("vd0", "memory:64M", queues=2)
    words = ["fio", "--name=load", "--thread", f"--filename={node}", "--rw=randrw", "--bs=4k", "--iodepth=16"]
    words += ["--ioengine=libaio", "--direct=1", "--numjobs=2", "--time_based", "--runtime=300", "--size=16M"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as fio:
        try:
            guest.wait_for("fio's writes", lambda: guest.counter("vd0", "write") > 100, 40)
            busy = max(queues("vd0"), key=lambda queue: int(str(queue["requests"])))
            os.kill(int(str(busy["pid"])), signal.SIGKILL)
            index = int(str(busy["index"]))
            guest.wait_for("the queue to fail", lambda: queues("vd0")[index]["state"] == "failed", 20)
            started_s = time.monotonic()
            guest.delete("vd0", "--force")
            took_s = time.monotonic() - started_s
            assert took_s < FORCE_MAX_S, f"{took_s:.1f} s"
            assert fio.wait(30) != 0, "fio has noticed nothing"
        finally:
            fio.kill()
    with guest.device("vd0", "memory:16M") as again:
        guest.sh("dd", f"if={again}", "of=/dev/null", "bs=64k", "count=4", "iflag=direct")
    return {"took_s": round(took_s, 1)}
