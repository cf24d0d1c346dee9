"""Layers over disks: md, dm-crypt and LVM over devices of ours, by their own tools."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import guest
import tree_links
from checks import check
from guest import MIB
from scenario_filesystem import MOUNT, differences, fill, live_on, mounted

TREE = ("bookworm", ("mdadm", "lvm2", "cryptsetup-bin"))
PROGRAMS = ("mdadm", "lvm", "dmsetup", "cryptsetup")
EXT4 = ["mkfs.ext4", "-q", "-F"]
FSCK = ["e2fsck", "-f", "-n"]
FILL_BYTES = 4 * MIB
MD = Path("/sys/block/md127/md")
SECRET = b"what must not be readable on the store"


def prepare(*modules: str) -> None:
    """Have the tools and the kernel's modules. No udev is here that device-mapper could wait for."""
    tree_links.link(TREE, dict.fromkeys(("usr/sbin", "sbin", "usr/bin", "bin"), PROGRAMS))
    os.environ["DM_DISABLE_UDEV"] = "1"
    guest.sh("modprobe", "-a", *modules)


@contextlib.contextmanager
def two_devices(size_bytes: int) -> Iterator[tuple[str, str]]:
    """Serve two devices over files."""
    with (
        guest.device("vd0", f"file:{guest.image('one.img', size_bytes)}", queues=2) as one,
        guest.device("vd1", f"file:{guest.image('two.img', size_bytes)}") as other,
    ):
        yield one, other


@check(limit_s=150)
def md_raid1_of_two_devices() -> dict[str, object]:
    """Mirrored, checked, one side lost and the data still there, the side added again, and checked."""
    prepare("raid1", "ext4")
    with two_devices(24 * MIB) as (one, other):
        words = ["--level=1", "--raid-devices=2", "--metadata=1.2", "--bitmap=none", "--run"]
        guest.sh("mdadm", "--create", "/dev/md127", *words, one, other, text_in="y\n", timeout_s=60)
        try:
            wait_for_idle()
            guest.sh(*EXT4, "/dev/md127")
            with mounted("/dev/md127"):
                files = fill(MOUNT, FILL_BYTES)
                guest.sh("mdadm", "/dev/md127", "--fail", other, "--remove", other)
                assert differences(MOUNT, files) == []
                files |= {f"second/{name}": digest for name, digest in fill_more().items()}
                guest.sh("mdadm", "/dev/md127", "--add", other)
                wait_for_idle()
            (MD / "sync_action").write_text("check")
            wait_for_idle()
            mismatches = guest.read_int(MD / "mismatch_cnt")
            assert mismatches == 0, f"{mismatches} sectors differ"
            with mounted("/dev/md127"):
                assert differences(MOUNT, files) == []
            guest.sh(*FSCK, "/dev/md127", timeout_s=60)
        finally:
            guest.sh("mdadm", "--stop", "/dev/md127")
    return {"files": len(files)}


def fill_more() -> dict[str, str]:
    (MOUNT / "second").mkdir()
    return fill(MOUNT / "second", FILL_BYTES // 4)


def wait_for_idle() -> None:
    """Wait until md neither synchronises nor checks."""
    guest.wait_for("md to be idle", lambda: (MD / "sync_action").read_text().strip() == "idle", 60)
    guest.wait_for("a whole mirror", lambda: (MD / "degraded").read_text().strip() == "0", 60)


@check(limit_s=120)
def dm_crypt() -> None:
    """Data written through it is read back, and the store holds none of it in clear."""
    prepare("dm_crypt", "ext4")
    path = guest.image("crypt.img", 24 * MIB)
    key = guest.WORK / "key"
    key.write_bytes(bytes(range(64)))
    with guest.device("vd0", f"file:{path}", queues=2) as node:
        words = ["--type=plain", "--cipher=aes-xts-plain64", "--key-size=512", f"--key-file={key}"]
        guest.sh("cryptsetup", "open", *words, "--allow-discards", node, "secret", timeout_s=60)
        try:
            live_on("/dev/mapper/secret", [*EXT4], [*FSCK], FILL_BYTES)
            with mounted("/dev/mapper/secret"):
                (MOUNT / "file").write_bytes(SECRET * 100)
        finally:
            guest.sh("cryptsetup", "close", "secret", timeout_s=60)
    assert SECRET not in path.read_bytes()


@check(limit_s=150)
def lvm_over_two_devices() -> None:
    """A volume over both, grown while it is mounted."""
    prepare("dm_mod", "ext4")
    with two_devices(24 * MIB) as (one, other):
        settings = f'devices{{use_devicesfile=0 filter=["a|^{one}$|","a|^{other}$|","r|.*|"]}}'
        lvm = ["lvm"]

        def run(command: str, *words: object) -> None:
            guest.sh(*lvm, command, "--config", settings, *words, timeout_s=60)

        run("pvcreate", "-y", one, other)
        run("vgcreate", "vg", one, other)
        try:
            run("lvcreate", "-y", "-n", "lv", "-L", "16M", "vg")
            node = "/dev/mapper/vg-lv"
            guest.sh(*EXT4, node)
            with mounted(node):
                files = fill(MOUNT, FILL_BYTES)
                run("lvextend", "-L", "32M", "vg/lv")  # needs both
                guest.sh("resize2fs", node, timeout_s=60)
                files |= {f"second/{name}": digest for name, digest in fill_more().items()}
                assert differences(MOUNT, files) == []
            with mounted(node):
                assert differences(MOUNT, files) == []
            guest.sh(*FSCK, node, timeout_s=60)
        finally:
            run("vgremove", "-f", "-y", "vg")
