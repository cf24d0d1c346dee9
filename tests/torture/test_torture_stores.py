"""The torture suite on stores that a module serves: NBD servers for many clients and for one, Python classes, Ceph."""

from __future__ import annotations

from pathlib import Path

import pytest
from ceph_rig import Cluster
from nbd_rig import kept_nbdkit
from suite import ROOT, slow_nbdkit, torture

from vdusefast.bench.torture.plan import parse_kills

KILLS = "worker=20,supervisor=4,group=4,stall=2,restart=2"
SIZE = 8 << 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def torture_store(tmp_path: Path, words: list[str], kills: str = KILLS) -> None:
    result = torture(tmp_path, *words, "--kills", kills, "--seed", "1")
    assert result.status == 0, result.text
    report = result.report
    assert report["passed"]
    assert (report["lost"], report["leaks"], report["failures"]) == ([], [], [])
    assert sum(row["times"] for row in report["rows"]) == report["cycles"] == sum(parse_kills(kills).values())
    assert report["counts"]["verified"] > report["cycles"]


@pytest.mark.parametrize("filters", [(), ("--filter=multi-conn", "multi-conn-mode=disable")])
def test_nothing_is_lost_on_an_nbd_server_whatever_dies(tmp_path: Path, filters: tuple[str, ...]) -> None:
    """The second one takes one client only, so that a relay has it for both queues."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    with kept_nbdkit(tmp_path / "nbd", f"file={image}", *filters[1:], options=(*filters[:1], "file")) as server:
        torture_store(tmp_path, ["--backend", server.uri])


@pytest.mark.parametrize(
    ("multi_conn", "kills"),
    [(True, "worker=4,supervisor=1,group=1,keeper=1"), (False, "worker=1,supervisor=1,group=2,relay=3")],
    ids=["many clients", "a relay"],
)
def test_nothing_is_lost_on_an_nbd_server_that_carries_out_writes_late(
    tmp_path: Path, multi_conn: bool, kills: str
) -> None:
    """Writes of a client that dies may land after newer writes of the next client, unless that one waits.

    test_seeded_faults.py checks that this would be found.
    """
    with slow_nbdkit(tmp_path, multi_conn=multi_conn) as words:
        torture_store(tmp_path, words, kills)


def test_nothing_is_lost_on_a_python_class_whatever_dies(tmp_path: Path) -> None:
    """Its memory is that of a file, which both workers map and none takes with it."""
    disk = ROOT / "examples" / "disks" / "ram_disk.py"
    torture_store(tmp_path, ["--backend", f"python:{disk}:RamDisk?size=8M&path={tmp_path / 'memory'}"])


def test_nothing_is_lost_on_a_python_class_of_one_instance_whatever_dies(tmp_path: Path) -> None:
    """A relay has it; the next one makes what it holds in its memory from its file again."""
    uri = f"python:{ROOT / 'examples' / 'disks' / 'thin_disk.py'}:ThinDisk?size=8M&path={tmp_path / 'thin'}"
    torture_store(tmp_path, ["--backend", uri, "--size", "1M"], "worker=2,supervisor=1,group=1,relay=4")


@pytest.mark.parametrize(
    ("queues", "kills"),
    [(1, "worker=7,supervisor=3,group=3"), (2, "worker=2,supervisor=2,group=2,relay=4")],
    ids=["a worker", "a relay"],
)
def test_nothing_is_lost_on_an_image_of_ceph_whatever_dies(
    ceph: Cluster, tmp_path: Path, queues: int, kills: str
) -> None:
    """One client at a time has the image: the worker of the one queue, or a relay."""
    uri = ceph.make_image(f"tortured{queues}", "16M")
    torture_store(tmp_path, ["--backend", uri, "--queues", str(queues), "--size", "1M"], kills)
