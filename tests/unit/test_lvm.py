"""LVM's label is recognised as LVM writes it; what LVM makes of a store and its disk is tried with LVM in guests."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

import pytest

from vdusefast.backends import lvm, open_store
from vdusefast.config import BackendConfig

UUID = "xvUFMC-xaVw-eoqh-LGDz-YRKE-oy58-rDMyMs"


def label(sector: int = 1, kind: bytes = b"LVM2 001", offset: int = 32, uuid: str = UUID) -> bytes:
    """Return the first sectors of a physical volume; see lib/label/label.h and format_text/layout.h of LVM."""
    head = b"LABELONE" + sector.to_bytes(8, "little") + bytes(4) + offset.to_bytes(4, "little") + kind
    written = head.ljust(offset, b"\0") + uuid.replace("-", "").encode()
    return bytes(512) * sector + written.ljust(512, b"\0")


@pytest.mark.parametrize("sector", [0, 1, 2, 3])
def test_label_is_found_in_any_of_its_places(sector: int) -> None:
    assert lvm.find_volume(label(sector)) == UUID


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(4096),
        label()[:540],
        label(4),
        label(kind=b"LVM1 001"),
        label(offset=500),
        label(uuid="|^/dev/.*$|\n"),
        label().replace(b"\1\0\0\0\0\0\0\0", b"\2\0\0\0\0\0\0\0"),
    ],
)
def test_what_is_no_label(data: bytes) -> None:
    assert lvm.find_volume(data) == ""


def test_advice_names_store_and_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LVM's expressions get a dot for what would mean something in them, and a logical volume no advice."""
    path = tmp_path / "disk.img"
    content = label().ljust(1 << 20, b"\0") + label(2, uuid="b" * 32)
    path.write_bytes(content.ljust(4 << 20, b"\0"))
    with open_store(BackendConfig(uri=f"file:{path}")) as store:
        lvm.check(store)
        assert store.notes == []  # LVM does not look into files
        disk = tmp_path / "devices/sdb"
        part = disk / "sdb1"
        part.mkdir(parents=True)
        (part / "start").write_text("2048\n")
        (part / "partition").write_text("1\n")
        (tmp_path / "dev/block").mkdir(parents=True)
        rdev = os.fstat(store.fd).st_rdev
        (tmp_path / "dev/block" / f"{os.major(rdev)}:{os.minor(rdev)}").symlink_to(disk)
        monkeypatch.setattr(lvm, "SYS", tmp_path)
        monkeypatch.setattr(lvm, "DEVICES_FILE", tmp_path / "none")
        store.kind, store.path = "blockdev", "/dev/disk/by-id/a+b|c"
        lvm.check(store)
        (note,) = store.notes
        assert f"{UUID} on /dev/disk/by-id/a+b|c, bbbbbb-bbbb-" in note
        assert note.endswith('global_filter = [ "r|^/dev/disk/by-id/a.b.c$|", "r|^/dev/sdb1$|" ]')
        monkeypatch.setattr(lvm, "DEVICES_FILE", path)  # any that is there
        lvm.check(store)
        assert (
            "lvm lvmdevices --deldev '/dev/disk/by-id/a+b|c'; lvm lvmdevices --deldev /dev/sdb1; " in store.notes.pop()
        )
        store.identity = {"name": "dm/uuid=LVM-abc"}
        lvm.check(store)
        assert len(store.notes) == 1


def test_reads_are_aligned_for_direct_io() -> None:
    path = Path(__file__).parents[2] / "build" / f"test-{os.getpid()}.img"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((bytes(63 * 512) + label()).ljust(1 << 20, b"\0"))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        assert lvm.find_volume(lvm._read(fd, 63 * 512, mmap.PAGESIZE)) == UUID
    finally:
        os.close(fd)
        path.unlink()


def test_lvm_of_this_machine_is_the_one_that_is_meant() -> None:
    done = subprocess.run(["lvm", "version"], capture_output=True, text=True, timeout=60, check=False)
    assert "LVM version" in done.stdout
