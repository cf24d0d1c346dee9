"""The mounts in /proc/PID/mountinfo (proc(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vdusefast.host import processes

# File systems on which stat(2) may wait for another machine, or for a process such as ours.
REMOTE_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "afs", "gfs", "ocfs", "lustre", "gluster")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    number: int  # st_dev of its files; btrfs and others show one that no block device has
    point: str
    kind: str
    source: str

    @property
    def is_remote(self) -> bool:
        """Whether stat(2) of one of its files may take for ever."""
        return self.kind.startswith(REMOTE_FILE_SYSTEMS)


def read_mounts(process: Path) -> list[Mount]:
    """Return the mounts that a process sees; none when it has ended or hides them. process: its directory in /proc."""
    mounts = []
    for line in processes.read(process / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 2:
            continue
        major, _, minor = fields[2].partition(":")
        mounts.append(Mount(os.makedev(int(major), int(minor)), unescape(fields[4]), kind[0], unescape(kind[1])))
    return mounts


def remote_points(process: Path) -> tuple[str, ...]:
    """Return the mount points of file systems on which stat(2) may take for ever."""
    return tuple(f"{mount.point}/" for mount in read_mounts(process) if mount.is_remote and mount.point != "/")


def unescape(text: str) -> str:
    """Return a path of mountinfo or /proc/swaps, which write blanks as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
