"""The short form of the torture suite: nothing acknowledged is lost, whatever dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from suite import torture

from vdusefast.bench.torture.plan import parse_kills

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MIXES = {
    "sync": (["--engine", "sync"], "worker=40,supervisor=6,group=6,stall=3,restart=3,resize=3,fail=3"),
    "auto": ([], "worker=24,supervisor=3,group=3,resize=2,fail=2"),  # cached on a disk
    "uring": (["--engine", "uring"], "worker=24,supervisor=4,group=4,stall=1"),
    "uring, O_DIRECT": (["--engine", "uring", "--cache", "none"], "worker=24,supervisor=4,group=4,restart=2,fail=2"),
    "sync, O_DIRECT": (["--engine", "sync", "--cache", "none"], "worker=12,supervisor=2,group=2"),
    "sync, in order": (["--engine", "sync", "--ring", "split-in-order"], "worker=24,supervisor=3,group=3,restart=2"),
    "sync, packed": (["--engine", "sync", "--ring", "packed"], "worker=24,supervisor=3,group=3,restart=2,fail=2"),
    "sync, packed in order": (
        ["--engine", "sync", "--ring", "packed-in-order"],
        "worker=24,supervisor=3,group=3,stall=1",
    ),
    "uring, packed": (
        ["--engine", "uring", "--cache", "none", "--ring", "packed"],
        "worker=24,supervisor=3,group=3,fail=2",
    ),
    "memory": (["--engine", "memory", "--backend", "memory:8M"], "worker=24,stall=1"),
}


def io_uring_is_allowed() -> bool:
    try:
        return Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() == "0"
    except FileNotFoundError:
        return os.uname().release >= "5.11"


@pytest.mark.parametrize("mix", MIXES)
def test_nothing_is_lost_whatever_dies(mix: str, tmp_path: Path) -> None:
    words, mixed = MIXES[mix]
    kills = parse_kills(mixed)
    if "uring" in mix and not io_uring_is_allowed():
        pytest.skip("io_uring is not allowed here")
    if "--backend" not in words:
        store = tmp_path / "store.img"  # pytest's directory: of a real disk where /tmp is one
        store.touch()
        os.truncate(store, 8 << 20)
        words = [*words, "--backend", f"file:{store}"]
    result = torture(tmp_path, *words, "--kills", mixed, "--seed", "1")
    assert result.status == 0, result.text
    report = result.report
    assert report["passed"]
    assert (report["lost"], report["leaks"], report["failures"]) == ([], [], [])
    assert sum(row["times"] for row in report["rows"]) == report["cycles"] == sum(kills.values())
    assert report["starts"] >= 1 + sum(kills.get(kind, 0) for kind in ("supervisor", "group", "restart"))
    assert report["counts"]["verified"] > report["cycles"]
    assert (report["store_blocks_compared"] > 0) == ("--backend" not in MIXES[mix][0])


def test_other_queues_do_not_notice_the_death_of_a_worker(tmp_path: Path) -> None:
    result = torture(tmp_path, "--kills", "worker=12", "--seed", "2")
    assert result.status == 0, result.text
    for row in result.report["rows"]:
        assert row["others_s"]["p50"] < row["pause_s"]["p50"]
