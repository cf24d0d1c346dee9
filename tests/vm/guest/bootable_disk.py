"""A disk from which firmware starts Linux: GRUB in its first MiB, Debian's cloud kernel and an initramfs near its end.

There are no partitions and no file system: GRUB finds both files by their sectors.
"""

from __future__ import annotations

import lzma
import subprocess
from pathlib import Path

from qemu_machine import KERNEL_ARGUMENTS, initrd, own_library_words

from bench.vm import cache

TREE = ("trixie", ("grub-pc-bin", "linux-image-cloud-amd64"))
SECTOR_BYTES = 512


def write(path: Path, at_bytes: int, directory: Path) -> None:
    """Make an image startable. What is from 1 MiB up to `at_bytes` stays as it is; needs 15 MiB from there on.

    directory: for files that are needed meanwhile.
    """
    root = cache.tree(*TREE)
    (modules,) = (root / "usr/lib/modules").iterdir()
    (module,) = modules.rglob("virtio_blk.ko.xz")
    kernel = _sectors((root / "boot" / f"vmlinuz-{modules.name}").read_bytes())
    memory_disk = _sectors(initrd({"virtio_blk.ko": lzma.decompress(module.read_bytes())}))
    first = at_bytes // SECTOR_BYTES
    second = first + len(kernel) // SECTOR_BYTES
    script = (
        f"linux (hd0){first}+{len(kernel) // SECTOR_BYTES} {' '.join(KERNEL_ARGUMENTS)}\n"
        f"initrd (hd0){second}+{len(memory_disk) // SECTOR_BYTES}\n"
        "boot\n"
    )
    with path.open("r+b") as file:
        file.write(_loader(root, script, directory))
        file.seek(at_bytes)
        file.write(kernel + memory_disk)


def _sectors(data: bytes) -> bytes:
    """Return data, filled up with zeros to whole sectors."""
    return data + bytes(-len(data) % SECTOR_BYTES)


def _loader(root: Path, script: str, directory: Path) -> bytes:
    """Return GRUB with a script: its boot sector loads what follows from sector 1 on."""
    modules, built = root / "usr/lib/grub/i386-pc", directory / "grub.img"
    (directory / "grub.cfg").write_text(script)
    words = [*own_library_words(root, "usr/bin/grub-mkimage"), "-O", "i386-pc", "-p", "/", "-d", str(modules)]
    words += ["-c", str(directory / "grub.cfg"), "-o", str(built), "biosdisk", "linux"]
    subprocess.run(words, check=True, timeout=60)
    return (modules / "boot.img").read_bytes() + built.read_bytes()
