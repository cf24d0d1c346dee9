"""Stores behind a server: ours and fio's own client of the same one, which each measurement restarts."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rows.contestants import FILE_BYTES, RowError, Setup, fio_arguments, parse_json, vdusefast
from vdusefast.bench.peers.kernel_nbd import handshake

START_S = 10.0


@contextmanager
def nbdkit_memory() -> Iterator[str]:
    """Run nbdkit's memory plugin on a Unix socket; yield the URI. Raises RowError."""
    with tempfile.TemporaryDirectory(prefix="vdusefast-nbd-") as directory:
        path = Path(directory) / "sock"
        arguments = ["nbdkit", "--foreground", "--exit-with-parent", f"--unix={path}", "memory", str(FILE_BYTES)]
        try:
            server = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            raise RowError("nbdkit is not installed: sudo apt-get install nbdkit") from None
        try:
            _wait(server, path)
            yield f"nbd+unix:///?socket={path}"
        finally:
            server.kill()
            server.wait()


def nbd(setup: Setup) -> float:
    """Return IOPS of our device over nbdkit."""
    with nbdkit_memory() as uri:
        return vdusefast(setup, uri)


def fio_nbd(setup: Setup) -> float:
    """Return IOPS of fio's engine for NBD over nbdkit."""
    with nbdkit_memory() as uri:
        report = parse_json([*fio_arguments(setup, "nbd"), f"--uri={uri}"])
        return float(report["jobs"][0]["read"]["iops"])


def _wait(server: subprocess.Popen[bytes], path: Path) -> None:
    end = time.monotonic() + START_S
    with socket.socket(socket.AF_UNIX) as sock:
        while sock.connect_ex(str(path)):
            if server.poll() is not None or time.monotonic() > end:
                raise RowError("nbdkit does not listen; its lines above say why")
            time.sleep(0.02)
        handshake(sock)
