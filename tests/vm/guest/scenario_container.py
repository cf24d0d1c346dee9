"""A server in a container of podman, by the commands of docs/containers.md: its disk on the host and in another one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import containers
import guest
from checks import check
from containers import ROOT, block

MOUNT = Path("/mnt")
SHELL = f"set -euo pipefail; ROOT={ROOT}\n"
BLOCK_BYTES = 64 << 10
PODMAN_S = 120.0  # a command of podman, emulated, on a busy host


class Shell:
    """One shell for all blocks of the document, which use each other's functions and variables."""

    def __init__(self) -> None:
        self._before = SHELL

    def run(self, text: str, *, defines: bool = False) -> str:
        """Run a block; with `defines`, the later ones have what it sets, without what it starts."""
        try:
            said = guest.sh("bash", "-c", self._before + text, timeout_s=2 * PODMAN_S)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            log = guest.attempt("podman", "logs", "vd0", timeout_s=PODMAN_S)
            raise AssertionError(f"{error}; the container said: {log.stdout}{log.stderr}") from None
        if defines:
            lines = [line for line in text.splitlines(keepends=True) if line != "start\n"]
            self._before += "".join(lines)
        return said


@contextlib.contextmanager
def writer(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Write to a file, past the page cache, until the end: an I/O error ends it before."""
    code = (
        "import itertools, mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_DIRECT)\n"
        "block = mmap.mmap(-1, int(sys.argv[2]))\n"
        "for number in itertools.count(1):\n"
        "    block[:8] = number.to_bytes(8, 'little')\n"
        "    os.pwrite(fd, block, number % 64 * len(block))\n"
        "    print(number, flush=True)\n"
    )
    words = ["python", "-S", "-c", code, str(directory / "load"), str(BLOCK_BYTES)]
    with (guest.WORK / "written").open("w+") as said, subprocess.Popen(words, stdout=said, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def written() -> int:
    """Return the number of the last block that the writer has written."""
    lines = (guest.WORK / "written").read_text().split()
    return int(lines[-1]) if lines else 0


@check(limit_s=300)
def recipe_of_the_document() -> dict[str, object]:
    """Started, used on the host and elsewhere, killed and replaced under a file system in use, and removed."""
    containers.prepare()
    shell = Shell()
    try:
        started_s = time.monotonic()
        shell.run(block("Start"), defines=True)
        took_s = time.monotonic() - started_s
        shell.run(block("Use"))
        node = guest.node_of("vd0")
        log = guest.attempt("podman", "logs", "vd0", timeout_s=PODMAN_S)
        assert f"which is {node} (" in log.stderr, log
        shown = guest.show("vd0")
        assert (shown["pid"], shown["node"]) == (1, node), shown
        assert shown["pid_namespace"] != os.stat("/proc/self/ns/pid").st_ino
        with writer(MOUNT) as process:
            guest.wait_for("writes", lambda: written() > 5, 60)
            guest.refused("del", "vd0", status=4, says=rf"mounted on {MOUNT}")
            shell.run(block("Replace the container"))
            last = written()
            guest.wait_for("writes by the next server", lambda: written() > last + 5, 60)
            assert process.poll() is None, "the writer has seen an error"
        read_back(written())
        shell.run("node=" + node + "\n" + block("Use", 1))
        shell.run(block("Remove"))
    finally:
        guest.attempt("umount", "-l", MOUNT)
        containers.clean_up()
    assert guest.node_of("vd0") == ""
    return {"start_s": round(took_s, 1)}


def read_back(last: int) -> None:
    """Compare what is on the disk with what was written: the newest of each place, the one after it perhaps as well."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    data = (MOUNT / "load").read_bytes()
    for number in range(max(1, last - 60), last + 1):
        at = number % 64 * BLOCK_BYTES
        found = int.from_bytes(data[at : at + 8], "little")
        assert found == number, f"block {number}: {found}"
