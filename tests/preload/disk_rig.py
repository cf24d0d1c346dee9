"""A disk that programs attach to, and the load of disk_load.c, built once a run."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vdusefast
from vdusefast.driver.attach_server import AttachServer

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
SOURCES = [CSRC / "preload" / f"{name}.c" for name in ("attach", "disk", "forked", "plain", "regions", "send", "wait")]
SOURCES += [CSRC / "base" / "page.c"]
SERVER_SOURCES = [CSRC / "board" / "server.c"]


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    """Return a directory that is removed at the end of the run."""
    return tempfile.TemporaryDirectory(prefix="vdusefast-disk-load-")


@functools.cache
def built(*flags: str, program: str = "disk_load") -> Path:
    """Return a program of this directory, built so: disk_... with the ring side, board_... the server's."""
    path = Path(_directory().name) / f"{program}-{abs(hash(flags))}"
    command = ["cc", "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", *flags, f"-I{CSRC}"]
    sources = SERVER_SOURCES if program.startswith("board_") else SOURCES if program.startswith("disk_") else []
    subprocess.run([*command, "-o", path, HERE / f"{program}.c", *sources, "-lpthread"], check=True, timeout=120)
    return path


@contextmanager
def served(
    *, uri: str = "memory:64M", route: str = "own", spin_us: float | None = None, **words: Any
) -> Iterator[tuple[vdusefast.Device, AttachServer]]:
    """Serve a loopback device, and let programs attach."""
    config = vdusefast.make_config(name="attached", uri=uri, transport="loopback", **words)
    with vdusefast.Device(config) as device, AttachServer(device.bus, route=route, spin_us=spin_us) as server:
        yield device, server


def words_of(
    *,
    processes: int = 1,
    threads: int = 1,
    depth: int = 8,
    block: int = 4096,
    blocks: int = 64,
    seconds: float = 0.5,
    memory: str = "direct",
    first: int = 0,
) -> list[str]:
    """Return the arguments of disk_load."""
    return [str(word) for word in (processes, threads, depth, block, blocks, seconds, memory, first)]


def load(server: AttachServer, *, binary: Path | None = None, **words: Any) -> subprocess.Popen[str]:
    """Start disk_load on the disk."""
    command = [str(binary or built()), *words_of(**words)]
    env = {**os.environ, **server.environment}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[str], timeout_s: float = 60.0) -> int:
    """Wait for a load. Return how many requests it finished. Fails with what it said."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the load hangs: {out}{err}") from None
    assert process.returncode == 0, f"{process.returncode}: {err[-2000:]}"
    return sum(int(line) for line in out.split())


def regions(device: vdusefast.Device) -> int:
    """Return how many regions the device's bus has."""
    return len(device.bus._regions._regions)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Wait for a condition."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)
