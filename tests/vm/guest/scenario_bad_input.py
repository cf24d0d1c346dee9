"""An impossible command ends with one line and the right status, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import guest
import msgspec
from checks import check

NOBODY = 65534


@contextlib.contextmanager
def foreign_device(name: str) -> Iterator[None]:
    """Let qemu-storage-daemon hold the name of a VDUSE device."""
    path = guest.image("foreign.img", guest.MIB)
    words = ["qemu-storage-daemon", "--blockdev", f"file,node-name=f,filename={path}"]
    words += ["--export", f"vduse-blk,id=e,name={name},node-name=f,writable=on"]
    with subprocess.Popen(words) as process:
        try:
            guest.wait_for("qemu-storage-daemon's device", (guest.VDUSE_CLASS / name).exists, 20)
            yield
        finally:
            process.terminate()
            process.wait(10)


@check(limit_s=90)
def names() -> list[str]:
    """The kernel prints a stack for the name "control", and makes "!" of a slash."""
    said = []
    for name in ("control", "a/b", ""):
        said.append(guest.refused("add", name, "--backend", "memory:16M", status=2, says="name"))
    return said


@check(limit_s=60)
def name_taken_by_another_program() -> str:
    with foreign_device("vd0"):
        line = guest.refused("add", guest.write_config("vd0", "memory:16M"), status=4, says="vd0")
        assert (guest.VDUSE_CLASS / "vd0").exists(), "the other program's device is gone"
    return line


@check(limit_s=90)
def name_taken_by_us() -> str:
    with guest.device("vd0", "memory:16M") as node:
        line = guest.refused("add", guest.write_config("vd0", "memory:16M"), status=4, says="vd0", by_command=True)
        assert guest.node_of("vd0") == node
        guest.sh("dd", f"if={node}", "of=/dev/null", "bs=64k", "count=1", "iflag=direct")
    return line


@check(limit_s=60)
def not_root() -> str:
    # The interpreter may lie in root's home; what this machine writes is gone with it.
    for path in (sys.executable, os.path.realpath(sys.executable), msgspec.__file__):
        for parent in Path(path).parents:
            parent.chmod(parent.stat().st_mode | 0o005)
    guest.WORK.chmod(0o755)
    home = guest.WORK / "run-of-nobody"
    home.mkdir(exist_ok=True)
    os.chown(home, NOBODY, NOBODY)
    config = guest.write_config("vd0", "memory:16M")
    return guest.refused(
        "add", config, status=5, says="root|permission", uid=NOBODY, under=["env", f"XDG_RUNTIME_DIR={home}"]
    )


@check(limit_s=60)
def root_without_the_capability_for_netlink() -> str:
    config = guest.write_config("vd0", "memory:16M")
    words = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    return guest.refused("add", config, status=5, says="CAP_NET_ADMIN", under=words)


@check(limit_s=60)
def attach_that_times_out() -> str:
    """A virtio device that no driver takes: the bus does not probe."""
    autoprobe = Path("/sys/bus/virtio/drivers_autoprobe")
    autoprobe.write_text("0")
    try:
        config = guest.write_config("vd0", "memory:16M", attach_timeout_s=2)
        return guest.refused("add", config, status=6, says="vd0")
    finally:
        autoprobe.write_text("1")


@check(limit_s=60)
def no_store() -> str:
    return guest.refused("add", "vd0", "--backend", "file:/nonexistent/x.img", status=1, says="/nonexistent/x.img")


@check(limit_s=90)
def no_such_device() -> None:
    guest.refused("show", "vd0", status=3, says="vd0")
    guest.refused("del", "vd0", status=3, says="vd0")
    assert json.loads(guest.attempt_in_copy("list", "--json").stdout) == []
