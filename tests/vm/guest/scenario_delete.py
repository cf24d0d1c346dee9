"""`del`: refused while somebody uses the device; with --force never long, and never holding up the whole machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import guest
from checks import check
from guest import MIB
from hanging_store import HangingStore, hanging_store

MOUNT = guest.WORK / "mount"
FORCE_MAX_S = 25.0  # emulated, with the start of the command
UNKILLABLE_S = 15.0  # the server tries for a while to be rid of a worker
FIO = ["fio", "--name=load", "--thread", "--rw=randrw", "--bs=4k", "--iodepth=16", "--ioengine=libaio", "--direct=1"]
ENDLESS = ["--time_based", "--runtime=300"]


def forced(name: str) -> float:
    """`del --force`, and how long it took; the machine's vDPA bus works afterwards."""
    started_s = time.monotonic()
    guest.delete(name, "--force")
    took_s = time.monotonic() - started_s
    assert took_s < FORCE_MAX_S, f"{took_s:.1f} s"
    assert guest.node_of(name) == ""
    with guest.device("other", "memory:16M") as node:
        guest.sh("dd", f"if={node}", "of=/dev/null", "bs=64k", "count=4", "iflag=direct")
    return round(took_s, 1)


@contextlib.contextmanager
def endless_fio(path: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have fio use a device or file of vd0, from its first hundred writes on; it is killed at the end."""
    writes = guest.counter("vd0", "write")
    with (guest.WORK / "fio.out").open("w+b") as said:
        words = [*FIO, *ENDLESS, f"--filename={path}", "--size=16M"]
        with subprocess.Popen(words, stdout=said, stderr=said) as fio:
            try:
                deadline = time.monotonic() + 60
                while guest.counter("vd0", "write") < writes + 100:
                    assert fio.poll() is None, f"fio has ended: {(guest.WORK / 'fio.out').read_text()[:800]}"
                    assert time.monotonic() < deadline, f"fio does too little: {guest.call('vd0', 'stats')['total']}"
                    time.sleep(0.05)
                yield fio
            finally:
                fio.kill()


@check(limit_s=120)
def refused_while_mounted() -> str:
    path = guest.image("del.img", 32 * MIB)
    MOUNT.mkdir(exist_ok=True)
    with guest.device("vd0", f"file:{path}") as node:
        guest.sh("mkfs.ext4", "-q", "-F", node)
        guest.sh("mount", node, MOUNT)
        try:
            line = guest.refused("del", "vd0", status=4, says=f"mounted on {MOUNT}", by_command=True)
            (MOUNT / "still").write_text("here")
        finally:
            guest.sh("umount", MOUNT)
    return line


@check(limit_s=90)
def refused_while_open() -> str:
    with guest.device("vd0", "memory:16M") as node:
        fd = os.open(node, os.O_RDWR)
        try:
            line = guest.refused("del", "vd0", status=4, says=rf"pid {os.getpid()}\b", by_command=True)
            assert len(os.pread(fd, 4096, 0)) == 4096
        finally:
            os.close(fd)
    return line


@check(limit_s=120)
def forced_while_mounted_under_load() -> dict[str, float]:
    path = guest.image("del.img", 64 * MIB)
    MOUNT.mkdir(exist_ok=True)
    node = guest.fork_server("vd0", f"file:{path}", queues=2)
    guest.sh("mkfs.ext4", "-q", "-F", node)
    guest.sh("mount", node, MOUNT)
    try:
        with endless_fio(f"{MOUNT}/load") as fio:
            took_s = forced("vd0")
            assert fio.wait(30) != 0, "fio has noticed nothing"
    finally:
        guest.attempt("umount", MOUNT)
    return {"took_s": took_s}


@contextlib.contextmanager
def fio_on(store: HangingStore, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """Serve a hanging store as vd0 and have fio use it."""
    node = guest.fork_server("vd0", f"file:{store.node}", **settings)
    with endless_fio(node) as fio:
        try:
            yield fio
        finally:
            store.go_on()


@check(limit_s=150)
def forced_with_a_direct_store_that_hangs() -> dict[str, float]:
    """Every request waits in the store, where it can be left alone: nothing remains."""
    with hanging_store(32 * MIB) as store, fio_on(store, queues=2, cache="none") as fio:
        store.hang()
        time.sleep(1)
        took_s = forced("vd0")
        assert fio.wait(30) != 0, "fio has noticed nothing"
    return {"took_s": took_s}


@check(limit_s=200)
def forced_with_a_flush_that_hangs() -> dict[str, object]:
    """A worker in fdatasync cannot be killed: that is said, all requests fail, and the vDPA bus is free all the same.

    The name can be had again once the store answers.
    """
    with hanging_store(32 * MIB) as store, fio_on(store, queues=2) as fio:
        with open(store.node, "rb") as whole:
            assert len(whole.read()) == 32 * MIB  # into the page cache: then reads wait for nothing
        store.hang()
        node = guest.node_of("vd0")
        with subprocess.Popen(["sync", node], stderr=subprocess.DEVNULL) as sync:
            guest.wait_for("a worker in fdatasync", lambda: any(map(stuck, guest.pids_of("vd0")[1:])), 30)
            workers = guest.pids_of("vd0")[1:]
            started_s = time.monotonic()
            done = guest.attempt(*guest.vdusefast_words("del", "vd0", "--force"), timeout_s=60)
            took_s = time.monotonic() - started_s
            assert done.returncode == 1, f"status {done.returncode}: {done.stderr}"
            assert "cannot be killed" in done.stderr, done.stderr
            assert took_s < FORCE_MAX_S + UNKILLABLE_S, f"{took_s:.1f} s"
            assert sync.wait(30) != 0, "sync has noticed nothing"
        assert fio.wait(30) != 0, "fio has noticed nothing"
        assert guest.node_of("vd0") == ""
        with guest.device("other", "memory:16M") as other:
            guest.sh("dd", f"if={other}", "of=/dev/null", "bs=64k", "count=4", "iflag=direct")
        store.go_on()
        guest.wait_for("the workers to end", lambda: not any(map(guest.running, workers)), 20)
        if (guest.VDUSE_CLASS / "vd0").exists():
            guest.delete("vd0", "--force")
        with guest.device("vd0", "memory:16M"):
            pass
    return {"took_s": round(took_s, 1), "said": done.stderr}


def stuck(pid: int) -> bool:
    """Return whether a process waits in the kernel and takes no signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
