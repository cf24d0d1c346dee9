"""Images in formats of their own are not served as raw disks: with images that the real qemu-img makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from nbd_rig import qemu_nbd

import vdusefast
from vdusefast.backends import absolute_uri, image_format, open_store
from vdusefast.backends.image_format import find_format, split_path
from vdusefast.config import BackendConfig, make_config
from vdusefast.control.assembly import open_device_store
from vdusefast.errors import ConfigError

LUKS_TRIES = 20
MIB = 1 << 20
MADE = {
    "qcow": ("qcow", ()),
    "qcow2": ("qcow2", ()),
    "qcow2-v2": ("qcow2", ("-o", "compat=0.10")),
    "qcow2-preallocated": ("qcow2", ("-o", "preallocation=metadata")),
    "vmdk": ("vmdk", ()),
    "vmdk-stream": ("vmdk", ("-o", "subformat=streamOptimized")),
    "vmdk-esx": ("vmdk", ("-o", "subformat=monolithicSparse,hwversion=7")),
    "vmdk-descriptor": ("vmdk", ("-o", "subformat=monolithicFlat")),
    "vdi": ("vdi", ()),
    "vhdx": ("vhdx", ()),
    "vpc": ("vpc", ()),
    "vpc-fixed": ("vpc", ("-o", "subformat=fixed")),
    "qed": ("qed", ()),
    "parallels": ("parallels", ()),
}


BOCHS_END = b"Growing".ljust(16, b"\0") + (0x20000).to_bytes(4, "little") + (512).to_bytes(4, "little")


def make(path: Path, case: str, size: str = "4M") -> str:
    """Have qemu-img make an image; returns the format."""
    name, options = MADE[case]
    words = ["qemu-img", "create", "-q", "-f", name, *options, str(path), size]
    subprocess.run(words, check=True, timeout=60)
    return name


def make_luks(path: Path) -> None:
    secret = path.with_suffix(".secret")
    secret.write_text("only for a test")
    words = ["qemu-img", "create", "-q", "--object", f"secret,id=s,file={secret}", "-f", "luks"]
    words += ["-o", "key-secret=s,iter-time=10", str(path), "1M"]
    for _ in range(LUKS_TRIES):
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        if "Unable to get accurate CPU usage" not in done.stderr:  # on a busy machine it measures less than nothing
            break
    assert done.returncode == 0, done.stderr


def format_of(path: Path) -> str:
    with path.open("rb") as file:
        return find_format(file.fileno(), path.stat().st_size)


def open_new(path: Path, suffix: str = "", **fields: str) -> list[str]:
    """Open a store as for a new device, and return what is to be told of it."""
    backend = BackendConfig(uri=f"file:{path}{suffix}", **fields)  # type: ignore[arg-type]
    with open_store(backend, is_new=True) as store:
        return store.notes


@pytest.mark.parametrize("case", MADE)
def test_image_is_refused_unless_it_is_said_to_be_raw(tmp_path: Path, case: str) -> None:
    path = tmp_path / "disk.img"
    name = make(path, case)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_new(path)
    said = str(caught.value)
    assert f"format {name}" in said
    assert f"qemu-nbd --fork --persistent --shared=0 --format={name} --socket=/run/disk.sock {path}" in said
    assert "--backend 'nbd+unix:///?socket=/run/disk.sock'" in said
    assert f"file:{path}?format=raw" in said
    assert path.read_bytes() == before
    os.truncate(path, -(-path.stat().st_size // 4096) * 4096)
    if case != "vpc-fixed":  # which has its mark at its end
        with pytest.raises(ConfigError, match=f"format {name}"):
            open_new(path)
    assert open_new(path, "?format=raw") == []


def test_way_that_the_message_names_leads_to_the_disk_in_the_image(tmp_path: Path) -> None:
    path, socket = tmp_path / "my disk.img", tmp_path / "disk.sock"
    make(path, "qcow2")
    with pytest.raises(ConfigError) as caught:
        open_new(path)
    command = str(caught.value).partition("To serve the disk in it: ")[2].partition(", then:")[0]
    command = command.replace("/run/disk.sock", str(socket)).replace("--fork ", "")
    server = qemu_nbd(socket, path)
    server.words = ["sh", "-c", f"exec {command}"]
    with server:
        config = make_config(name="t0", uri=f"nbd+unix:///?socket={socket}", queues=2)
        with vdusefast.Device(config) as device, device.driver() as driver:
            assert driver.capacity_bytes == 4 * MIB
            driver.write(0, b"in the image".ljust(512))
            driver.flush()
    raw = subprocess.run(
        ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", f"if={path}", f"of={tmp_path / 'raw'}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert raw.returncode == 0, raw.stderr
    assert (tmp_path / "raw").read_bytes().startswith(b"in the image ")


@pytest.mark.slow
def test_encrypted_image_is_served_and_told(tmp_path: Path) -> None:
    """dm-crypt on a device writes the same header: to refuse it would refuse a disk that is used as it is meant."""
    path = tmp_path / "disk.img"
    make_luks(path)
    (note,) = open_new(path)
    assert "is encrypted (LUKS) and is served as it is" in note
    assert open_new(path, "?format=raw") == []
    with vdusefast.Device(make_config(name="t0", uri=f"file:{path}")) as device:
        assert device.info()["notes"] == [note]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bochs", b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + BOCHS_END),
        ("cloop", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"),
    ],
)
def test_formats_that_qemu_img_does_not_make(tmp_path: Path, name: str, head: bytes) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(head.ljust(MIB, b"\0"))
    done = subprocess.run(["qemu-img", "info", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert f"file format: {name}" in done.stdout or done.returncode  # its driver has taken it, and misses the rest
    with pytest.raises(ConfigError, match=f"format {name}.*--read-only --format={name} .*add NAME --read-only "):
        open_new(path)


def test_apples_images_are_known_by_their_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.dmg"
    trailer = b"koly" + (4).to_bytes(4, "big") + (512).to_bytes(4, "big")
    path.write_bytes(bytes(MIB) + trailer.ljust(512, b"\0"))
    with pytest.raises(ConfigError, match="format dmg"):
        open_new(path)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"QFI\xfb" + bytes(4),
        b"QFI\xfb\0\0\0\4",
        b"KDMV" + b"\xff" * 4,
        b"conectix",
        b"QED\0" + b"\3\0\0\0",
        b"# Disk",
        b"\xeb\x63\x90" + bytes(507),
        bytes(64) + b"\x7f\x10\xda\xbe" + b"\xff" * 4,
        b"\x1f\x8b\x08",  # an archive that was written to a disk without a file system
    ],
)
def test_few_bytes_do_not_make_a_disk_an_image(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(head.ljust(MIB - 512, b"\0") + b"conectix".ljust(512, b"\0"))
    assert format_of(path) == ""
    assert open_new(path) == []


@pytest.mark.parametrize("size", [0, 1, 7, 511, 512, 4095, 4097])
def test_short_files_are_looked_at(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(8192, b"\0")[:size])
    assert format_of(path) == ("qcow2" if size >= 8 else "")


def test_image_is_recognised_through_direct_io_and_behind_faults() -> None:
    path = Path(__file__).parents[2] / "build" / f"test-{os.getpid()}.img"
    path.parent.mkdir(exist_ok=True)
    try:
        make(path, "vpc-fixed")
        with pytest.raises(ConfigError, match="vpc"):
            open_new(path, cache="none")
        with pytest.raises(ConfigError, match=r"faulty:op=read,error=EIO:file:.*\?format=raw"):
            open_store(BackendConfig(uri=f"faulty:op=read,error=EIO:file:{path}"), is_new=True)
    finally:
        path.unlink()


def test_refused_device_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    make(path, "qcow2")
    device = vdusefast.Device(make_config(name="t0", uri=f"file:{path}"), run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="qcow2"):
        device.start()
    assert not list((tmp_path / "run").iterdir())


def test_device_that_goes_on_is_served_whatever_its_user_has_written(tmp_path: Path) -> None:
    """Else eight bytes in its first sector, which the disk's user can write, would keep it from being served."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(MIB, b"\0"))
    config = make_config(name="t0", uri=f"file:{path}")
    with open_device_store(config, None) as store:  # as for one that was left
        assert store.notes == []


# -- the URI


@pytest.mark.parametrize(
    ("rest", "path", "said_raw"),
    [
        ("/a", "/a", False),
        ("/a?format=raw", "/a", True),
        ("/a?b=c", "/a?b=c", False),
        ("/a?format=raw?format=raw", "/a?format=raw", True),
        ("/a?format=rawer", "/a?format=rawer", False),
        ("/50%25 #&?", "/50%25 #&?", False),
    ],
)
def test_all_but_the_end_is_the_path(rest: str, path: str, said_raw: bool) -> None:
    assert split_path(rest) == (path, said_raw)
    assert absolute_uri(f"file:{rest}") == f"file:{rest}"


def test_format_stays_when_a_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("file:a?format=raw") == f"file:{tmp_path}/a?format=raw"
    assert absolute_uri("faulty:error=EIO:file:a?format=raw") == f"faulty:error=EIO:file:{tmp_path}/a?format=raw"


def test_another_format_than_raw_is_told_the_way(tmp_path: Path) -> None:
    make(tmp_path / "a", "qcow2")
    with pytest.raises(ConfigError, match=r"only \?format=raw is possible; To serve the disk in it: qemu-nbd"):
        open_new(tmp_path / "a", "?format=qcow2")


def test_names_are_those_of_qemu() -> None:
    done = subprocess.run(["qemu-img", "--help"], capture_output=True, text=True, timeout=60, check=False)
    known = done.stdout.partition("Supported formats:")[2].split()
    assert {*image_format._BY_HEAD, *image_format._BY_TAIL} <= set(known)
