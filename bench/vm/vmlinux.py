"""Linux images and modules, as far as a guest needs to look into them.

Source: Linux, Documentation/arch/x86/boot.rst (header fields); the ELF-64 object file format.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
from pathlib import Path

from bench.vm.errors import GuestError

VERSION = 1  # of what extract() makes
SETUP_SECTORS_AT = 0x1F1
PAYLOAD_AT = 0x248  # payload_offset and payload_length, two u32
ELF_MAGIC = b"\x7fELF"
MAGICS = {b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"\x02\x21\x4c\x18": "lz4"}


def extract(image: Path, into: Path) -> None:
    """Write the ELF kernel that a bzImage packs: emulated, unpacking it takes longer than the rest of the boot.

    Raises GuestError when the image is not one that is known.
    """
    content = image.read_bytes()
    offset, length = struct.unpack_from("<II", content, PAYLOAD_AT)
    start = (content[SETUP_SECTORS_AT] + 1) * 512 + offset
    # The last four bytes are the unpacked size; they do not belong to the archive.
    payload = content[start : start + length - 4]
    kind = next((kind for magic, kind in MAGICS.items() if payload.startswith(magic)), None)
    if kind == "xz":
        kernel = lzma.decompress(payload)
    elif kind is not None and shutil.which(kind):
        done = subprocess.run([kind, "-dc"], input=payload, capture_output=True, check=False, timeout=120)
        kernel = done.stdout
    else:
        raise GuestError(
            f"the kernel in {image.name} is packed by {kind or 'something unknown'}, which is missing here"
        )
    if not kernel.startswith(ELF_MAGIC):
        raise GuestError(f"the kernel in {image.name} cannot be unpacked")
    into.write_bytes(kernel)


def module_depends(module: bytes) -> list[str]:
    """Return the names of the modules that a module (an ELF-64 object) needs, as its .modinfo section says."""
    (section_table,) = struct.unpack_from("<Q", module, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", module, 58)
    headers = [struct.unpack_from("<IIQQQQ", module, section_table + n * entry_size) for n in range(count)]
    names_at = headers[names_index][4]
    for name, _, _, _, offset, size in headers:
        if module.startswith(b".modinfo\0", names_at + name):
            entries = dict(
                entry.partition(b"=")[::2] for entry in module[offset : offset + size].split(b"\0") if b"=" in entry
            )
            return [word for word in entries.get(b"depends", b"").decode().replace("-", "_").split(",") if word]
    raise GuestError("a kernel module without .modinfo")
