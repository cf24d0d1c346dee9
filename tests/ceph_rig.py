"""A Ceph cluster of one node for tests and benchmarks: a monitor and an OSD, below a directory, on loopback addresses.

Both run in the foreground as our children and end with us. RBD needs no manager.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

HOST = "127.0.0.1"
POOL = "rbd"
OTHER_POOL = "other"
OSD_BYTES = 4 << 30  # of the sparse file
MEMORY_BYTES = 1 << 30  # that the OSD's directory should have room for
COMMAND_LIMIT_S = 60.0
START_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
PROGRAMS = ("monmaptool", "ceph-authtool", "ceph-mon", "ceph-osd", "ceph", "rbd")
SBIN = ("/usr/sbin", "/sbin")

CONF = """\
[global]
fsid = {fsid}
mon host = [v2:{host}:{port}/0]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {directory}/keyring
run dir = {directory}
crash dir = {directory}
admin socket =
pid file =
log file =
log to stderr = true
err to stderr = true
debug default = 0
debug rocksdb = 0/0
public addr = {host}
cluster addr = {host}
ms bind msgr1 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon data = {directory}/mon
mon data avail crit = 0
mon data avail warn = 0
mon osd min down reporters = 1
paxos propose interval = 0.05
paxos min wait = 0.01
auth allow insecure global id reclaim = false
osd data = {directory}/osd
osd objectstore = bluestore
bluestore block path =
bluestore block size = {osd_bytes}
bluestore block preallocate file = false
bluestore cache autotune = false
bluestore cache size = 134217728
osd memory target = 939524096
osd fast fail on connection refused = true
"""


class CephError(Exception):
    """A program of Ceph has failed; the text is what it said."""


def missing() -> list[str]:
    """Return the programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_path())]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), *SBIN])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def scratch() -> Path:
    """Return where a cluster's directory is best made: in memory where there is room, and O_DIRECT for the OSD."""
    memory = Path("/dev/shm")
    with contextlib.suppress(OSError):
        if shutil.disk_usage(memory).free > MEMORY_BYTES:
            with tempfile.NamedTemporaryFile(dir=memory) as file:
                os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
                return memory
    return Path(tempfile.gettempdir())


class Cluster:
    """A running cluster. `start` has to be called, and `stop` at the end."""

    def __init__(self, directory: Path) -> None:
        """Prepare a cluster below `directory`, which is the caller's to remove."""
        self.directory = directory
        self.conf = directory / "ceph.conf"
        self.port = _free_port()
        self._fsid = str(uuid.uuid4())
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Make the cluster and bring it up, with the pool "rbd". Raises CephError."""
        for name in ("mon", "osd"):
            (self.directory / name).mkdir()
        self.conf.write_text(
            CONF.format(fsid=self._fsid, host=HOST, port=self.port, directory=self.directory, osd_bytes=OSD_BYTES)
        )
        self._make_keyring()
        self._make_monitor()
        osd = str(uuid.uuid4())
        self.start_monitor()
        self.ceph("osd", "new", osd)
        self._run("ceph-osd", "-c", str(self.conf), "--mkfs", "-i", "0", "--osd-uuid", osd)
        self.start_osd()
        self.make_pool(POOL)

    def _make_keyring(self) -> None:
        """Make the keys: of the daemons, of client.admin, and of client.test, which has what RBD recommends."""
        keyring = str(self.directory / "keyring")
        allow = {
            "mon.": {"mon": "allow *"},
            "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
            "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
            "client.test": {"mon": "profile rbd", "osd": "profile rbd"},
            "client.weak": {"mon": "allow r"},
        }
        for number, (name, caps) in enumerate(allow.items()):
            words = [word for kind, cap in caps.items() for word in ("--cap", kind, cap)]
            self._run("ceph-authtool", *["--create-keyring"][number:], keyring, "--gen-key", "-n", name, *words)

    def _make_monitor(self) -> None:
        monmap = str(self.directory / "monmap")
        address = f"[v2:{HOST}:{self.port}]"
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", address, monmap)
        keyring = str(self.directory / "keyring")
        self._run("ceph-mon", "-c", str(self.conf), "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)

    def start_monitor(self) -> None:
        """Start the monitor, and wait for its port."""
        self._spawn("mon", "ceph-mon", "-i", "a")
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
                return
            self._check_alive("mon", deadline)
            time.sleep(0.02)

    def start_osd(self) -> None:
        """Start the OSD and wait until the monitor calls it up. Raises CephError."""
        self._spawn("osd", "ceph-osd", "-i", "0")
        deadline = time.monotonic() + START_LIMIT_S
        while "up" not in self.ceph("osd", "dump").partition("\nosd.0 ")[2].split():
            self._check_alive("osd", deadline)
            time.sleep(0.1)

    def kill_osd(self) -> None:
        """End the OSD by SIGKILL."""
        self._end("osd", signal.SIGKILL)

    def kill_monitor(self) -> None:
        """End the monitor by SIGKILL."""
        self._end("mon", signal.SIGKILL)

    @contextlib.contextmanager
    def osd_halted(self) -> Iterator[None]:
        """Have the OSD stand still, by SIGSTOP: it is there, and does not answer."""
        process = self._processes["osd"]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End what runs. Idempotent."""
        for name in list(self._processes):
            self._end(name, signal.SIGKILL)  # nobody needs its data any more

    def ports(self) -> list[int]:
        """Return the ports that clients connect to: the monitor's and the OSD's."""
        dump = self.ceph("osd", "dump")
        line = next(line for line in dump.splitlines() if line.startswith("osd.0 "))
        return sorted({self.port, *(int(part.split("/")[0]) for part in line.split(f"{HOST}:")[1:])})

    def make_pool(self, name: str) -> None:
        """Make a pool for RBD."""
        self.ceph("osd", "pool", "create", name, "4")
        self.ceph("osd", "pool", "application", "enable", name, "rbd")

    def ceph(self, *words: str) -> str:
        """Return what `ceph ...` says. Raises CephError."""
        return self._run("ceph", "-c", str(self.conf), "--connect-timeout", "20", *words)

    def rbd(self, *words: str) -> str:
        """Return what `rbd ...` says. Raises CephError."""
        return self._run("rbd", "-c", str(self.conf), *words)

    def make_image(self, name: str, size: str = "64M", *words: str) -> str:
        """Make an image: NAME, or POOL/NAME, or POOL/NAMESPACE/NAME. Returns its URI."""
        spec = name if "/" in name else f"{POOL}/{name}"
        self.rbd("create", "--size", size, *words, spec)
        return self.uri(spec)

    def uri(self, spec: str, **options: str) -> str:
        """Return the URI of POOL/IMAGE for client.test."""
        words = {"conf": str(self.conf), "id": "test", **options}
        return f"rbd:{spec}?" + "&".join(f"{key}={value}" for key, value in words.items())

    def _run(self, *words: str) -> str:
        environment = {**os.environ, "PATH": _path(), "CEPH_CONF": str(self.conf)}
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise CephError(f"{' '.join(words)}: no end after {COMMAND_LIMIT_S:g} s{self._said()}") from None
        if done.returncode:
            raise CephError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()[-2000:]}")
        return done.stdout

    def _spawn(self, name: str, *words: str) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words, "-c", str(self.conf), "-f"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": _path()},
            )

    def _end(self, name: str, number: int) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(number)
            process.wait(STOP_LIMIT_S)

    def _check_alive(self, name: str, deadline: float) -> None:
        status = self._processes[name].poll()
        if status is not None or time.monotonic() > deadline:
            what = "does not come up" if status is None else f"has ended with status {status}"
            raise CephError(f"ceph-{name} {what}{self._said()}")

    def _said(self) -> str:
        lines = []
        for log in sorted(self.directory.glob("*.log")):
            lines += [f"\n{log.name}:", *log.read_text(errors="replace").splitlines()[-10:]]
        return "\n".join(lines)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Bring a cluster up in a temporary directory; it is gone afterwards. Raises CephError."""
    with tempfile.TemporaryDirectory(prefix="vdusefast-ceph-", dir=scratch()) as directory:
        one = Cluster(Path(directory))
        try:
            one.start()
            yield one
        finally:
            one.stop()
