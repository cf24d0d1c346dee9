"""Inside of a guest, as root: a whole virtual machine with a Linux of its own on a vhost device of ours.

    qemu_linux.py KERNEL lives|starts

lives: QEMU starts its kernel. It uses its disk, sees it grow, survives the deaths of workers and of the server,
reboots, powers off, and is started again by QEMU's own virtio-blk over the same device.
starts: SeaBIOS, GRUB and Linux, one after the other, start from the disk.
Prints how long each step took as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import bootable_disk  # noqa: E402
import guest  # noqa: E402
from guest import MIB  # noqa: E402
from qemu_machine import KERNEL_ARGUMENTS, Machine, initrd, virtio_blk  # noqa: E402
from scenario_qemu import BLOCKDEV, PCI, is_well, kill_worker  # noqa: E402

from bench.vm import cache  # noqa: E402

NAME, SERIAL = "vm0", "vdusefast-vm-1"
QUEUES = 2  # and CPUs: Linux uses no more queues than it has CPUs
SIZE_BYTES, GROWN_BYTES = 64 * MIB, 96 * MIB
BOOT_FILES_BYTES = 48 * MIB  # where a kernel is on the disk that starts it
# QEMU's Linux sets up rings of 1024 entries, whatever was offered. Linux 7.x takes no more than that.
OFFERED = 256 if guest.kernel() < (7, 0) else 1024
BOOT_S = 1500.0
STEP_S = 300.0
# Inside: /tmp/data is 8 MiB of random bytes.
WRITE = "dd if=/tmp/data of=/dev/vda bs=1M seek={at} conv=notrunc,fsync 2>/dev/null"
CHECK = "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M skip={at} count=8 2>/dev/null | cmp - /tmp/data"
# Direct writes beside write-back of the page cache, round after round until a command stops it.
LOAD = (
    "rm -f /tmp/stop /tmp/failed; n=0; echo 0 >/tmp/rounds; while [ ! -e /tmp/stop ]; do"
    " dd if=/tmp/data of=/dev/vda bs=64k seek=256 oflag=direct conv=notrunc 2>/dev/null & direct=$!;"
    " dd if=/tmp/data of=/dev/vda bs=1M seek=32 conv=notrunc,fsync 2>/dev/null || touch /tmp/failed;"
    " wait $direct || touch /tmp/failed; n=$((n + 1)); echo $n >/tmp/rounds; done &"
)


class Steps:
    """The steps so far, and how long each took."""

    def __init__(self) -> None:
        self.times_s: dict[str, float] = {}

    def do(self, name: str, step: Callable[[], object]) -> None:
        """Do a step and note its time."""
        began_s = time.monotonic()
        step()
        self.times_s[name] = round(time.monotonic() - began_s, 1)
        print(f"{name}: {self.times_s[name]} s", file=sys.stderr, flush=True)


def command(*words: object) -> None:
    """Run a vdusefast command, which shares its CPUs with an emulator."""
    guest.vdusefast(*words, timeout_s=STEP_S)


def boot(machine: Machine) -> None:
    """Wait until Linux obeys, and look at the device on both sides."""
    machine.wait_for("@ready\n", BOOT_S)
    serial = machine.run("cat /sys/block/vda/serial")
    assert serial == SERIAL, (serial, machine.said())
    machine.run("dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null", STEP_S)


def use(path: Path, machine: Machine) -> None:
    """Write, read back from the device, flush, discard."""
    assert machine.run("cat /sys/block/vda/size") == str(SIZE_BYTES // 512)
    for cpu in range(QUEUES):
        machine.run(f"taskset {1 << cpu:x} dd if=/tmp/data of=/dev/vda bs=64k oflag=direct seek=16 2>/dev/null", STEP_S)
    written = [queue["bytes_written"] for queue in guest.info(NAME)["queues"]]  # type: ignore[attr-defined]
    assert all(written), written
    machine.run(WRITE.format(at=1), STEP_S)
    machine.run(CHECK.format(at=1), STEP_S)
    assert guest.counter(NAME, "flush") > 0
    machine.run("blkdiscard -o $((1 << 20)) -l $((4 << 20)) /dev/vda", STEP_S)
    assert guest.counter(NAME, "discard") > 0
    with path.open("rb") as file:
        file.seek(MIB)
        assert file.read(4 * MIB) == bytes(4 * MIB)
        assert any(file.read(4 * MIB))


def grow(machine: Machine) -> None:
    """Give the device another size; its driver learns it."""
    command("resize", NAME, str(GROWN_BYTES))
    wanted = GROWN_BYTES // 512
    machine.run(f"for i in $(seq 60); do [ $(cat /sys/block/vda/size) = {wanted} ] && break; sleep 1; done", STEP_S)
    assert machine.run("cat /sys/block/vda/size") == str(wanted)


def rounds_go_on(machine: Machine) -> None:
    """Wait until the load inside has done two more rounds."""
    first, began_s = int(machine.run("cat /tmp/rounds")), time.monotonic()
    while int(machine.run("cat /tmp/rounds")) < first + 2:
        assert time.monotonic() < began_s + STEP_S, "the load stands still"
        time.sleep(1)


def die(path: Path, machine: Machine) -> None:
    """Kill a worker, then the server with all its processes, amid requests; nothing inside fails or is lost."""
    machine.run(LOAD)
    rounds_go_on(machine)
    kill_worker()
    rounds_go_on(machine)
    ended = guest.pids_of(NAME)
    os.killpg(ended[0], signal.SIGKILL)
    guest.wait_for("the server to end", lambda: not any(map(guest.running, ended)), STEP_S)
    time.sleep(2)  # requests wait meanwhile
    command("recover", NAME)
    rounds_go_on(machine)
    machine.run("touch /tmp/stop; wait; [ ! -e /tmp/failed ]", STEP_S)
    machine.run(CHECK.format(at=16), STEP_S)
    machine.run(CHECK.format(at=32), STEP_S)
    with path.open("rb") as file:
        file.seek(16 * MIB)
        direct = file.read(8 * MIB)
        file.seek(32 * MIB)
        assert any(direct)
        assert direct == file.read(8 * MIB)


def reboot(machine: Machine) -> None:
    """Restart the machine from inside; what was written is there."""
    digest = machine.run("md5sum < /tmp/data")
    machine.begin("sync; reboot -f")
    boot(machine)
    assert machine.run("dd if=/dev/vda bs=1M skip=16 count=8 2>/dev/null | md5sum", STEP_S) == digest
    assert machine.run("cat /sys/block/vda/size") == str(GROWN_BYTES // 512)


def power_off(machine: Machine) -> None:
    """Power off from inside: QEMU ends and lets go of the device."""
    machine.begin("poweroff -f")
    assert machine.ended(STEP_S) == 0, machine.said()
    guest.wait_for("the device to be reset", lambda: guest.info(NAME)["state"] == "attached", STEP_S)


def once_more(path: Path, machine: Machine) -> None:
    """Use the disk through QEMU's own virtio-blk."""
    boot(machine)
    machine.run(WRITE.format(at=40), STEP_S)
    machine.run(CHECK.format(at=40), STEP_S)
    with path.open("rb") as file:
        file.seek(40 * MIB)
        assert any(file.read(MIB))
    power_off(machine)


def add(path: Path) -> str:
    """Serve an image and return the node."""
    settings = {"bus": "vhost", "queues": QUEUES, "queue_size": OFFERED, "serial": SERIAL}
    command("add", guest.write_config(NAME, f"file:{path}", **settings))  # type: ignore[arg-type]
    return guest.node_of(NAME)


def ring_sizes() -> list[int]:
    """Return the sizes of the rings that the driver has set up."""
    return [queue["size"] for queue in guest.info(NAME)["queues"]]  # type: ignore[attr-defined]


def lives(kernel: cache.Kernel, steps: Steps) -> list[int]:
    """Have a machine live on the device, and another one after it. Returns the sizes of its rings."""
    start = ["-kernel", str(kernel.image), "-append", " ".join(KERNEL_ARGUMENTS)]
    (guest.WORK / "initrd").write_bytes(initrd(virtio_blk(kernel)))
    start += ["-initrd", str(guest.WORK / "initrd")]
    path = guest.image("vm.img", SIZE_BYTES)
    node = add(path)
    with Machine([*start, *(word.format(node=node) for word in PCI)], guest.WORK, QUEUES) as machine:
        steps.do("boot", lambda: boot(machine))
        sizes = ring_sizes()
        is_well("running", "running")
        steps.do("use", lambda: use(path, machine))
        steps.do("grow", lambda: grow(machine))
        steps.do("die", lambda: die(path, machine))
        steps.do("reboot", lambda: reboot(machine))
        is_well("running", "running")
        steps.do("power off", lambda: power_off(machine))
    words = [word.format(node=node).replace("drive=disk", f"drive=disk,serial={SERIAL}") for word in BLOCKDEV]
    with Machine([*start, *words], guest.WORK, QUEUES) as machine:
        steps.do("once more", lambda: once_more(path, machine))
    return sizes


def starts(_kernel: cache.Kernel, steps: Steps) -> list[int]:
    """Have a machine start from the device: firmware, boot loader and Linux drive it in turn."""
    path = guest.image("vm.img", SIZE_BYTES)
    bootable_disk.write(path, BOOT_FILES_BYTES, guest.WORK)
    node = add(path)
    with Machine([word.format(node=node) for word in PCI], guest.WORK, QUEUES) as machine:
        steps.do("boot", lambda: boot(machine))
        sizes = ring_sizes()
        is_well("running", "running")
        assert "BOOT_IMAGE=(hd0)" in machine.run("cat /proc/cmdline")  # as GRUB writes it
        steps.do("use", lambda: use(path, machine))
        steps.do("power off", lambda: power_off(machine))
    return sizes


def main(series: str, part: str) -> int:
    """Do all steps of a part."""
    guest.prepare()
    steps = Steps()
    sizes = {"lives": lives, "starts": starts}[part](cache.kernel(series), steps)
    command("del", NAME)
    print(json.dumps({"ring_sizes": sizes, "times_s": steps.times_s}))
    return 0


if __name__ == "__main__":
    subprocess.run(["modprobe", "-a", "vduse", "vhost_vdpa"], check=True)
    sys.exit(main(*sys.argv[1:]))
