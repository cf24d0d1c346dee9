"""The torture suite on stores that a module serves: an NBD server for many clients and for one, and a Python class."""

from __future__ import annotations

from pathlib import Path

import pytest
from nbd_rig import kept_nbdkit
from suite import ROOT, torture

from vdusefast.bench.torture_plan import parse_kills

KILLS = "worker=20,supervisor=4,group=4,stall=2,restart=2"
SIZE = 8 << 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def torture_store(tmp_path: Path, uri: str) -> None:
    result = torture(tmp_path, "--backend", uri, "--kills", KILLS, "--seed", "1")
    assert result.status == 0, result.text
    report = result.report
    assert report["passed"]
    assert (report["lost"], report["leaks"], report["failures"]) == ([], [], [])
    assert sum(row["times"] for row in report["rows"]) == report["cycles"] == sum(parse_kills(KILLS).values())
    assert report["counts"]["verified"] > report["cycles"]


@pytest.mark.parametrize("filters", [(), ("--filter=multi-conn", "multi-conn-mode=disable")])
def test_nothing_is_lost_on_an_nbd_server_whatever_dies(tmp_path: Path, filters: tuple[str, ...]) -> None:
    """The second one takes one client only, so that a relay has it for both queues."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    with kept_nbdkit(tmp_path / "nbd", f"file={image}", *filters[1:], options=(*filters[:1], "file")) as server:
        torture_store(tmp_path, server.uri)


def test_nothing_is_lost_on_a_python_class_whatever_dies(tmp_path: Path) -> None:
    """Its memory is that of a file, which both workers map and none takes with it."""
    disk = ROOT / "bench" / "disks" / "ram_disk.py"
    torture_store(tmp_path, f"python:{disk}:RamDisk?size=8M&path={tmp_path / 'memory'}")
