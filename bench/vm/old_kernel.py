"""A kernel whose VDUSE is that of Linux 6.1: Debian 12's own, with the modules that Debian does not build of it.

Debian 12's kernel has no vDPA. Its source has, and the modules are built from that, unchanged, against the headers of
the very kernel that they are loaded into. They lack what came later, such as `bounce_size` and `irq_cb_affinity` in
sysfs (6.4).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from bench.vm.errors import GuestError
from bench.vm.packages import Packages
from bench.vm.tools import run_tool

SERIES = "6.1"
SUITE = "bookworm"
VERSION = 1  # of what `unpack` makes
BUILD_LIMIT_S = 1200
_SOURCES = {
    "drivers/vdpa/vdpa.c": "vdpa.c",
    "drivers/vdpa/vdpa_user": "vdpa_user",
    "drivers/virtio/virtio_vdpa.c": "virtio_vdpa.c",
    "drivers/vhost/vhost.h": "vhost.h",
    "drivers/vhost/vdpa.c": "vhost_vdpa_main.c",
}
_KBUILD = """\
obj-m := vdpa.o virtio_vdpa.o vduse.o vhost_vdpa.o
vduse-y := vdpa_user/vduse_dev.o vdpa_user/iova_domain.o
vhost_vdpa-y := vhost_vdpa_main.o
"""


def unpack(scratch: Path) -> tuple[str, Path, Path]:
    """Fetch the kernel and build its modules below `scratch`. Takes about a minute.

    Returns: its release, its image, and its directory of modules, with what was built. Raises GuestError.
    """
    packages = Packages([SUITE], scratch / "apt")
    found = re.search(r"linux-image-(6\.1\.0-\d+)-amd64", packages.fields("linux-image-amd64")["Depends"])
    if found is None:
        raise GuestError(f"Debian's {SUITE} has no kernel {SERIES} any more; the suite has moved on")
    version = found[1]
    release = f"{version}-amd64"
    names = [f"linux-image-{release}-unsigned", f"linux-headers-{release}", f"linux-headers-{version}-common"]
    files = scratch / "files"
    packages.unpack([*names, f"linux-kbuild-{SERIES}", f"linux-source-{SERIES}"], files)
    modules = files / "lib/modules" / release
    _build(files / "usr/src", release, version, modules / "kernel/drivers/vdpa")
    return release, files / "boot" / f"vmlinuz-{release}", modules


def _build(source: Path, release: str, version: str, into: Path) -> None:
    headers, work = source / f"linux-headers-{release}", source / "vdpa"
    # The makefile of the headers names the path where they are when installed.
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{source}/"))
    top = f"linux-source-{SERIES}"
    paths = [f"{top}/{path}" for path in _SOURCES]
    run_tool(["tar", "-xf", f"{top}.tar.xz", *paths], limit_s=BUILD_LIMIT_S, env=dict(os.environ), cwd=source)
    work.mkdir()
    for path, name in _SOURCES.items():
        (source / top / path).rename(work / name)
    for name in ("Makefile", "Kbuild"):
        (work / "vdpa_user" / name).unlink(missing_ok=True)
    (work / "Kbuild").write_text(_KBUILD)
    run_tool(
        ["make", "-s", "-C", str(headers), f"M={work}", "CC=cc", "modules"],
        limit_s=BUILD_LIMIT_S,
        env=dict(os.environ),
        cwd=work,
    )
    into.mkdir(parents=True)
    for module in work.glob("*.ko"):
        run_tool(["strip", "--strip-debug", str(module)], limit_s=60)
        shutil.copy(module, into)
