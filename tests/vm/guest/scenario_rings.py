"""Each format of the rings on a real disk: what the driver accepts, verified data, and a worker that dies amid them."""

from __future__ import annotations

import os
import signal

import guest
from checks import check
from guest import MIB
from scenario_fio import DIRECT, fio, places
from verified_fio import verified_fio

JOBS: dict[str, dict[str, object]] = {
    "depth-32": {**DIRECT, "rw": "randrw", "iodepth": 32, "bs": 4096, "io_size": 2 * MIB},
    "large": {**DIRECT, "rw": "randrw", "iodepth": 4, "bsrange": "4k-512k", "io_size": 8 * MIB},
}


def knows_in_order() -> bool:
    """Return whether this kernel's driver takes IN_ORDER: from Linux 7.0 on."""
    return int(os.uname().release.split(".")[0]) >= 7


def worker_pid() -> int:
    return int(guest.info("vd0")["queues"][0]["pid"])  # type: ignore[index]


def kill_worker() -> None:
    """Kill the worker, and wait until another one serves."""
    worker = worker_pid()
    os.kill(worker, signal.SIGKILL)
    guest.wait_for("another worker", lambda: worker_pid() not in (worker, 0))


def serve(ring: str, **device: object) -> dict[str, object]:
    """Have a device verified, and a worker of it killed meanwhile. ring: what `show` must say of it."""
    path = guest.image("rings.img", 64 * MIB)
    with guest.device("vd0", f"file:{path}", engine="sync", **device) as node:
        shown = str(guest.info("vd0")["ring"])
        assert ring in shown, f"{shown}, expected {ring}"
        assert ("IN_ORDER" in shown) == (bool(device["in_order"]) and knows_in_order()), shown
        fio(places(node, JOBS, 16 * MIB))
        with verified_fio(node) as waited:
            for _ in range(2):
                kill_worker()
        total = guest.call("vd0", "stats")["total"]
        assert total["errors"] == 0, total  # type: ignore[index]
    return {"ring": shown, **waited}


@check(limit_s=120)
def split() -> dict[str, object]:
    return serve("split", packed=False, in_order=True)


@check(limit_s=120)
def packed() -> dict[str, object]:
    return serve("packed", packed=True, in_order=False)


@check(limit_s=120)
def packed_and_small_with_tables() -> dict[str, object]:
    return serve("packed", packed=True, in_order=True, queue_size=16, indirect=True)
