"""The Python class of examples/disks against nbdkit's Python plugin with the same line for a read, over the same file.

Each server has the worker's CPU, each client the driver's. Before it is timed each is asked for blocks at random, which
must be those of the file.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rows.contestants import FILE_BYTES, IODEPTH, RAMP, ROOT, RowError, Setup, device_config, parse_json, vdusefast
from vdusefast.api import Device
from vdusefast.bench.peers import kernel_nbd as nbd

BLOCK_BYTES = 4096
CHECKED_BLOCKS = 64
START_S = 10.0
NBD_REQUEST = struct.Struct(">IHHQQI")
NBD_READ = 0x25609513, 0, 0  # magic, flags, type


def check_blocks(setup: Setup, read: Callable[[int], bytes], whose: str) -> None:
    """Compare blocks that `read` returns for an offset in bytes with the file. Raises RowError."""
    with setup.tmpfs_file.open("rb") as file:
        for _ in range(CHECKED_BLOCKS):
            offset_bytes = random.randrange(FILE_BYTES // BLOCK_BYTES) * BLOCK_BYTES  # noqa: S311 (no secret)
            file.seek(offset_bytes)
            if read(offset_bytes) != file.read(BLOCK_BYTES):
                raise RowError(f"{whose}: the block at byte {offset_bytes} is not that of {setup.tmpfs_file}")


def python_disk(setup: Setup, name: str) -> float:
    """Return IOPS of a class of examples/disks/ram_disk.py that maps the file on tmpfs."""
    uri = f"python:{ROOT}/examples/disks/ram_disk.py:{name}?path={setup.tmpfs_file}&size={FILE_BYTES}"
    with Device(device_config(setup, uri)) as device, device.driver() as driver:
        check_blocks(setup, lambda offset_bytes: driver.read(offset_bytes, BLOCK_BYTES), name)
    return vdusefast(setup, uri)


def nbdkit_disk(setup: Setup, thread_count: int) -> float:
    """Return IOPS of the real fio by NBD on a Unix socket to nbdkit with rows/nbdkit_disk.py."""
    if shutil.which("nbdkit") is None:
        raise RowError("nbdkit is missing: sudo apt-get install nbdkit nbdkit-plugin-python")
    with nbdkit(setup, thread_count) as socket_path:
        check_export(setup, socket_path)
        arguments = ["fio", "--name=speed", "--rw=randread", "--bs=4k", f"--iodepth={IODEPTH}", "--time_based"]
        arguments += [f"--runtime={setup.seconds * 1000:g}ms", f"--ramp_time={RAMP}", "--ioengine=nbd"]
        arguments += [f"--uri=nbd+unix:///?socket={socket_path}", f"--cpus_allowed={setup.driver_cpu}"]
        report = parse_json([*arguments, "--output-format=json"])
    return float(report["jobs"][0]["read"]["iops"])


@contextlib.contextmanager
def nbdkit(setup: Setup, thread_count: int) -> Iterator[Path]:
    """Run nbdkit on the worker's CPU; yields its socket. Raises RowError."""
    with tempfile.TemporaryDirectory(prefix="vdusefast-nbdkit-") as directory:
        socket_path = Path(directory) / "nbd.sock"
        arguments = ["taskset", "--cpu-list", str(setup.worker_cpu), "nbdkit", "--foreground", "--exit-with-parent"]
        arguments += [f"--threads={thread_count}", f"--unix={socket_path}", "python"]
        arguments += [str(ROOT / "bench" / "rows" / "nbdkit_disk.py"), f"path={setup.tmpfs_file}"]
        server = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        try:
            deadline_s = time.monotonic() + START_S
            while not socket_path.exists():
                if server.poll() is not None or time.monotonic() > deadline_s:
                    server.kill()
                    said = (server.communicate()[1].strip() or "it said nothing").splitlines()[-1]
                    raise RowError(f"nbdkit's Python plugin does not start (nbdkit-plugin-python): {said}")
                time.sleep(0.02)
            yield socket_path
        finally:
            server.terminate()
            server.communicate()


def check_export(setup: Setup, socket_path: Path) -> None:
    """Do check_blocks() by a connection of our own. Raises RowError."""
    with nbd.dial(socket_path) as sock:
        nbd.handshake(sock)

        def read(offset_bytes: int) -> bytes:
            sock.sendall(NBD_REQUEST.pack(*NBD_READ, offset_bytes, offset_bytes, BLOCK_BYTES))
            return nbd.receive(sock, 16 + BLOCK_BYTES)[16:]

        check_blocks(setup, read, "nbdkit")
