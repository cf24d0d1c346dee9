"""The device changes hands under I/O: unbound, bound again, moved to the other bus and back; its server stays."""

from __future__ import annotations

import time
from pathlib import Path

import guest
import vhost
from checks import check, times
from disk_load import under_load
from guest import MIB

TURNS = times(18, 50)  # two of the first are moves to the other bus


def unbind(name: str) -> None:
    """Take a device from its bus driver."""
    driver = (guest.VDPA_DEVICES / name / "driver").resolve().name
    (guest.VDPA_DRIVERS / driver / "unbind").write_text(name)


def bind(name: str, driver: str) -> None:
    """Give an unbound device to a bus driver."""
    (guest.VDPA_DRIVERS / driver / "bind").write_text(name)


def disk() -> str:
    """Return the node of the disk, "" while the device is unbound or has the other driver."""
    node = guest.node_of("vd0")
    return "" if "vhost" in node else node


def use_vhost(name: str) -> None:
    """Move a device to vhost_vdpa, write and read there, and move it back."""
    override = guest.VDPA_DEVICES / name / "driver_override"
    unbind(name)
    override.write_text("vhost_vdpa")
    bind(name, "vhost_vdpa")
    node = guest.node_of(name)
    assert "vhost-vdpa" in node, node
    with vhost.VhostClient(node, queues=2) as driver:
        driver.start(enabled=(0, 1))
        last_sector = 32 * MIB // 512 - 8
        for queue in (0, 1):
            driver.submit(queue, vhost.T_OUT, last_sector, bytes([queue + 1]) * 4096)
            assert driver.finish(queue)[0] == 0
            driver.submit(queue, vhost.T_IN, last_sector, length=4096)
            assert driver.finish(queue)[1][:4096] == bytes([queue + 1]) * 4096
    unbind(name)
    override.write_text("virtio_vdpa")
    bind(name, "virtio_vdpa")


@check(limit_s=240)
def again_and_again_under_load() -> dict[str, object]:
    path = guest.image("binding.img", 32 * MIB)
    for journal in guest.WORK.glob("binding-*"):
        journal.unlink()
    with guest.device("vd0", f"file:{path}", queues=2, queue="irq_cpu = 0", by_command=True):
        pids = guest.pids_of("vd0")
        longest_s = 0.0
        with under_load("binding", disk, guest.WORK):
            for turn in range(TURNS):
                time.sleep(0.05 * (turn % 4))  # requests in flight, or the disk just found again
                started_s = time.monotonic()
                if turn % 12 == 5:
                    use_vhost("vd0")
                else:
                    unbind("vd0")
                    bind("vd0", "virtio_vdpa")
                longest_s = max(longest_s, time.monotonic() - started_s)
            time.sleep(1)
        assert guest.pids_of("vd0") == pids, "the server or a worker was replaced"
        after = guest.info("vd0")
        assert after["failure"] == "", after
        assert after["driver"] == "virtio_vdpa", after
        mask = (guest.VDUSE_CLASS / "vd0" / "vq0" / "irq_cb_affinity").read_text().strip()
        assert int(mask.replace(",", ""), 16) == 1, f"irq_cb_affinity after a rebind: {mask}"
    return {"longest_s": round(longest_s, 2)}


@check(limit_s=60)
def unbound_and_deleted() -> None:
    """A device that no driver has can be deleted too."""
    with guest.device("vd0", "memory:16M") as node:
        unbind("vd0")
        guest.wait_for("the disk to go", lambda: not Path(node).exists())
        assert guest.info("vd0")["node"] == ""
        assert guest.info("vd0")["driver"] == ""
