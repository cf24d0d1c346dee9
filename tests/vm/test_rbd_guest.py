"""A file system in a guest, on an image of a Ceph cluster on the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ceph_rig import Cluster

from bench.vm import cache, guest
from bench.vm.kernel_log import findings
from bench.vm.machine import RESULTS, ROOT, GuestConfig

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(240)]

SCRIPT = ROOT / "tests/vm/guest/rbd_files.py"


def test_file_system_on_an_image_is_whole(ceph: Cluster, tmp_path: Path) -> None:
    ceph.make_image("guest", "64M")
    keyring = (ceph.directory / "keyring").read_text()
    (tmp_path / "keyring").write_text(keyring)
    # The guest does not see the cluster's directory.
    (tmp_path / "ceph.conf").write_text(ceph.conf.read_text().replace(str(ceph.directory), RESULTS))
    uri = f"rbd:rbd/guest?conf={RESULTS}/ceph.conf&id=test"
    config = GuestConfig(
        kernel=cache.KERNELS[-1],
        timeout_s=180,
        network=True,
        modules=("vduse", "virtio_vdpa", "virtio_blk", "ext4"),
        results=tmp_path,
    )
    outcome, out, err = guest.captured(config, ["python", str(SCRIPT), uri, *map(str, ceph.ports())])
    assert outcome.status == 0, f"{out}{err}{outcome.kernel_log[-2000:]}"
    assert "files are as they were" in out
    assert findings(outcome.kernel_log) == []
    # And what the cluster has is that file system.
    image = tmp_path / "image"
    ceph.rbd("export", "rbd/guest", str(image))
    subprocess.run(["e2fsck", "-f", "-n", str(image)], check=True, capture_output=True, timeout=60)
