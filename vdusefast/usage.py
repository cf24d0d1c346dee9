"""Who uses a device's node: mounts, swap, other block devices, open descriptors, on the whole machine.

What the kernel shows is looked at in the order of what a person can do about it; opening the node exclusively finds the
rest, which another namespace may hide.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

USERS_SHOWN_MAX = 5
SETTLE_TRIES = 4  # what looks at every new or changed device (udev, blkid) is gone after a moment
SETTLE_PAUSE_S = 0.1
# Where asking for a file's status may wait for another machine, or for a process such as ours.
REMOTE_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "afs", "gfs", "ocfs", "lustre", "gluster")


def find_users(node: str, root: Path = Path("/")) -> list[str]:
    """Return a phrase for each user of a block device or of a /dev/vhost-vdpa-N, such as "mounted on /mnt".

    node: "" has none. root: stands in for / in tests, for /proc and /sys. What only looks (udev) is waited for.
    """
    for _ in range(SETTLE_TRIES):
        users = _find_users(node, root)
        if not users or not all(user.passing for user in users):
            break
        time.sleep(SETTLE_PAUSE_S)
    return list(dict.fromkeys(user.text for user in users))


def pending_requests(node: str, root: Path = Path("/")) -> int:
    """Return how many requests of a block device its driver waits for; 0 for other nodes."""
    words = _read(root / "sys/block" / Path(node).name / "inflight").split() if node else []
    return sum(int(word) for word in words)


def describe(users: list[str]) -> str:
    """Return users as one phrase, the first few by name."""
    more = len(users) - USERS_SHOWN_MAX
    return ", ".join(users[:USERS_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class _User:
    """A phrase that tells who uses a node, and whether it may be over in a moment."""

    text: str
    passing: bool = False


@dataclass
class _Target:
    """A node as the kernel knows it: numbers of the device, and of its partitions."""

    name: str
    numbers: dict[int, str] = field(default_factory=dict)  # st_rdev -> name
    block: bool = True

    def matches(self, status: os.stat_result) -> bool:
        """Return whether a file is this device or one of its partitions."""
        return (stat.S_ISBLK if self.block else stat.S_ISCHR)(status.st_mode) and status.st_rdev in self.numbers


def _find_users(node: str, root: Path) -> list[_User]:
    target = _read_target(node.removeprefix("/dev/"), root)
    if target is None:
        return []
    users: list[_User] = []
    if target.block:
        users += _mounts(target, root)
        users += _swaps(target, root)
        users += _holders(target, root)
    users += _openers(target, root)
    if target.block and not users and _is_exclusive(node, target):
        users.append(_User("held by a process or a mount that cannot be seen from here", passing=True))
    return users


def _read_target(name: str, root: Path) -> _Target | None:
    """Return what sysfs knows of a node, None when there is no such device."""
    if not name:
        return None
    directory = root / "sys/block" / name
    if not directory.is_dir():
        numbers = map(_number, (root / "sys/bus/vdpa/devices").glob(f"*/{name}"))
        return next((_Target(name, {number: name}, block=False) for number in numbers if number is not None), None)
    target = _Target(name)
    for each in (directory, *(entry.parent for entry in directory.glob("*/partition"))):
        number = _number(each)
        if number is not None:
            target.numbers[number] = each.name
    return target


def _number(directory: Path) -> int | None:
    try:
        major, minor = (directory / "dev").read_text().split(":")
        return os.makedev(int(major), int(minor))
    except (OSError, ValueError):
        return None


def _processes(root: Path) -> Iterator[Path]:
    for entry in os.listdir(root / "proc"):
        if entry.isdecimal():
            yield root / "proc" / entry


def _command(process: Path) -> str:
    """Return "pid N (command)"."""
    name = _read(process / "comm").strip()
    return f"pid {process.name} ({name})" if name else f"pid {process.name}"


def _read(path: Path) -> str:
    """Return a file's text, "" when the process or device is gone or hides it."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class _Mount:
    number: int
    point: str
    kind: str
    source: str


def _read_mounts(text: str) -> list[_Mount]:
    """Return the lines of a mountinfo file (proc(5))."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) < 5 or len(kind) < 2:
            continue
        major, _, minor = words[2].partition(":")
        mounts.append(_Mount(os.makedev(int(major), int(minor)), _unescape(words[4]), kind[0], _unescape(kind[1])))
    return mounts


def _unescape(text: str) -> str:
    """Return a path of mountinfo or swaps, which write blanks as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _mounts(target: _Target, root: Path) -> Iterator[_User]:
    """Find mounts, in every mount namespace that /proc shows; each namespace is read once.

    The machine's own and ours come first: a mount that has spread from there is named once, without a namespace.
    """
    seen = set()
    points = set()
    known = (root / "proc/1", root / "proc/self")
    for process in (*known, *_processes(root)):
        namespace = _namespace(process)
        if namespace in seen:
            continue
        seen.add(namespace)
        where = "" if process in known else f" in the mount namespace of {_command(process)}"
        for mount in _read_mounts(_read(process / "mountinfo")):
            # btrfs and others show a number of their own there: the source tells then.
            if mount.point in points:
                continue
            if mount.number in target.numbers or _is_node(mount.source, target):
                points.add(mount.point)
                yield _User(f"mounted on {mount.point}{where}")


def _namespace(process: Path) -> str:
    try:
        return os.readlink(process / "ns/mnt")
    except OSError:
        return process.name


def _is_node(path: str, target: _Target) -> bool:
    if not path.startswith("/dev/"):
        return False
    try:
        return target.matches(os.stat(path))
    except OSError:
        return False


def _swaps(target: _Target, root: Path) -> Iterator[_User]:
    for line in _read(root / "proc/swaps").splitlines()[1:]:
        path = _unescape(line.split()[0]) if line.split() else ""
        if _is_node(path, target):
            yield _User(f"swap on {path}")


def _holders(target: _Target, root: Path) -> Iterator[_User]:
    """Find block devices built on it: dm, md, bcache; and loop devices, which are no holders."""
    directory = root / "sys/block" / target.name
    for holders in (directory / "holders", *directory.glob("*/holders")):
        for holder in sorted(holders.iterdir()) if holders.is_dir() else ():
            name = _read(holder / "dm/name").strip()
            yield _User(f"used by {holder.name}" + (f" ({name})" if name else ""))
    for loop in (root / "sys/block").glob("loop*/loop/backing_file"):
        if _is_node(_read(loop).strip(), target):
            yield _User(f"used by {loop.parts[-3]}")


def _openers(target: _Target, root: Path) -> Iterator[_User]:
    """Find processes, other than this one, with a descriptor of it. A client of vhost-vdpa is never a passing one."""
    remote: dict[str, tuple[str, ...]] = {}
    for process in _processes(root):
        if process.name == str(os.getpid()):
            continue
        try:
            descriptors = os.listdir(process / "fd")
        except OSError:
            continue  # it has ended, or is somebody else's
        namespace = _namespace(process)
        if namespace not in remote:
            remote[namespace] = _remote_points(process)
        if any(_leads_to(process / "fd" / fd, target, remote[namespace]) for fd in descriptors):
            yield _User(f"open by {_command(process)}", passing=target.block)


def _remote_points(process: Path) -> tuple[str, ...]:
    """Return where file systems are mounted on which a look at a file may take for ever."""
    mounts = _read_mounts(_read(process / "mountinfo"))
    return tuple(
        f"{mount.point}/" for mount in mounts if mount.kind.startswith(REMOTE_FILE_SYSTEMS) and mount.point != "/"
    )


def _leads_to(descriptor: Path, target: _Target, remote: tuple[str, ...]) -> bool:
    try:
        path = os.readlink(descriptor)
        return path.startswith("/") and not path.startswith(remote) and target.matches(os.stat(descriptor))
    except OSError:
        return False


def _is_exclusive(node: str, target: _Target) -> bool:
    """Return whether somebody holds a block device exclusively, in whatever namespace: a mount, swap, dm.

    Never asked of /dev/vhost-vdpa-N: opening that resets the device.
    """
    flags = os.O_RDONLY | os.O_EXCL
    try:
        status = os.stat(node)
        if not target.matches(status):
            return False
        os.close(os.open(node, flags | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
