"""Programs that may not use a store while we do, and the other way round: QEMU's, loop devices, mounts, udev."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vdusefast import Device, make_config
from vdusefast.backends import Store, open_store
from vdusefast.backends.file import find_loops
from vdusefast.config import BackendConfig
from vdusefast.errors import DeviceBusyError

SIZE = 4 << 20
WAIT_S = 60.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def open_path(path: Path | str, *, read_only: bool = False, claim: bool = True) -> Store:
    return open_store(BackendConfig(uri=f"file:{path}"), read_only=read_only, claim=claim)


def qemu_io(path: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one command of qemu-io's on a raw image."""
    words = ("qemu-io", *words, "-f", "raw", "-c", command, str(path))
    return subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)


@contextmanager
def storage_daemon(path: Path, *, read_only: bool) -> Iterator[int]:
    """Have qemu-storage-daemon use an image, as a virtual machine does. Yields its pid."""
    socket = path.with_suffix(".sock")
    node = f"driver=raw,node-name=disk,read-only={'on' if read_only else 'off'},file.driver=file,file.filename={path}"
    export = f"type=nbd,id=export,node-name=disk,writable={'off' if read_only else 'on'}"
    words = ["qemu-storage-daemon", "--blockdev", node, "--nbd-server", f"addr.type=unix,addr.path={socket}"]
    with subprocess.Popen([*words, "--export", export], stderr=subprocess.PIPE, text=True) as daemon:
        try:
            deadline = time.monotonic() + WAIT_S
            while not socket.exists():
                assert daemon.poll() is None, daemon.stderr and daemon.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            # It listens before it exports: the locks of a writer come with the export.
            while "OFDLCK" not in locks_of(daemon.pid, path):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield daemon.pid
        finally:
            daemon.terminate()
            daemon.wait(WAIT_S)


def locks_of(pid: int, path: Path) -> str:
    """Return what a process has locked of a file, as fdinfo says."""
    found = []
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        found += [line for line in entry.read_text().splitlines() if f":{path.stat().st_ino} " in line]
    return "\n".join(found)


def test_image_that_qemu_writes_to_is_refused_and_qemu_named(image: Path) -> None:
    with storage_daemon(image, read_only=False) as pid:
        for read_only in (False, True):
            with pytest.raises(DeviceBusyError, match=rf"disk\.img: in use by pid {pid} \(qemu-storage-da"):
                open_path(image, read_only=read_only)
    open_path(image).close()


def test_image_that_qemu_reads_is_served_read_only(image: Path) -> None:
    with storage_daemon(image, read_only=True) as pid:
        open_path(image, read_only=True).close()
        with pytest.raises(DeviceBusyError, match=rf"pid {pid} \(qemu-storage-da"):
            open_path(image)


def test_image_that_we_write_to_is_refused_by_qemu(image: Path) -> None:
    with open_path(image):
        done = qemu_io(image, "write 0 512")
        assert done.returncode != 0
        assert 'Failed to get "write" lock' in done.stderr, done.stderr
        # Readers that do not mind get in, as beside a virtual machine.
        assert qemu_io(image, "read 0 512", "-r").returncode == 0
        subprocess.run(["qemu-img", "info", "-U", str(image)], check=True, capture_output=True, timeout=WAIT_S)
    assert qemu_io(image, "write 0 512").returncode == 0


def test_image_that_we_read_may_be_read_by_qemu_but_not_written(image: Path) -> None:
    with open_path(image, read_only=True):
        assert qemu_io(image, "read 0 512", "-r").returncode == 0
        done = qemu_io(image, "write 0 512")
        assert 'Failed to get "write" lock' in done.stderr, done.stderr


@pytest.mark.slow
def test_workers_keep_the_locks_and_their_device_is_named(image: Path, tmp_path: Path) -> None:
    """All processes of a device share them; closing other descriptors of the file releases none."""
    base = tmp_path / "run"
    base.mkdir()
    with Device(make_config(name="shares", uri=f"file:{image}", queues=2), run_dir=base) as device:
        for pid in [queue.pid for queue in device.stats().queues]:
            assert "OFDLCK" in locks_of(pid, image)
        with device.driver() as driver:
            driver.write(0, b"x" * 512)
            image.read_bytes()
            assert driver.read(0, 512) == b"x" * 512
        assert 'Failed to get "write" lock' in qemu_io(image, "write 0 512").stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VDUSEFAST_RUN_DIR", str(base))
            with pytest.raises(
                DeviceBusyError, match=rf"in use by the vdusefast device shares \(pid {os.getpid()}\); end that first"
            ):
                open_path(image)
    assert qemu_io(image, "write 0 512").returncode == 0


def test_look_beside_a_server_takes_and_needs_no_lock(image: Path) -> None:
    with open_path(image):
        open_path(image, claim=False).close()
        assert 'Failed to get "write" lock' in qemu_io(image, "write 0 512").stderr


def test_failed_attempt_leaves_no_lock(image: Path) -> None:
    reader = open_path(image, read_only=True)
    with pytest.raises(DeviceBusyError):
        open_path(image)
    assert qemu_io(image, "read 0 512", "-r").returncode == 0
    reader.close()


def test_lock_that_is_held_for_a_moment_is_waited_for(image: Path) -> None:
    code = "import fcntl, sys, time; fcntl.flock(0, fcntl.LOCK_EX); print(flush=True); time.sleep(0.1)"
    with image.open("rb") as file, subprocess.Popen([sys.executable, "-c", code], stdin=file, stdout=-1) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        file.close()
        open_path(image).close()


@pytest.mark.slow
@pytest.mark.parametrize("read_only", [False, True])
def test_file_system_without_locks_says_what_to_do(image: Path, tmp_path: Path, read_only: bool) -> None:
    """The kernel's answer is the one of NFS without lock manager: strace puts it in place of the real one."""
    code = (
        "import sys; from vdusefast.backends import open_store; from vdusefast.config import BackendConfig\n"
        f"open_store(BackendConfig(uri='file:{image}'), read_only={read_only})"
    )
    for call in ("flock", "fcntl"):
        # Only of locks: the interpreter uses fcntl(2) for other things, on other files.
        words = ["strace", "-f", "-o", str(tmp_path / "trace"), "-P", str(image), "-e", f"inject={call}:error=ENOLCK"]
        done = subprocess.run([*words, sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert re.search(r"disk\.img: cannot be locked .*No locks available.*rpc\.statd.*vers=4.*nolock", last), last


@pytest.fixture
def loop(image: Path, attach_loop: Callable[..., str]) -> str:
    return attach_loop(image)


@pytest.mark.loop_device
def test_image_with_a_loop_device_is_refused(image: Path, tmp_path: Path, loop: str) -> None:
    other = tmp_path / "link"
    other.symlink_to(image)
    for path in (image, other):
        with pytest.raises(DeviceBusyError, match=rf"attached to {loop} as well.*losetup --detach {loop}$"):
            Device(make_config(name="twice", uri=f"file:{path}"), run_dir=tmp_path / "run").start()
    with open_path(image, read_only=True) as store:
        assert find_loops(store) == [loop.removeprefix("/dev/")]


@pytest.mark.loop_device
def test_readers_and_a_loop_device_that_reads_share_an_image(image: Path, attach_loop: Callable[..., str]) -> None:
    loop = attach_loop(image, "--read-only")
    with open_path(image, read_only=True) as store:
        assert find_loops(store) == []
    with open_path(image) as store:
        assert find_loops(store) == [loop.removeprefix("/dev/")]


@pytest.mark.loop_device
def test_loop_device_on_a_node_of_another_name_is_found(
    loop: str, tmp_path: Path, attach_loop: Callable[..., str]
) -> None:
    status = os.stat(loop)
    os.mknod(tmp_path / "volume", status.st_mode, status.st_rdev)
    outer = attach_loop(tmp_path / "volume")
    with open_path(loop) as store:
        assert find_loops(store) == [outer.removeprefix("/dev/")]


@pytest.mark.loop_device
def test_block_device_is_not_locked_against_udev(loop: str) -> None:
    """udevd takes this lock before it handles an event, and waits for it."""
    for read_only in (False, True):
        with open_path(loop, read_only=read_only), open(loop, "rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.loop_device
def test_qemu_and_we_exclude_each_other_on_a_block_device(loop: str) -> None:
    with open_path(loop):
        assert 'Failed to get "write" lock' in qemu_io(Path(loop), "write 0 512").stderr
    assert qemu_io(Path(loop), "write 0 512").returncode == 0
    with subprocess.Popen(["qemu-io", "-f", "raw", loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write(b"length\n")
        qemu.stdin.flush()
        while b"MiB" not in qemu.stdout.readline():
            assert qemu.poll() is None
        with pytest.raises(DeviceBusyError, match=rf"{loop}: in use by pid {qemu.pid} \(qemu-io\)"):
            open_path(loop)


@pytest.mark.loop_device
def test_block_device_that_we_serve_cannot_be_mounted(loop: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", loop], check=True, capture_output=True, timeout=WAIT_S)
    with open_path(loop):
        done = subprocess.run(["mount", loop, str(tmp_path)], capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode != 0
        assert "busy" in done.stderr or "already mounted" in done.stderr, done.stderr


@pytest.mark.loop_device
def test_block_device_that_is_mounted_is_refused_and_the_mount_named(loop: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", loop], check=True, capture_output=True, timeout=WAIT_S)
    point = tmp_path / "point"
    point.mkdir()
    subprocess.run(["mount", loop, str(point)], check=True, timeout=WAIT_S)
    try:
        with pytest.raises(DeviceBusyError, match=rf"{loop}: in use: mounted on {point}; end that first"):
            open_path(loop)
    finally:
        subprocess.run(["umount", str(point)], check=True, timeout=WAIT_S)
    open_path(loop).close()


@pytest.mark.slow
@pytest.mark.loop_device
def test_partition_and_whole_disk_exclude_each_other(image: Path, attach_loop: Callable[..., str]) -> None:
    disk = attach_loop(image)
    for number in ("1", "2"):
        subprocess.run(["addpart", disk, number, f"{number}000", "1000"], check=True, timeout=WAIT_S)
    first, second = (f"{disk}p{number}" for number in (1, 2))
    with open_path(first), open_path(second):
        for part in (first, disk):
            with pytest.raises(DeviceBusyError, match=rf"{part}: in use: open by pid|{part}: in use: held by"):
                open_path(part)
    with open_path(disk), pytest.raises(DeviceBusyError, match="in use"):
        open_path(first)
    for number in ("1", "2"):
        subprocess.run(["delpart", disk, number], check=True, timeout=WAIT_S)


@pytest.mark.loop_device
def test_reader_and_writer_of_a_block_device_exclude_each_other(loop: str) -> None:
    with open_path(loop, read_only=True):
        open_path(loop, read_only=True).close()
        with pytest.raises(DeviceBusyError, match=rf"{loop}: in use by pid {os.getpid()} "):
            open_path(loop)
    with open_path(loop), pytest.raises(DeviceBusyError, match=rf"{loop}: in use by pid {os.getpid()} "):
        open_path(loop, read_only=True)


def test_what_these_tests_use_is_installed() -> None:
    assert all(shutil.which(name) for name in ("qemu-io", "qemu-img", "qemu-storage-daemon", "strace"))
