"""The users of a device's node: mounts, swap, other block devices, open descriptors, on the whole machine.

They are searched in the order in which a person can act on them. Opening the node exclusively finds the rest, which
another namespace may hide. Devices are compared by their numbers, because a node may have any name, and several.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vdusefast.host import device_nodes, loop_devices, mounts, processes

USERS_SHOWN_MAX = 5
SETTLE_TRIES = 4  # programs that probe every new or changed device (udev, blkid) end after a moment
SETTLE_PAUSE_S = 0.1


def find_users(node: str, root: Path = processes.ROOT) -> list[str]:
    """Return a phrase for each user of a block device or of a /dev/vhost-vdpa-N, such as "mounted on /mnt".

    node: "" has none. root: replaces / in tests, for /proc and /sys. Waits for programs that only probe it (udev).
    """
    return _settled(_read_target(node.removeprefix("/dev/"), root), root)


def find_users_of_number(number: int, root: Path = processes.ROOT) -> list[str]:
    """Return the same for a block device by its number. For a partition also the users of the whole disk."""
    directory = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if not directory.exists():
        return []
    target = _block_target(directory.resolve())
    users = _settled(target, root)
    if (directory / "partition").exists():
        disk = _block_target(directory.resolve().parent, partitions=False)
        users += [text for text in _settled(disk, root) if text not in users]
    return users


def related_numbers(number: int, root: Path = processes.ROOT) -> set[int]:
    """Return the numbers of a block device, of its partitions, and of the disk that it is a partition of."""
    directory = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if not directory.exists():
        return {number}
    found = {number, *_block_target(directory.resolve()).numbers}
    if (directory / "partition").exists():
        found |= set(_block_target(directory.resolve().parent, partitions=False).numbers)
    return found


def unseen_text(node: str) -> str:
    """Return why a user of a node may go unnoticed, "" where none can.

    Mounts, swap and other block devices are found in any case: the kernel refuses a second exclusive open.
    """
    if not node or processes.sees_all():
        return ""
    return (
        f"whether {node} is open cannot be seen from here: vdusefast runs in a PID namespace of its own (a container), "
        "which hides the machine's other processes"
    )


def pending_requests(node: str, root: Path = processes.ROOT) -> int:
    """Return how many requests of a block device are in flight in its driver; 0 for other nodes."""
    counts = processes.read(root / "sys/block" / Path(node).name / "inflight").split() if node else []
    return sum(int(count) for count in counts)


def refusal(name: str, node: str, users: list[str]) -> str:
    """Return the message for a device that is in use and so is not removed."""
    found = f"{name}: {node} is in use: {describe(users)}"
    if is_vhost(node):
        return f"{found}; removing it would wait for that without limit: end it first"
    return f"{found}; end that first, or --force"


def is_vhost(node: str) -> bool:
    """Return whether a node is a client's of vhost-vdpa, rather than a block device."""
    return node.startswith("/dev/vhost-vdpa")


def describe(users: list[str]) -> str:
    """Return users as one phrase, the first few by name."""
    more = len(users) - USERS_SHOWN_MAX
    return ", ".join(users[:USERS_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class _User:
    """A phrase that names a user of a node, and whether that use may end in a moment."""

    text: str
    passing: bool = False


@dataclass
class _Target:
    """A node as the kernel knows it: its directory in sysfs, and the numbers of the device and of its partitions."""

    directory: Path
    numbers: dict[int, str] = field(default_factory=dict)  # st_rdev -> name; the device itself comes first
    block: bool = True

    def matches(self, status: os.stat_result) -> bool:
        """Return whether a file is this device or one of its partitions."""
        return (stat.S_ISBLK if self.block else stat.S_ISCHR)(status.st_mode) and status.st_rdev in self.numbers


def _settled(target: _Target | None, root: Path) -> list[str]:
    """Return the users of a device, after programs that only probe it have ended."""
    if target is None:
        return []
    for _ in range(SETTLE_TRIES):
        users = _find_users(target, root)
        if not users or not all(user.passing for user in users):
            break
        time.sleep(SETTLE_PAUSE_S)
    return list(dict.fromkeys(user.text for user in users))


def _find_users(target: _Target, root: Path) -> list[_User]:
    users: list[_User] = []
    if target.block:
        users += _mounts(target, root)
        users += _swaps(target, root)
        users += _holders(target, root)
    users += _openers(target, root)
    if target.block and target.numbers and not users:
        users += _exclusive(target)
    return users


def _read_target(name: str, root: Path) -> _Target | None:
    """Return a node as sysfs describes it, None when there is no such device."""
    if not name:
        return None
    directory = root / "sys/block" / name
    if directory.is_dir():
        return _block_target(directory)
    for client in (root / "sys/bus/vdpa/devices").glob(f"*/{name}"):
        number = device_nodes.number_of(client)
        if number is not None:
            return _Target(client, {number: name}, block=False)
    return None


def _block_target(directory: Path, *, partitions: bool = True) -> _Target:
    target = _Target(directory)
    for each in (directory, *(entry.parent for entry in directory.glob("*/partition") if partitions)):
        number = device_nodes.number_of(each)
        if number is not None:
            target.numbers[number] = each.name
    return target


def _mounts(target: _Target, root: Path) -> Iterator[_User]:
    """Find mounts, in every mount namespace that /proc shows; each namespace is read once.

    The machine's own and ours come first: a mount that has spread from there is named once, without a namespace.
    """
    seen = set()
    points = set()
    known = (root / "proc/1", root / "proc/self")
    remote = mounts.remote_points(root / "proc/self")
    for process in (*known, *processes.list_processes(root)):
        namespace = processes.mount_namespace(process)
        if namespace in seen:
            continue
        found = mounts.read_mounts(process)
        if not found:
            continue  # it has just ended: another process shows the namespace
        seen.add(namespace)
        where = "" if process in known else f" in the mount namespace of {processes.command(process)}"
        for mount in found:
            if mount.point in points:
                continue
            # btrfs and others show a number of their own there: use the source then.
            has_source = os.major(mount.number) == 0 and mount.source.startswith("/") and not mount.is_remote
            if mount.number in target.numbers or (has_source and _is_node(mount.source, target, remote)):
                points.add(mount.point)
                yield _User(f"mounted on {mount.point}{where}")


def _is_node(path: str, target: _Target, remote: tuple[str, ...]) -> bool:
    try:
        return not path.startswith(remote) and target.matches(os.stat(path))
    except OSError:
        return False


def _swaps(target: _Target, root: Path) -> Iterator[_User]:
    remote = mounts.remote_points(root / "proc/self")
    for line in processes.read(root / "proc/swaps").splitlines()[1:]:
        path = mounts.unescape(line.split()[0]) if line.split() else ""
        if path.startswith("/") and _is_node(path, target, remote):
            yield _User(f"swap on {path}")


def _holders(target: _Target, root: Path) -> Iterator[_User]:
    """Find block devices built on it: dm, md, bcache; a file system of several devices; and loop devices."""
    directory = target.directory
    for holders in (directory / "holders", *(directory.glob("*/holders") if len(target.numbers) > 1 else ())):
        for holder in sorted(holders.iterdir()) if holders.is_dir() else ():
            name = processes.read(holder / "dm/name").strip()
            yield _User(f"used by {holder.name}" + (f" ({name})" if name else ""))
    for member in (root / "sys/fs/btrfs").glob("*/devices/*"):
        if member.name in target.numbers.values():
            yield _User(f"used by the btrfs {member.parts[-3]}")
    for loop in loop_devices.find(root):
        if loop.block_device in target.numbers:
            yield _User(f"used by {loop.name}")


def _openers(target: _Target, root: Path) -> Iterator[_User]:
    """Find processes, other than this one, with a descriptor of it. A client of vhost-vdpa is never a passing one."""
    remote: dict[str, tuple[str, ...]] = {}
    for process in processes.list_processes(root):
        if process.name == str(os.getpid()):
            continue
        try:
            descriptors = os.listdir(process / "fd")
        except OSError:
            continue  # it has ended, or belongs to another user
        namespace = processes.mount_namespace(process)
        if namespace not in remote:
            remote[namespace] = mounts.remote_points(process)
        if any(_leads_to(process / "fd" / fd, target, remote[namespace]) for fd in descriptors):
            yield _User(f"open by {processes.command(process)}", passing=target.block)


def _leads_to(descriptor: Path, target: _Target, remote: tuple[str, ...]) -> bool:
    try:
        path = os.readlink(descriptor)
        return path.startswith("/") and not path.startswith(remote) and target.matches(os.stat(descriptor))
    except OSError:
        return False


def _exclusive(target: _Target) -> Iterator[_User]:
    """Find out whether a block device is held exclusively, in any namespace: by a mount, swap, dm.

    Never asked of /dev/vhost-vdpa-N: opening that resets the device.
    """
    number, name = next(iter(target.numbers.items()))
    try:
        os.close(device_nodes.open_block(f"/dev/{name}", number, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.EBUSY:
            yield _User("held by a process or a mount that cannot be seen from here", passing=True)
        elif error.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
            yield _User(f"perhaps held by another container, which cannot be asked: {error.strerror}")
