"""Before any module is loaded: one line with the remedy, and nothing left."""

from __future__ import annotations

from pathlib import Path

import guest
from checks import check


@check(limit_s=60)
def none_is_loaded() -> str:
    assert not Path("/dev/vduse/control").exists(), "vduse is loaded already"
    config = guest.write_config("vd0", "memory:16M")
    return guest.refused("add", config, status=5, says="modprobe -a vduse virtio_vdpa virtio_blk", by_command=True)


@check(limit_s=60)
def check_says_what_to_load() -> None:
    done = guest.attempt_in_copy("check")
    assert "modprobe" in done.stdout, done.stdout + done.stderr


@check(limit_s=60)
def no_virtio_vdpa() -> str:
    guest.sh("modprobe", "-a", "vduse", "virtio_blk")
    return guest.refused("add", guest.write_config("vd0", "memory:16M"), status=5, says="modprobe -a virtio_vdpa ")


@check(limit_s=60)
def no_vhost_vdpa() -> str:
    config = guest.write_config("vd0", "memory:16M", bus="vhost")
    return guest.refused("add", config, status=5, says="modprobe -a vhost_vdpa ")


@check(limit_s=90)
def vhost_by_the_only_driver() -> None:
    """And then virtio_vdpa is loaded after vhost_vdpa: both buses can still be had, by driver_override."""
    guest.sh("modprobe", "-a", "vduse", "virtio_blk", "vhost_vdpa")
    with guest.device("vd0", "memory:16M", bus="vhost") as node:
        assert "vhost-vdpa" in node
    guest.sh("modprobe", "virtio_vdpa")
    with guest.device("vd0", "memory:16M") as node:
        assert Path(node).is_block_device()
        assert guest.info("vd0")["driver"] == "virtio_vdpa"
    with guest.device("vd0", "memory:16M", bus="vhost"):
        assert guest.info("vd0")["driver"] == "vhost_vdpa"


@check(limit_s=90)
def virtio_vdpa_loaded_first() -> None:
    """The other order; both stay loaded for the checks that follow."""
    guest.sh("modprobe", "-r", "virtio_vdpa")
    guest.sh("modprobe", "-r", "vhost_vdpa")
    guest.sh("modprobe", "virtio_vdpa")
    guest.sh("modprobe", "vhost_vdpa")
    with guest.device("vd0", "memory:16M", bus="vhost"):
        assert guest.info("vd0")["driver"] == "vhost_vdpa"
    with guest.device("vd0", "memory:16M"):
        assert guest.info("vd0")["driver"] == "virtio_vdpa"
