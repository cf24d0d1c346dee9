"""Real programs on the disk: fio with each engine that reads and writes, and the tools of disks and images."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from preload_rig import CAPACITY_BYTES, Disk

pytestmark = pytest.mark.slow

FIO = ("fio", "--name=job", "--size=2M", "--bs=4k", "--iodepth=16", "--allow_file_create=0", "--output-format=json")


def report(shown: bytes) -> dict[str, Any]:
    """Return fio's JSON; before it, fio notes that some engines cap the depth."""
    found: dict[str, Any] = json.loads(shown[shown.index(b"{") :])
    return found


def fio(disk: Disk, *options: str) -> dict[str, int]:
    """Run a job on the disk. Returns how many requests of each kind there were."""
    found = report(disk.run(*FIO, f"--filename={disk.path}", *options).stdout)
    assert all(job["error"] == 0 for job in found["jobs"])
    return {kind: sum(job[kind]["total_ios"] for job in found["jobs"]) for kind in ("read", "write", "trim")}


@pytest.mark.parametrize("direct", ["0", "1"])
@pytest.mark.parametrize("engine", ["libaio", "psync", "vsync", "pvsync", "pvsync2", "sync"])
def test_fio_verifies_what_it_wrote(engine: str, direct: str, disk: Disk) -> None:
    done = fio(disk, f"--ioengine={engine}", f"--direct={direct}", "--rw=randwrite", "--verify=crc32c", "--fsync=100")
    assert done["write"] == 512
    # What is in the store is what fio wrote: fio verifies it there.
    store = Disk.run(disk, *FIO, f"--filename={disk.store}", "--rw=randwrite", "--verify=crc32c", "--verify_only=1")
    assert report(store.stdout)["jobs"][0]["error"] == 0


@pytest.mark.parametrize("engine", ["libaio", "sync"])
def test_fio_writes_parts_of_blocks(engine: str, disk: Disk) -> None:
    fio(disk, f"--ioengine={engine}", "--rw=randwrite", "--bs=2300", "--verify=md5", "--fdatasync=1", "--size=1M")


@pytest.mark.parametrize("thread", ["--thread", "--group_reporting"])
def test_fio_jobs_side_by_side(thread: str, disk: Disk) -> None:
    slices = ("--numjobs=4", "--offset_increment=2M", thread)
    done = fio(disk, "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--verify=crc32c", "--mem=shm", *slices)
    assert done["write"] == 4 * 512


def test_fio_trims_and_has_o_sync(disk: Disk) -> None:
    assert fio(disk, "--ioengine=libaio", "--rw=randtrim")["trim"] == 512
    assert fio(disk, "--ioengine=libaio", "--direct=1", "--sync=1", "--rw=randwrite")["write"] == 512
    assert fio(disk, "--ioengine=psync", "--rw=randtrimwrite", "--sync_file_range=write:8") == {
        "read": 0,
        "write": 512,
        "trim": 512,
    }


@pytest.mark.parametrize("engine", ["io_uring", "mmap", "splice", "posixaio"])
def test_fio_engines_that_are_not_served_fail(engine: str, disk: Disk) -> None:
    words = (*FIO, f"--filename={disk.path}", f"--ioengine={engine}", "--rw=read")
    assert disk.run(*words, status=1).stderr


def test_dd_cat_cmp_and_cp(disk: Disk) -> None:
    content = os.urandom(CAPACITY_BYTES)
    source = disk.path.parent / "source"
    source.write_bytes(content)
    disk.run("dd", f"if={source}", f"of={disk.path}", "bs=64k", "oflag=direct", "conv=fsync,notrunc")
    assert disk.store.read_bytes() == content
    assert disk.run("dd", f"if={disk.path}", "bs=1000", "status=none").stdout == content
    assert disk.run("cat", disk.path).stdout == content
    assert disk.run("tail", "-c", "100", disk.path).stdout == content[-100:]
    disk.run("cmp", disk.path, source)
    disk.run("cp", disk.path, disk.path.parent / "copy")
    assert (disk.path.parent / "copy").read_bytes() == content


def test_a_file_system(disk: Disk) -> None:
    disk.run("mkfs.ext4", "-q", disk.path)
    (disk.path.parent / "letter").write_text("dear disk")
    disk.run("debugfs", "-w", "-R", "write letter letter", disk.path)
    assert disk.run("debugfs", "-R", "cat letter", disk.path).stdout == b"dear disk"
    disk.run("e2fsck", "-fn", disk.path)
    disk.run("e2fsck", "-fn", disk.store)
    assert b'TYPE="ext4"' in disk.run("blkid", "-p", disk.path).stdout
    disk.run("blkdiscard", "-f", disk.path)
    assert disk.store.read_bytes() == bytes(CAPACITY_BYTES)


def test_a_partition_table(disk: Disk) -> None:
    disk.run("sfdisk", "--no-reread", "--no-tell-kernel", disk.path, stdin=b",,L\n")
    assert b"83 Linux" in disk.run("sfdisk", "-l", disk.path).stdout
    assert int(disk.run("blockdev", "--getsize64", disk.path).stdout) == CAPACITY_BYTES


@pytest.mark.parametrize("options", [("--cache=none", "--aio=native"), ("--cache=writeback", "--aio=threads")])
def test_qemu_io(options: tuple[str, ...], disk: Disk) -> None:
    commands = ("aio_write -P 7 4k 64k", "aio_flush", "read -P 7 4k 64k", "write -z 4k 8k", "read -P 0 4k 8k", "flush")
    words = [word for command in commands for word in ("-c", command)]
    disk.run("qemu-io", "-f", "raw", *options, *words, disk.path)
    assert disk.store.read_bytes()[12288:69632] == b"\7" * 57344


def test_qemu_img(disk: Disk) -> None:
    content = os.urandom(1 << 20) + bytes(CAPACITY_BYTES - (1 << 20))
    source, image = disk.path.parent / "source", disk.path.parent / "image.qcow2"
    source.write_bytes(content)
    disk.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, disk.path)
    assert disk.store.read_bytes() == content
    disk.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.path, image)
    disk.run("qemu-img", "compare", "-F", "raw", image, disk.store)
