"""QEMU of Debian trixie on a vhost device: its firmware starts from the disk, by queue 0 alone.

A whole Linux in such a machine takes minutes under emulation: qemu_linux.py, which `make soak` runs.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import guest
from checks import check
from guest import MIB
from qemu_machine import Machine, boot_sector

TEXT = b"hello from the disk\n"
SECTOR_BYTES = 512
BOOT_S = 90.0  # SeaBIOS and a boot sector
PCI = ["-device", "vhost-vdpa-device-pci,vhostdev={node}"]
BLOCKDEV = [
    *("-blockdev", "driver=virtio-blk-vhost-vdpa,path={node},cache.direct=on,node-name=disk"),
    *("-device", "virtio-blk-pci,drive=disk"),
]


def disk() -> Path:
    """Return an image that firmware can start from."""
    path = guest.image("qemu.img", 8 * MIB)
    with path.open("r+b") as file:
        file.write(boot_sector(guest.WORK).ljust(SECTOR_BYTES, b"\0") + TEXT)
    return path


def started_from(path: Path, machine: Machine) -> None:
    """Wait until the boot sector has read sector 1 and written sector 2."""
    said = machine.wait_for("written\n", BOOT_S)
    assert said.startswith(TEXT.decode()), said
    with path.open("r+b") as file:
        file.seek(2 * SECTOR_BYTES)
        assert file.read(len(TEXT)) == TEXT
        file.seek(2 * SECTOR_BYTES)
        file.write(bytes(SECTOR_BYTES))  # for the next start


def is_well(*states: str) -> None:
    """Check that the device and its queues are shown as they are."""
    info = guest.info("vm0")
    assert [queue["state"] for queue in info["queues"]] == list(states), info  # type: ignore[attr-defined]
    assert (info["state"], info["failure"]) == ("running", ""), info


def kill_worker() -> None:
    """Kill the worker of queue 0 and wait until another one serves."""
    pid = guest.info("vm0")["queues"][0]["pid"]  # type: ignore[index]
    os.kill(pid, signal.SIGKILL)

    def another() -> bool:
        queue = guest.info("vm0")["queues"][0]  # type: ignore[index]
        return queue["pid"] != pid and queue["state"] == "running"

    guest.wait_for("another worker", another, 90)


@check(limit_s=240)
def firmware_starts_from_the_disk() -> dict[str, object]:
    """Again after the death of a worker and a reset, and once more for the next QEMU; queue 1 stays unused."""
    path, times = disk(), {}
    with guest.device("vm0", f"file:{path}", bus="vhost", queues=2) as node:
        words = [word.format(node=node) for word in PCI]
        for turn in ("first", "second"):
            began_s = time.monotonic()
            with Machine(words, guest.WORK) as machine:
                started_from(path, machine)
                times[turn] = round(time.monotonic() - began_s, 1)
                is_well("running", "unused")
                if turn == "first":
                    assert guest.info("vm0")["last_failure"] is None
                    kill_worker()
                    machine.send("\n")
                    started_from(path, machine)
                    is_well("running", "unused")
                machine.monitor("quit")
                assert machine.ended() == 0, machine.said()
    return times


@check(limit_s=180)
def firmware_starts_from_the_disk_by_blockdev() -> None:
    """QEMU's own virtio-blk in front: libblkio drives the device."""
    path = disk()
    node = str(guest.fork_server("vm0", f"file:{path}", bus="vhost", queues=2))
    with Machine([word.format(node=node) for word in BLOCKDEV], guest.WORK) as machine:
        started_from(path, machine)
        is_well("running", "unused")
        machine.monitor("quit")
        assert machine.ended() == 0, machine.said()
    guest.delete("vm0")
