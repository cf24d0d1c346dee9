"""The users of a device's node: from a made-up /proc and /sys, and for real on a loop device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdusefast.host import node_users, processes

ZERO = "1:5"  # the number of /dev/zero, which stands in for a client's node


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a / with one disk vdx, number 253:16, that has one partition and that nobody uses."""
    monkeypatch.setattr(node_users, "SETTLE_PAUSE_S", 0.0)
    for name, number in (("vdx", "253:16"), ("vdx/vdx1", "253:17")):
        (tmp_path / f"sys/block/{name}/holders").mkdir(parents=True)
        (tmp_path / f"sys/block/{name}/dev").write_text(f"{number}\n")
    (tmp_path / "sys/block/vdx/vdx1/partition").write_text("1\n")
    add_process(tmp_path, "self", "1")
    add_process(tmp_path, "1", "1")
    return tmp_path


def add_process(root: Path, pid: str, namespace: str, mountinfo: str = "") -> None:
    process = root / "proc" / pid
    (process / "fd").mkdir(parents=True)
    (process / "ns").mkdir()
    (process / "ns/mnt").symlink_to(f"mnt:[{namespace}]")
    (process / "comm").write_text("daemon\n")
    (process / "mountinfo").write_text("22 1 0:5 / / rw - ext4 /dev/sda1 rw\nshort line\n" + mountinfo)


def test_nobody(root: Path) -> None:
    assert node_users.find_users("/dev/vdx", root) == []
    assert node_users.find_users("/dev/none", root) == []
    assert node_users.find_users("", root) == []


def test_mounts_are_found_in_every_namespace_once(root: Path) -> None:
    (root / "proc/1/mountinfo").write_text("30 22 253:16 / /srv/a\\040b rw,relatime shared:1 - ext4 /dev/vdx rw\n")
    add_process(root, "77", "2", "30 22 253:17 / /there rw - xfs /dev/vdx1 rw\n")
    add_process(root, "78", "2", "30 22 253:17 / /there rw - xfs /dev/vdx1 rw\n")
    assert node_users.find_users("/dev/vdx", root) == [
        "mounted on /srv/a b",
        "mounted on /there in the mount namespace of pid 77 (daemon)",
    ]


def test_holders_of_disk_and_partition(root: Path) -> None:
    (root / "sys/block/vdx/holders/md0").mkdir()
    (root / "sys/block/vdx/vdx1/holders/dm-3/dm").mkdir(parents=True)
    (root / "sys/block/vdx/vdx1/holders/dm-3/dm/name").write_text("vg-root\n")
    assert node_users.find_users("/dev/vdx", root) == ["used by md0", "used by dm-3 (vg-root)"]


def test_member_of_a_btrfs_of_several_devices_is_found(root: Path) -> None:
    """Its mount shows one of them only."""
    members = root / "sys/fs/btrfs/1234-abcd/devices"
    members.mkdir(parents=True)
    (members / "vdy").mkdir()
    assert node_users.find_users("/dev/vdx", root) == []
    (members / "vdx1").mkdir()
    assert node_users.find_users("/dev/vdx", root) == ["used by the btrfs 1234-abcd"]


def test_users_are_named_up_to_a_limit() -> None:
    assert node_users.describe(["a", "b"]) == "a, b"
    assert node_users.describe([*"abcdefg"]) == "a, b, c, d, e and 2 more"


@pytest.fixture
def reader() -> Iterator[Callable[[str], int]]:
    """Return a function that starts a process which holds a file open, and returns its pid."""
    processes = []

    def start(path: str) -> int:
        code = "import sys; file = open(sys.argv[1], 'rb', 0); print(flush=True); sys.stdin.read()"
        words = [sys.executable, "-c", code, path]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process.pid

    yield start
    for process in processes:
        process.communicate(timeout=10)


def test_client_of_vhost_is_found_by_its_descriptor(
    root: Path, reader: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's number is that of /dev/zero, which a process of ours holds."""
    (root / "sys/bus/vdpa/devices/vd0/vhost-vdpa-3").mkdir(parents=True)
    (root / "sys/bus/vdpa/devices/vd0/vhost-vdpa-3/dev").write_text(f"{ZERO}\n")
    assert f"{os.major(os.stat('/dev/zero').st_rdev)}:{os.minor(os.stat('/dev/zero').st_rdev)}" == ZERO
    shutil.rmtree(root / "proc")
    (root / "proc").symlink_to("/proc")
    pid = reader("/dev/zero")
    command = Path(f"/proc/{pid}/comm").read_text().strip()
    assert f"open by pid {pid} ({command})" in node_users.find_users("/dev/vhost-vdpa-3", root)
    assert node_users.find_users("/dev/vhost-vdpa-4", root) == []


def test_descriptors_on_remote_file_systems_are_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for their status may wait for another machine for ever."""
    add_process(root, "77", "1", "30 22 0:50 / /far rw - nfs4 host:/ rw\n31 22 0:51 / / rw - 9p share rw\n")
    (root / "proc/77/fd/3").symlink_to("/far/away")
    (root / "proc/77/fd/4").symlink_to("/dev/zero")
    (root / "proc/77/fd/5").symlink_to("socket:[12]")
    asked = []
    true_stat = os.stat

    def stat(path: Path, *args: object, **kwargs: object) -> os.stat_result:
        asked.append(str(path))
        return true_stat(path)

    monkeypatch.setattr(node_users.os, "stat", stat)
    assert node_users.find_users("/dev/vdx", root) == []
    looked = {path.rpartition("/")[2] for path in asked if "/77/fd/" in path}
    assert looked == {"4"}


@pytest.fixture
def loop(tmp_path: Path, attach_loop: Callable[[Path], str]) -> str:
    """Return the node of a loop device with 32 MiB."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    return attach_loop(image)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=20)


@pytest.mark.loop_device
def test_real_opener_is_found_and_ours_does_not_count(loop: str, reader: Callable[[str], int]) -> None:
    assert node_users.find_users(loop) == []
    with open(loop, "rb"):
        assert node_users.find_users(loop) == []
    pid = reader(loop)
    command = Path(f"/proc/{pid}/comm").read_text().strip()
    assert node_users.find_users(loop) == [f"open by pid {pid} ({command})"]


@pytest.mark.loop_device
def test_real_mount_is_found(loop: str, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", loop)
    point = tmp_path / "a point"
    point.mkdir()
    run("mount", loop, str(point))
    try:
        assert node_users.find_users(loop) == [f"mounted on {point}"]
    finally:
        run("umount", str(point))
    assert node_users.find_users(loop) == []


@pytest.mark.loop_device
def test_exclusive_use_that_nothing_shows_is_found(loop: str, tmp_path: Path) -> None:
    """As by a mount in a container whose processes are hidden: our own exclusive descriptor stands in for it."""
    fd = os.open(loop, os.O_RDONLY | os.O_EXCL)
    try:
        assert node_users.find_users(loop) == ["held by a process or a mount that cannot be seen from here"]
    finally:
        os.close(fd)


@pytest.mark.loop_device
def test_swap_is_found_by_its_number(loop: str, root: Path, tmp_path: Path) -> None:
    """The kernel's files are made up: to swap for real would move this machine's memory. A guest does."""
    node = tmp_path / "a node"
    os.mknod(node, os.stat(loop).st_mode, os.stat(loop).st_rdev)
    name = loop.removeprefix("/dev/")
    escaped = str(node).replace(" ", "\\040")
    (root / "proc/swaps").write_text(f"Filename Type Size Used Priority\n{escaped} partition 1 0 -2\n")
    (root / f"sys/block/{name}").mkdir()
    shutil.copy(f"/sys/block/{name}/dev", root / f"sys/block/{name}/dev")
    assert node_users.find_users(loop, root) == [f"swap on {node}"]


@pytest.mark.loop_device
def test_loop_device_over_it_is_found_by_any_name(loop: str, tmp_path: Path, attach_loop: Callable[..., str]) -> None:
    """As kubelet holds a raw block volume: by a bind mount of its node, which is no path below /dev."""
    volume = tmp_path / "kubelet/volumeDevices/pod"
    volume.parent.mkdir(parents=True)
    volume.touch()
    run("mount", "--bind", loop, str(volume))
    try:
        outer = attach_loop(volume)
    finally:
        run("umount", "--lazy", str(volume))  # whose path means nothing any more
    assert node_users.find_users(loop) == [f"used by {outer.removeprefix('/dev/')}"]
    # Where /dev has no node for it, as in a container, one is made for the question.
    inner = "import sys; from vdusefast.host import node_users; print(node_users.find_users(sys.argv[1]))"
    command = 'mount -t tmpfs none /dev && exec "$0" -c "$1" "$2"'
    words = ("unshare", "--mount", "sh", "-c", command, sys.executable, inner, loop)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"['used by {outer.removeprefix('/dev/')}']", done.stderr


@pytest.mark.loop_device
def test_mount_in_another_mount_namespace_is_found(loop: str, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", loop)
    command = f'mount "{loop}" "{tmp_path}" && echo mounted && read line'
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", command]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mounted\n"
        try:
            assert node_users.find_users(loop) == [
                f"mounted on {tmp_path} in the mount namespace of pid {process.pid} (sh)"
            ]
        finally:
            process.communicate(b"\n", timeout=60)


@pytest.mark.slow
@pytest.mark.loop_device
def test_partition_and_its_disk_count_as_one(loop: str, tmp_path: Path) -> None:
    run("addpart", loop, "1", "2048", "32768")
    part = f"{loop}p1"
    run("mkfs.ext4", "-q", part)
    number = os.stat(part).st_rdev
    assert node_users.find_users_of_number(number) == []
    run("mount", part, str(tmp_path))
    try:
        assert node_users.find_users(loop) == [f"mounted on {tmp_path}"]
        assert node_users.find_users_of_number(number)[0] == f"mounted on {tmp_path}"
        assert node_users.related_numbers(number) == {number, os.stat(loop).st_rdev}
        assert node_users.related_numbers(os.stat(loop).st_rdev) == {number, os.stat(loop).st_rdev}
    finally:
        run("umount", str(tmp_path))
        run("delpart", loop, "1")


def test_whether_all_processes_can_be_seen(tmp_path: Path) -> None:
    for number, links, sees in (
        (1, {"self": "4026531836", "1": "4026531836"}, True),
        (2, {"self": "4026532000", "1": "4026531836"}, True),  # in a PID namespace, with the machine's /proc
        (3, {"self": "4026531836"}, True),  # without the right to look at process 1
        (4, {"self": "4026532000", "1": "4026532000"}, False),
        (5, {}, False),
    ):
        for process, namespace in links.items():
            directory = tmp_path / f"{number}/proc/{process}/ns"
            directory.mkdir(parents=True)
            (directory / "pid").symlink_to(f"pid:[{namespace}]")
        assert processes.sees_all(tmp_path / str(number)) == sees


@pytest.mark.loop_device
def test_pid_namespace_of_our_own_is_noticed() -> None:
    """The marker is for its needs: root, who may make one."""
    code = "from vdusefast.host.node_users import unseen_text as t; print(t('/dev/vdx')); print(t(''))"
    words = ("unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code)
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert first.startswith("whether /dev/vdx is open cannot be seen from here: vdusefast runs in a PID namespace")
    assert second == ""
