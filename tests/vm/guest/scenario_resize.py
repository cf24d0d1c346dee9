"""Another size for a disk in use: the kernel follows, what runs on it does not notice, a file system grows online."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from pathlib import Path

import guest
import vhost
from checks import check
from guest import MIB
from scenario_filesystem import differences, fill

MOUNT = guest.WORK / "mount"
IMAGE = "resize.img"
FIO = ["fio", "--name=resize", "--thread", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--bs=4k", "--size=24M"]
VERIFY = ["--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--verify_state_save=0"]
_VHOST_GET_CONFIG = 2 << 30 | 8 << 16 | 0xAF << 8 | 0x73  # linux/vhost.h


def resize(size_bytes: int | None, *, force: bool = False) -> None:
    """Resize vd0 as the command does, without the start of one."""
    answer = guest.call("vd0", "resize", params={"size_bytes": size_bytes, "force": force})
    assert size_bytes is None or answer["size_bytes"] == size_bytes, answer


def disk_bytes(name: str = "vd0") -> int:
    """Return the size of the disk as the kernel has it."""
    return guest.read_int(guest.sysfs_of(name) / "size") * 512


def wait_for_size(size_bytes: int) -> None:
    """Wait until the kernel has taken the size: after the interrupt it reads it in its own time."""
    guest.wait_for(f"a disk of {size_bytes} bytes", lambda: disk_bytes() == size_bytes)
    assert guest.info("vd0")["size_bytes"] == size_bytes


@check(limit_s=150)
def under_verified_load() -> dict[str, object]:
    path = guest.image(IMAGE, 32 * MIB)
    with guest.device("vd0", f"file:{path}", queues=2) as node:
        assert disk_bytes() == 32 * MIB
        words = [*FIO, *VERIFY, f"--filename={node}", "--time_based", "--runtime=20", "--numjobs=1"]
        with (guest.WORK / "fio.out").open("w+b") as said:
            with subprocess.Popen(words, stdout=said, stderr=said) as fio:
                guest.wait_for("fio's writes", lambda: guest.counter("vd0", "write") > 100, 40)
                for size in (64 * MIB, 1024 * MIB, 48 * MIB, 32 * MIB, 96 * MIB):
                    before = guest.counter("vd0", "write")
                    resize(size, force=True)
                    wait_for_size(size)
                    guest.wait_for("more writes", lambda before=before: guest.counter("vd0", "write") > before, 20)
                status = fio.wait(90)
            text = (guest.WORK / "fio.out").read_text()
            assert status == 0, f"fio: status {status}: {text[-1500:]}"
        total = guest.call("vd0", "stats")["total"]
        assert total["errors"] == 0, total  # type: ignore[index,call-overload]
        assert int(guest.sh("blockdev", "--getsize64", node)) == 96 * MIB
    return {"writes": total["ops"]["write"]["requests"]}  # type: ignore[index,call-overload]


@check(limit_s=120)
def mounted_ext4_grows() -> dict[str, object]:
    path = guest.image(IMAGE, 40 * MIB)
    MOUNT.mkdir(exist_ok=True)
    with guest.device("vd0", f"file:{path}", queues=2) as node:
        guest.sh("mkfs.ext4", "-q", "-F", node)
        guest.sh("mount", node, MOUNT)
        try:
            files = fill(MOUNT, 16 * MIB)
            before = os.statvfs(MOUNT).f_blocks
            said = guest.vdusefast("resize", "vd0", "128M")
            assert said == f"vd0: 128 MiB ({128 * MIB} bytes), was 40 MiB ({40 * MIB} bytes)\n", said
            wait_for_size(128 * MIB)
            guest.sh("resize2fs", node, timeout_s=60)
            after = os.statvfs(MOUNT).f_blocks
            assert after > 2 * before, (before, after)
            (MOUNT / "more").mkdir()
            files |= {f"more/{name}": digest for name, digest in fill(MOUNT / "more", 32 * MIB).items()}
            assert differences(MOUNT, files) == []
        finally:
            guest.sh("umount", MOUNT, timeout_s=60)
        guest.sh("e2fsck", "-f", "-n", node, timeout_s=60)
    guest.sh("e2fsck", "-f", "-n", path, timeout_s=60)
    return {"blocks": [before, after], "files": len(files)}


@check(limit_s=120)
def shrinks_by_force_behind_its_file_system() -> str:
    path = guest.image(IMAGE, 64 * MIB)
    MOUNT.mkdir(exist_ok=True)
    with guest.device("vd0", f"file:{path}") as node:
        guest.sh("mkfs.ext4", "-q", "-F", node)
        guest.sh("resize2fs", node, "32M", timeout_s=60)
        line = guest.refused("resize", "vd0", "32M", status=1, says=f"loses all from byte {32 * MIB}.*--force")
        assert disk_bytes() == path.stat().st_size == 64 * MIB
        resize(32 * MIB, force=True)
        wait_for_size(32 * MIB)
        assert path.stat().st_size == 32 * MIB
        guest.sh("e2fsck", "-f", "-n", node, timeout_s=60)
        fd = os.open(node, os.O_RDONLY | os.O_DIRECT)
        try:
            assert os.lseek(fd, 0, os.SEEK_END) == 32 * MIB
        finally:
            os.close(fd)
    return line


@check(limit_s=90)
def store_that_grew_is_looked_at_again() -> None:
    path = guest.image(IMAGE, 32 * MIB)
    with guest.device("vd0", f"file:{path}") as node:
        os.truncate(path, 80 * MIB)
        assert disk_bytes() == 32 * MIB
        resize(None)
        wait_for_size(80 * MIB)
        guest.sh("dd", "if=/dev/urandom", f"of={node}", "bs=1M", "seek=79", "count=1", "oflag=direct")
        assert any(path.read_bytes()[79 * MIB :])


def vhost_capacity(client: vhost.VhostClient) -> int:
    """Return the capacity in the configuration space, in bytes."""
    raw = fcntl.ioctl(client.fd, _VHOST_GET_CONFIG, struct.pack("<IIQ", 0, 8, 0))
    return int(struct.unpack("<IIQ", raw)[2]) * 512


@check(limit_s=90)
def client_of_vhost_follows() -> None:
    """A connected client learns the new size; without one, the next client sees it."""
    path = guest.image(IMAGE, 32 * MIB)
    with guest.device("vd0", f"file:{path}", bus="vhost") as node:
        resize(48 * MIB)
        with vhost.VhostClient(node) as client:
            assert vhost_capacity(client) == 48 * MIB
            client.start(enabled=(0,))
            for size, last in ((48, 47), (64, 63), (40, 39)):
                resize(size * MIB, force=True)
                assert vhost_capacity(client) == size * MIB
                client.submit(0, vhost.T_OUT, last * MIB // 512, b"resize" * 256 * 2)
                assert client.finish(0)[0] == 0
                client.submit(0, vhost.T_IN, size * MIB // 512, length=512)
                assert client.finish(0)[0] == 1  # IOERR
        assert Path(path).stat().st_size == 40 * MIB
