"""In a guest: a file system on a disk over an image of Ceph RBD, whose cluster is on the host.

Arguments: the URI, and the ports that the cluster listens on.
"""

from __future__ import annotations

import sys

import forward
import guest
from guest import MIB
from scenario_filesystem import MOUNT, differences, fill


def main(uri: str, *ports: str) -> None:
    guest.prepare()
    forward.start([int(port) for port in ports])
    MOUNT.mkdir(exist_ok=True)
    with guest.device("vd0", uri) as node:
        guest.sh("mkfs.ext4", "-q", "-F", node, timeout_s=60)
        guest.sh("mount", node, MOUNT)
        try:
            files = fill(MOUNT, 2 * MIB)
        finally:
            guest.sh("umount", MOUNT, timeout_s=60)
        guest.sh("blockdev", "--flushbufs", node)
        guest.sh("mount", node, MOUNT)
        try:
            assert differences(MOUNT, files) == []
            guest.sh("fstrim", MOUNT)
            assert differences(MOUNT, files) == []
        finally:
            guest.sh("umount", MOUNT, timeout_s=60)
        guest.sh("e2fsck", "-f", "-n", node, timeout_s=60)
    print(f"{len(files)} files are as they were")


if __name__ == "__main__":
    main(*sys.argv[1:])
