"""The content of a store means something to others: to a server that finds another image format, and to LVM."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import guest
from checks import check
from guest import MIB

LVM = Path("/etc/lvm")
DEVICES_FILE = LVM / "devices/system.devices"
# There is no udev here.
LVM_CONF = """
devices {{ obtain_device_list_from_udev = 0  {devices} }}
activation {{ udev_sync = 0  udev_rules = 0 }}
global {{ event_activation = 0 }}
backup {{ backup = 0  archive = 0 }}
log {{ prefix = "" }}
"""
QCOW2_HEAD = b"QFI\xfb\0\0\0\3"


# -- an image of another format, or what looks like one


def write_sector(node: str, data: bytes) -> None:
    """Write the first sector of a disk, as its user may."""
    guest.sh_bytes("dd", f"of={node}", "bs=512", "conv=fsync", "oflag=direct", data=data.ljust(512, b"\0"))


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a vdusefast command, without the start of an interpreter for it, and return what it says."""
    done = guest.attempt_in_copy(*words)
    assert done.returncode == 0, done.stderr
    return done


def kill_server() -> None:
    """Kill the server of vd0, and leave its device."""
    server = guest.pids_of("vd0")[0]
    os.kill(server, signal.SIGKILL)
    guest.wait_for("the server to end", lambda: not guest.running(server), 20)


@check(limit_s=200)
def a_disks_user_does_not_lock_it() -> dict[str, object]:
    """A device whose user wrote a qcow2 header serves on; a new device on that store requires `raw` to be given."""
    path = guest.image("content.img", 16 * MIB)
    path.write_bytes(bytes(16 * MIB))
    node = guest.fork_server("vd0", f"file:{path}", queues=2)
    write_sector(node, QCOW2_HEAD)
    kill_server()
    command("recover", "vd0")
    kill_server()
    assert guest.fork_server("vd0", f"file:{path}", queues=2) == node
    guest.delete("vd0")
    words = ("add", "vd0", "--backend", f"file:{path}")
    said = guest.refused(*words, status=2, says="is a disk image in the format qcow2")
    assert path.read_bytes()[:8] == QCOW2_HEAD
    with guest.device("vd0", f"file:{path}?format=raw"):
        pass
    path.unlink()
    return {"said": said}


# -- LVM


@contextlib.contextmanager
def configured() -> Iterator[None]:
    """Have a configuration of LVM in its place, and the machine's own again afterwards."""
    guest.sh("modprobe", "-a", "dm_mod", "loop")
    path = LVM / "lvm.conf"
    before = path.read_bytes()
    configure()
    try:
        yield
    finally:
        path.write_bytes(before)
        DEVICES_FILE.unlink(missing_ok=True)


def configure(devices: str = "use_devicesfile = 0") -> None:
    """Write lvm.conf. devices: settings of that section."""
    (LVM / "lvm.conf").write_text(LVM_CONF.format(devices=devices))


def lvm(*words: object) -> str:
    """Run a command of LVM and return both of its outputs."""
    done = guest.attempt(*words, timeout_s=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@contextlib.contextmanager
def loop_device(name: str, *options: str) -> Iterator[str]:
    """Make a block device of this machine over a new file."""
    path = guest.image(name, 64 * MIB)
    loop = guest.sh("losetup", "--find", "--show", *options, path).strip()
    try:
        yield loop
    finally:
        guest.sh("losetup", "--detach", loop)
        path.unlink()


def volumes() -> list[str]:
    """Return the nodes on which LVM finds the physical volumes of vg0."""
    listed = lvm("pvs", "--noheadings", "--options", "pv_name", "--select", "vg_name=vg0")
    return re.findall(r"^ *(/dev/\S+) *$", listed, re.MULTILINE)


def added_with_advice(store: str) -> tuple[str, str]:
    """Add vd0 over a store and return its node, and what is advised."""
    done = command("add", "vd0", "--backend", f"file:{store}")
    advice = re.search(r"holds an LVM physical volume .* before the disk is used: (.*)$", done.stderr, re.MULTILINE)
    assert advice, done.stderr
    assert guest.info("vd0")["notes"], guest.info("vd0")
    return done.stdout.strip(), advice[1]


def follow_filter(advice: str) -> None:
    """Write the advised line into lvm.conf."""
    place, _, line = advice.partition(": ")
    assert place == "in /etc/lvm/lvm.conf, section devices", advice
    configure(f"use_devicesfile = 0  {line}")


def make_group(volume: str) -> None:
    """Make a volume group with a volume that has a text on it, and leave it inactive."""
    lvm("pvcreate", volume)
    lvm("vgcreate", "vg0", volume)
    lvm("lvcreate", "--yes", "--zero", "n", "--wipesignatures", "n", "--size", "8M", "--name", "lv0", "vg0")
    write_sector("/dev/vg0/lv0", b"on the volume")
    lvm("vgchange", "--activate", "n", "vg0")


def use_group(volume: str) -> None:
    """Use vg0, which LVM finds on the served disk alone: its volume, and a new one."""
    assert volumes() == [volume], volumes()
    lvm("vgchange", "--activate", "y", "vg0")
    try:
        number = os.stat("/dev/vg0/lv0").st_rdev
        below = os.listdir(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/slaves")
        assert below == [Path(volume).name], below
        said = guest.sh("dd", "if=/dev/vg0/lv0", "bs=512", "count=1", "iflag=direct", "status=none")
        assert said.startswith("on the volume"), said
        lvm("lvcreate", "--yes", "--size", "8M", "--name", "lv1", "vg0")
    finally:
        lvm("vgchange", "--activate", "n", "vg0")


@check(limit_s=200)
def lvm_finds_a_volume_once_as_advised() -> dict[str, object]:
    """On a block device: LVM finds it twice, and once with the setting that `add` prints."""
    with configured(), loop_device("pv.img") as loop:
        make_group(loop)
        node, advice = added_with_advice(loop)
        twice = lvm("pvs")
        assert re.search(rf"WARNING: .*{loop}\b", twice), twice
        assert re.search(rf"WARNING: .*{node}\b", twice), twice
        follow_filter(advice)
        use_group(node)
        guest.delete("vd0")
    return {"advice": advice, "without": twice}


@check(limit_s=200)
def lvm_finds_a_volume_on_a_partition_once_as_advised() -> dict[str, object]:
    """The store's partitions are nodes of their own, of which LVM knows."""
    with configured(), loop_device("part.img", "--partscan") as loop:
        guest.sh("sfdisk", "--quiet", loop, text_in="2048,,8e\n")
        guest.wait_for("the partition", lambda: Path(f"{loop}p1").exists())
        make_group(f"{loop}p1")
        node, advice = added_with_advice(loop)
        assert f'"r|^{loop}p1$|"' in advice, advice
        follow_filter(advice)
        use_group(f"{node}1")
        guest.delete("vd0")
    return {"advice": advice}


@check(limit_s=200)
def lvm_with_a_devices_file_is_told_of_the_disk() -> dict[str, object]:
    """With a devices file LVM knows the store alone, and no filter counts; the commands that `add` prints change it."""
    with configured(), loop_device("listed.img") as loop:
        configure("use_devicesfile = 1")
        lvm("lvm", "lvmdevices", "--adddev", loop)
        make_group(loop)
        node, advice = added_with_advice(loop)
        assert volumes() == [loop], volumes()
        commands = re.findall(r"lvm lvmdevices --(\w+) (/dev/\w+)", advice)
        assert commands == [("deldev", loop), ("adddev", "/dev/vdX")], advice
        for option, device in commands:
            lvm("lvm", "lvmdevices", f"--{option}", device.replace("/dev/vdX", node))
        use_group(node)
        guest.delete("vd0")
    return {"advice": advice}


@check(limit_s=200)
def lvm_does_not_look_into_a_logical_volume() -> dict[str, object]:
    """Over a logical volume nothing is to be done: LVM does not scan these, unless devices/scan_lvs says so."""
    with configured(), loop_device("below.img") as loop:
        lvm("pvcreate", loop)
        lvm("vgcreate", "below", loop)
        try:
            lvm("lvcreate", "--yes", "--zero", "n", "--wipesignatures", "n", "--size", "40M", "--name", "lv", "below")
            with guest.device("vd0", "file:/dev/below/lv") as node:
                make_group(node)
            done = command("add", "vd0", "--backend", "file:/dev/below/lv")
            assert "LVM" not in done.stderr, done.stderr
            node = done.stdout.strip()
            use_group(node)
            guest.delete("vd0")
        finally:
            lvm("vgchange", "--activate", "n", "below")
    return {"node": node}
