"""Processes that memory reclaim waits for: what is locked, what is not, and what is said where that is refused."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

import vdusefast
from vdusefast.host import reclaim
from vdusefast.state import shared_pages

MIB = 1 << 20
CAP_IPC_LOCK, CAP_SYS_RESOURCE = 14, 24
CAN_MARK = reclaim.can_mark_io_flusher()
USUAL_LIMIT = resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10)

pytestmark = pytest.mark.timeout(60)


def has_capability(number: int) -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    return bool(next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")) >> number & 1)


CAN_LOCK = has_capability(CAP_IPC_LOCK) or resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY
needs_lock = pytest.mark.skipif(not CAN_LOCK, reason="this process may not lock memory (CAP_IPC_LOCK, RLIMIT_MEMLOCK)")


class Mapping(NamedTuple):
    """A line of /proc/PID/smaps, in bytes."""

    permissions: str
    name: str
    size: int
    resident: int
    locked: bool


def mappings(pid: int) -> list[Mapping]:
    found = []
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text())[1:]:
        head, *lines = block.splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        size, resident = (int(fields[key].split()[0]) << 10 for key in ("Size", "Rss"))
        words = head.split(maxsplit=5)
        name = words[5] if len(words) > 5 else ""
        found.append(Mapping(words[1], name, size, resident, "lo" in fields["VmFlags"].split()))
    return found


def stays_in_memory(pid: int) -> None:
    """The code and tables that a process has used are locked."""
    for one in mappings(pid):
        if one.permissions.endswith("p") and one.permissions[0] == "r" and not one.name.startswith("[v"):
            assert one.locked, one


@needs_lock
@pytest.mark.parametrize("uri", ["file", "memory:64M"])
def test_a_worker_locks_itself_but_no_bytes_of_others(uri: str, tmp_path: Path) -> None:
    if uri == "file":  # on tmpfs it is read through a mapping
        path = tmp_path / "disk.img"
        path.write_bytes(bytes(64 * MIB))
        uri = f"file:{path}"
    config = vdusefast.make_config(name="lock", uri=uri, queue_size=1024, lock_memory="on")
    with vdusefast.Device(config) as device, device.driver() as driver:
        pid = device.queues()[0].pid
        for offset in range(0, 64 * MIB, MIB):
            driver.write(offset, b"x" * MIB)
            driver.read(offset, MIB)
        stays_in_memory(pid)
        shared = [one for one in mappings(pid) if one.permissions.endswith("s") and "gconv" not in one.name]
        assert sum(one.size for one in shared if one.locked) == own_pages(device)
        assert any(one.resident > 0 and not one.locked for one in shared)  # the driver's memory, at least
        protection = reclaim.look(pid)
        assert protection is not None
        assert 8 * MIB < protection.locked_bytes < 48 * MIB


def own_pages(device: vdusefast.Device) -> int:
    """Return the size of the shared mappings that are a worker's own: header and block of the shared pages.

    Their sum, as the kernel shows both as one mapping when they happen to lie side by side.
    """
    return shared_pages.HEADER_BYTES + shared_pages.QUEUE_STRIDE_BYTES


CLASS = """
import vdusefast

class Disk(vdusefast.Backend):
    shareable = False
    size_bytes = 1 << 20

    def __init__(self):
        self.data = bytearray(self.size_bytes)

    def pread(self, buffer, offset_bytes):
        buffer[:] = self.data[offset_bytes : offset_bytes + len(buffer)]

    def pwrite(self, buffer, offset_bytes):
        self.data[offset_bytes : offset_bytes + len(buffer)] = buffer
"""


@needs_lock
def test_a_relay_and_the_memory_that_it_shares_are_locked(tmp_path: Path) -> None:
    (tmp_path / "disk.py").write_text(CLASS)
    config = vdusefast.make_config(
        name="relay", uri=f"python:{tmp_path}/disk.py:Disk", queues=2, queue_size=64, lock_memory="on"
    )
    with vdusefast.Device(config) as device, device.driver() as driver:
        driver.write(0, b"x" * 65536)
        assert driver.read(0, 65536) == b"x" * 65536
        info = device.info()
        pids = [info["relay_pid"], *(queue["pid"] for queue in info["queues"])]
        relay = reclaim.look(pids[0])
        assert relay is not None
        assert relay.locked_bytes > 0  # not all of it: what a class maps is its own
        for pid in pids[1:]:
            stays_in_memory(pid)
            chunks = [one for one in mappings(pid) if "memfd:vdusefast-relay" in one.name]
            # A class is given views of second mappings of these pages; what no request has used does not exist.
            whole = [one for one in chunks if one.size == max(chunk.size for chunk in chunks)]
            assert all(one.locked and one.resident < one.size for one in whole), (pid, chunks)
        assert "not locked" not in info["reclaim"]


@pytest.mark.slow
@needs_lock
@pytest.mark.parametrize("queues", [1, 2])
def test_what_a_class_has_mapped_is_not_locked(tmp_path: Path, queues: int) -> None:
    """MADV_REMOVE and MADV_DONTNEED are refused for locked memory, and a store may be larger than memory is."""
    code = CLASS.replace("import vdusefast\n", "import mmap\nimport vdusefast\n", 1)
    code += """
    def open(self):
        self.map = mmap.mmap(-1, self.size_bytes)

    def discard(self, offset_bytes, length_bytes):
        self.later = mmap.mmap(-1, 1 << 20)
        self.map.madvise(mmap.MADV_REMOVE, 0, 4096)
        self.later.madvise(mmap.MADV_REMOVE, 0, 4096)
"""
    (tmp_path / "disk.py").write_text(code)
    uri = f"python:{tmp_path}/disk.py:Disk"
    config = vdusefast.make_config(name="class", uri=uri, queues=queues, queue_size=64, lock_memory="on")
    with vdusefast.Device(config) as device, device.driver() as driver:
        driver.discard(0, 1 << 16)
        assert device.stats().counters["bad_requests"] == 0


@pytest.mark.slow
def test_what_is_refused_is_named() -> None:
    """Without the rights the device is served all the same, and `show` says what that means."""
    program = textwrap.dedent("""
        import json, sys, vdusefast
        with vdusefast.Device(vdusefast.make_config(name="r", uri="memory:1M", lock_memory="on")) as device:
            with device.driver() as driver:
                driver.write(0, b"x" * 4096)
                assert driver.read(0, 4096) == b"x" * 4096
            print(json.dumps(device.info()))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, preexec_fn=give_up_rights
    )
    info = json.loads(done.stdout)
    pid = info["queues"][0]["pid"]
    assert info["reclaim"] == (
        f"pid {pid} is no I/O flusher (needs CAP_SYS_RESOURCE): buffered writes crawl; "
        f"memory of pid {pid} is not locked (needs CAP_IPC_LOCK or LimitMEMLOCK=infinity)"
    )


def give_up_rights() -> None:
    """Be a process without the capabilities, and with a small limit."""
    resource.setrlimit(*USUAL_LIMIT)
    libc = ctypes.CDLL(None, use_errno=True)
    for number in (CAP_IPC_LOCK, CAP_SYS_RESOURCE):
        libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP, for the programs that it starts
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: for capabilities below 32, and the others
    assert libc.capget(header, sets) == 0
    for kind in range(3):
        sets[kind] &= ~(1 << CAP_IPC_LOCK | 1 << CAP_SYS_RESOURCE)
    assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("engine", ["auto", "uring"])
def test_workers_are_io_flushers_where_that_is_allowed(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    config = vdusefast.make_config(name="mark", uri=f"file:{path}", engine=engine, lock_memory="on")
    with vdusefast.Device(config) as device, device.driver() as driver:
        driver.write(0, b"x" * 4096)
        pid = device.queues()[0].pid
        for thread in Path(f"/proc/{pid}/task").iterdir():  # also those that io_uring has started
            flags = int((thread / "stat").read_text().rpartition(")")[2].split()[6])
            assert flags & reclaim.PF_IO_FLUSHER == (reclaim.PF_IO_FLUSHER if CAN_MARK else 0), thread
        assert ("is no I/O flusher (needs CAP_SYS_RESOURCE)" in device.info()["reclaim"]) == (not CAN_MARK)


@pytest.mark.slow
@needs_lock
def test_a_server_is_locked_and_says_what_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "vd0.toml"
    config.write_text(
        '[device]\nname = "vd0"\ntransport = "loopback"\nlock_memory = "on"\n[backend]\nuri = "memory:8M"\n'
    )
    command = [sys.executable, "-m", "vdusefast", "serve", str(config), "--json"]
    env = {**os.environ, "VDUSEFAST_RUN_DIR": str(tmp_path / "run")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdout is not None
        info = json.loads(server.stdout.readline())
        stays_in_memory(server.pid)
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=30)
    assert ("cannot be marked as I/O flusher" in info["reclaim"]) == (not CAN_MARK)
    assert ("cannot be marked as I/O flusher" in errors) == (not CAN_MARK)
