"""Find LVM physical volumes on a block device that is a store: LVM of this machine would find each of them twice.

Once on the store and once on the disk that is served from it. LVM then takes one of them, most often the store, which
we hold, and refuses to activate or change the volume group. Holding the store by O_EXCL does not keep LVM from looking
at it. What does is LVM's own choice of devices: `devices/global_filter` in lvm.conf, or LVM's devices file where it is
used, since LVM ignores filters then.
"""

from __future__ import annotations

import mmap
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdusefast.backends import Store

SYS = Path("/sys")
DEVICES_FILE = Path("/etc/lvm/devices/system.devices")
SECTOR_BYTES = 512
LABEL_SECTORS = 4  # the label is in one of these
LOOK_BYTES = 4096  # of which a read with O_DIRECT may be a multiple
PARTITIONS_MAX = 128
_UUID_GROUPS = (6, 4, 4, 4, 4, 4, 6)


def find_volume(data: bytes) -> str:
    """Return the UUID of the physical volume whose first sectors are `data`, as LVM prints it, "" when it is none."""
    for number in range(LABEL_SECTORS):
        label = data[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]
        fits = label.startswith(b"LABELONE") and label[24:32] == b"LVM2 001"
        start = int.from_bytes(label[20:24], "little")  # of the header in the sector
        if not fits or int.from_bytes(label[8:16], "little") != number or start + 32 > SECTOR_BYTES:
            continue
        text = label[start : start + 32]
        if text.isalnum():
            left, parts = text.decode("ascii"), []
            for length in _UUID_GROUPS:
                parts.append(left[:length])
                left = left[length:]
            return "-".join(parts)
    return ""


def find_volumes(store: Store) -> dict[str, str]:
    """Return the physical volumes that LVM sees on a store and its partitions: nodes, and the UUID on each.

    Raises OSError.
    """
    if not store.is_block_device or _is_logical_volume(store):
        return {}
    status = os.fstat(store.fd)
    entry = (SYS / "dev/block" / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}").resolve()
    starts = {entry.name: 0}
    for start in sorted(entry.glob("*/start"))[:PARTITIONS_MAX]:
        if (start.parent / "partition").exists():
            starts[start.parent.name] = int(start.read_text()) * SECTOR_BYTES
    unit = max(LOOK_BYTES, store.granule_bytes)
    found = {}
    for name, offset in starts.items():
        if uuid := find_volume(_read(store.fd, offset, unit)):
            found[f"/dev/{name}" if offset or not store.path.startswith("/dev/") else store.path] = uuid
    return found


def check(store: Store) -> None:
    """Append to the store's notes the remedy for physical volumes on a disk of this machine."""
    try:
        found = find_volumes(store)
    except OSError:
        return  # the next reader reports it
    if not found:
        return
    volumes = ", ".join(f"{uuid} on {node}" for node, uuid in found.items())
    store.notes.append(
        f"{store.uri} holds an LVM physical volume ({volumes}), which LVM of this machine finds twice, here and on "
        "the disk that is served: it takes the wrong one, or neither. Hide the store from LVM before the disk is used: "
        f"{_advice(list(found))}"
    )


def _advice(nodes: list[str]) -> str:
    """Return the setting that keeps LVM of this machine from scanning `nodes`."""
    if DEVICES_FILE.exists():
        removals = "".join(f"lvm lvmdevices --deldev {shlex.quote(node)}; " for node in nodes)
        return f"{removals}lvm lvmdevices --adddev /dev/vdX (the served disk, or its partition)"
    # In LVM's regular expressions a dot stands for the characters that mean something there.
    filters = ", ".join(f'"r|^{re.sub(r"[^A-Za-z0-9/_-]", ".", node)}$|"' for node in nodes)
    return f"in /etc/lvm/lvm.conf, section devices: global_filter = [ {filters} ]"


def _is_logical_volume(store: Store) -> bool:
    """Return whether the store is a logical volume of this machine, in which LVM does not look (devices/scan_lvs)."""
    return store.identity.get("name", "").startswith("dm/uuid=LVM-")


def _read(fd: int, offset_bytes: int, unit_bytes: int) -> bytes:
    """Return the first sectors at an offset, read with O_DIRECT's alignment; fewer at the end of the device."""
    begin = offset_bytes // unit_bytes * unit_bytes
    with mmap.mmap(-1, 2 * unit_bytes) as memory:
        count = os.preadv(fd, [memory], begin)
        return memory[:count][offset_bytes - begin : offset_bytes - begin + LABEL_SECTORS * SECTOR_BYTES]
