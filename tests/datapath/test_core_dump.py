"""Core dumps: what a driver or a store has in memory is in none of them, whichever process had it mapped."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vdusefast

MIB = 1 << 20
# Longer than what a copy leaves in the vector registers, which are in every core.
MARKER = random.Random(5).randbytes(4096)
DISK = """
import os
import vdusefast

class Disk(vdusefast.Backend):
    size_bytes = 1 << 20
    shareable = False

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR)

    def pread(self, buffer, offset_bytes):
        os.preadv(self.fd, [buffer], offset_bytes)

    def pwrite(self, buffer, offset_bytes):
        os.pwrite(self.fd, buffer, offset_bytes)
"""
# The mappings that have the driver's data, by their names in /proc/PID/smaps.
SECRET = re.compile(r"memfd:|disk\.img")

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]


@pytest.fixture
def others() -> set[str]:
    """Mappings that tests before this one have left to the garbage collector."""
    return {title for title, _ in mappings(os.getpid())}


@pytest.fixture(params=["memory", "file", "python", "relay"])
def device(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: set[str]
) -> Iterator[vdusefast.Device]:
    """A device whose workers have tmp_path as their working directory, and may leave cores there."""
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    (tmp_path / "disk.py").write_text(DISK)
    disk = f"python:{tmp_path}/disk.py:Disk?path={image}"
    uri = {"memory": "memory:1M", "file": f"file:{image}"}.get(request.param, disk)
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limits[1], limits[1]))
    config = vdusefast.make_config(name="core", uri=uri, queues=2 if request.param == "relay" else 1)
    try:
        with vdusefast.Device(config) as device, device.driver() as driver:
            driver.write(0, MARKER)
            assert driver.read(0, 4096) == MARKER
            yield device
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)


def processes(device: vdusefast.Device) -> list[int]:
    """Return who has the driver's memory, or what comes from it: workers, the relay, and this process, the driver."""
    relay = int(device.info()["relay_pid"])
    return [os.getpid(), *(queue.pid for queue in device.queues()), *([relay] if relay else [])]


def mappings(pid: int) -> list[tuple[str, bool]]:
    """Return the mappings of a process that have data, each with whether a core dump would hold it."""
    found, title = [], ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            title = line
        elif line.startswith("VmFlags:") and SECRET.search(title):
            found.append((title, "dd" not in line.split()))
    return found


def test_no_mapping_with_data_is_dumped(device: vdusefast.Device, others: set[str]) -> None:
    driver_and_workers = processes(device)
    time.sleep(0.5)  # a worker that nobody has asked may still be between an mmap() and its madvise()
    for pid in driver_and_workers:
        ours = [one for one in mappings(pid) if one[0] not in others]
        assert ours, f"process {pid} has no such mapping: this test looks in the wrong place"
        assert not [title for title, dumped in ours if dumped], f"process {pid}"


def core_of(pid: int, where: Path) -> Path | None:
    """Have a process die of SIGABRT; return its core, None where the kernel gives it to somebody else."""
    os.kill(pid, signal.SIGABRT)
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return next(iter(where.glob("core*")), None)


def test_core_has_nothing_of_the_driver(device: vdusefast.Device, tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith(("|", "/")) or resource.getrlimit(resource.RLIMIT_CORE)[0] == 0:
        pytest.skip(f"cores of this machine go elsewhere: {pattern}")
    core = core_of(device.queues()[0].pid, tmp_path)
    assert core is not None, "there is no core"
    data = core.read_bytes()
    core.unlink()
    assert b"vdusefast" in data, "that is no core of a worker"
    assert not any(MARKER[at : at + 512] in data for at in range(0, len(MARKER), 512))
