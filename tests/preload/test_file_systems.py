"""The tools of file systems, partitions and archives on a disk of `vdusefast run`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

SCRIPTS = {
    "ext4": "mkfs.ext4 -q {} 16M && e2fsck -fy {} && resize2fs {} && tune2fs -L here {} && e2fsck -fn {}",
    "xfs": "mkfs.xfs -q -f {} && xfs_repair -n {} && xfs_db -r -c 'sb 0' -c 'p blocksize' {} | grep 4096",
    "swap": "mkswap -f {} && swaplabel -L here {} && swaplabel {} | grep here && wipefs -a {}",
    "tar": "tar cf {} words && tar tvf {} && tar xf {} --to-stdout | cmp - words && tar c words | dd of={} bs=64k",
    "copies": "cat words > {} && head -c 1000 {} | cmp - words && split -b 100M {} part. && cat part.* | cmp - {}",
    "partitions": "printf ',,L\n' | sfdisk --no-reread --no-tell-kernel {} && fdisk -l {} | grep Linux",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_tools_work_as_on_a_disk(name: str, tmp_path: Path) -> None:
    (tmp_path / "words").write_bytes(b"x" * 1000)
    words = ["--backend", "memory:320M", "--queues", "2", "--", "sh", "-ec", SCRIPTS[name]]
    done = subprocess.run(
        [sys.executable, "-m", "vdusefast", "run", *words],
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr


REFUSED = {
    "a table read by the kernel": ("blockdev --rereadpt {}", "Invalid argument"),
    "a read-only disk": ("blockdev --setro {}", "Inappropriate ioctl"),
    "a mapping": (f"{sys.executable} -c 'import mmap, os; mmap.mmap(os.open(\"{{}}\", os.O_RDWR), 4096)'", "ENODEV"),
    "a shorter disk": ("truncate -s 4096 {}", "Invalid argument"),
    "a name in /sys": ("lsblk {}", "failed to get sysfs name"),
    "swap": ("mkswap -q -f {} && swapon {}", "swapon"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_a_kernel_says_so(what: str) -> None:
    script, says = REFUSED[what]
    words = ["--backend", "memory:8M", "--", "sh", "-ec", script]
    done = subprocess.run(
        [sys.executable, "-m", "vdusefast", "run", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert says in done.stderr, done.stderr
