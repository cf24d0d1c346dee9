"""The short form of the torture suite on a real disk: whatever dies, nothing that was acknowledged is lost."""

from __future__ import annotations

import json
from pathlib import Path

import guest
from checks import check, times

from vdusefast.bench.torture.command import run_torture
from vdusefast.bench.torture.plan import TortureOptions

KILLS = {"worker": times(2, 4), "supervisor": 1, "group": 1}  # a start of a server takes several seconds here


def torture(engine: str, cache: str, kills: dict[str, int]) -> dict[str, object]:
    path = guest.image(f"torture-{engine}.img", guest.MIB)
    report = Path(guest.WORK / f"torture-{engine}.json")
    options = TortureOptions(
        transport="kernel",
        kills=kills,
        seed=3,
        queues=2,
        engine=engine,
        cache=cache,
        backend=f"file:{path}",
        give_up_s=60.0,
        json=report,
    )
    status = run_torture(options)
    found = json.loads(report.read_text())
    assert status == 0, found
    assert found["passed"], found
    assert found["cycles"] == sum(kills.values()), found
    assert found["store_blocks_compared"] > 0, found
    return {row["what"]: row["pause_s"] for row in found["rows"]}


@check(limit_s=240)
def nothing_is_lost_by_the_sync_engine() -> dict[str, object]:
    return torture("sync", "writeback", KILLS)


@check(limit_s=240)
def nothing_is_lost_by_io_uring_and_o_direct() -> dict[str, object]:
    return torture("uring", "none", KILLS | {"stall": 1, "restart": 1, "resize": 1, "fail": 1})
