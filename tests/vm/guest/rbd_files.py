"""In a guest: a file system on a disk over an image of Ceph RBD, whose cluster is on the host.

Arguments: the URI, and the ports that the cluster listens on.
"""

from __future__ import annotations

import sys

import forward
import guest
from guest import MIB
from scenario_filesystem import live_on


def main(uri: str, *ports: str) -> None:
    guest.prepare()
    forward.start([int(port) for port in ports])
    with guest.device("vd0", uri) as node:
        count = live_on(node, ["mkfs.ext4", "-q", "-F"], ["e2fsck", "-f", "-n"], 2 * MIB)
    print(f"{count} files are as they were")


if __name__ == "__main__":
    main(*sys.argv[1:])
