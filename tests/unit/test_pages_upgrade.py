"""Shared pages of another layout: a new server carries the in-flight logs over, or refuses before it takes anything."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from vdusefast.api import Device
from vdusefast.base.build import BUILD_ID
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.config import make_config, resolve_cpus
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.errors import VdusefastError, WorkerError
from vdusefast.state import pages_upgrade, shared_pages
from vdusefast.worker import main as worker

ROOT = Path(__file__).parents[2]
NAME, QUEUES, SIZE = "d0", 2, 256
LOG_BYTES = shared_pages.INFLIGHT_HEADER_BYTES + SIZE * shared_pages.INFLIGHT_ENTRY_BYTES


@contextmanager
def other_layout() -> Iterator[None]:
    """Have shared_pages.py write what a version with other counters and histograms would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_pages, "VERSION", 99)
        for name in ("HIST_OFFSET", "INFLIGHT_OFFSET"):
            patch.setattr(shared_pages, name, getattr(shared_pages, name) + 4096)
        yield


def log_of(pages: shared_pages.SharedPages, queue: int) -> bytes:
    start = shared_pages.queue_offset(queue) + shared_pages.INFLIGHT_OFFSET
    return pages.map[start : start + LOG_BYTES]


def set_log(pages: shared_pages.SharedPages, queue: int, log: bytes) -> None:
    start = shared_pages.queue_offset(queue) + shared_pages.INFLIGHT_OFFSET
    pages.map[start : start + len(log)] = log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return pages of another layout: requests of queue 1 are in flight, and flushes fail."""
    with other_layout(), shared_pages.SharedPages.create(tmp_path / "pages", NAME, QUEUES, SIZE) as pages:
        pages.fail_flushes(5)
        pages.begin_log(0, 7)
        pages.void_log(0)
        pages.begin_log(1, 1000)
        log = bytearray(log_of(pages, 1))
        log[shared_pages.INFLIGHT_HEADER_BYTES + 16 * 3] = 9  # the order of head 3
        set_log(pages, 1, bytes(log))
    return tmp_path / "pages"


def test_logs_and_the_failure_of_flushes_are_carried_over(path: Path) -> None:
    with other_layout(), shared_pages.SharedPages.open(path) as old:
        log = log_of(old, 1)
    with pytest.raises(VdusefastError, match="not shared pages of this version"):
        shared_pages.SharedPages.reopen(path, NAME, QUEUES, SIZE)
    with pages_upgrade.reopen(path, NAME, QUEUES, SIZE) as pages:
        assert log_of(pages, 1) == log
        assert pages.log_is_void(0)
        assert [pages.has_inflight(queue) for queue in range(QUEUES)] == [False, True]
        failure = pages.flush_failure()
        assert failure is not None
        assert failure.errno == 5
    assert [entry.name for entry in path.parent.iterdir()] == ["pages"]
    pages_upgrade.reopen(path, NAME, QUEUES, SIZE).close()


def test_pages_whose_blocks_had_the_size_of_the_ring_are_carried_over(tmp_path: Path) -> None:
    """Version 2: the log of a queue had as many entries as its ring was offered, and the next block followed it."""
    path, stride = tmp_path / "pages", shared_pages.block_used_bytes(SIZE)
    offsets = (
        shared_pages.COUNTERS_OFFSET,
        shared_pages.HIST_OFFSET,
        shared_pages.INFLIGHT_OFFSET,
        shared_pages.HIST_BUCKET_COUNT,
        len(shared_pages.OPS),
    )
    header = (shared_pages.MAGIC, 2, shared_pages.HEADER_BYTES, QUEUES, SIZE, stride, *offsets, 0, NAME.encode())
    with shared_pages.SharedPages.create(None, NAME, QUEUES, SIZE) as pages:
        pages.begin_log(1, 1000)
        log = bytearray(log_of(pages, 1))
    log[shared_pages.INFLIGHT_HEADER_BYTES + 16 * (SIZE - 1)] = 9  # the order of the last head
    old = bytearray(shared_pages.HEADER_BYTES + QUEUES * stride)
    old[: shared_pages.HEADER_STRUCT.size] = shared_pages.HEADER_STRUCT.pack(*header)
    at = shared_pages.HEADER_BYTES + stride + shared_pages.INFLIGHT_OFFSET
    old[at : at + len(log)] = log
    path.write_bytes(old)
    pages_upgrade.check(path, NAME, QUEUES, SIZE)
    with pages_upgrade.reopen(path, NAME, QUEUES, SIZE) as pages:
        assert log_of(pages, 1) == log
        assert [pages.has_inflight(queue) for queue in range(QUEUES)] == [False, True]


def test_proof_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    pages_upgrade.check(path, NAME, QUEUES, SIZE)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["pages"]


@pytest.mark.parametrize("act", [pages_upgrade.check, pages_upgrade.reopen])
def test_log_that_cannot_be_read_is_refused_while_anything_may_be_in_flight(path: Path, act: object) -> None:
    with other_layout(), shared_pages.SharedPages.open(path, writable=True) as pages:
        log = log_of(pages, 1)
        set_log(pages, 1, log[:8] + bytes([77]) + log[9:])
    before = path.read_bytes()
    assert callable(act)
    with pytest.raises(VdusefastError, match="d0: queue 1: its in-flight log has version 77, and this vdusefast reads"):
        act(path, NAME, QUEUES, SIZE)
    assert path.read_bytes() == before
    with other_layout(), shared_pages.SharedPages.open(path, writable=True) as pages:
        pages.void_log(1)  # its driver has reset the device
    pages_upgrade.check(path, NAME, QUEUES, SIZE)
    pages_upgrade.reopen(path, NAME, QUEUES, SIZE).close()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [((NAME, 1, SIZE), "another device or geometry"), (("d1", QUEUES, SIZE), "another device or geometry")],
)
def test_pages_of_another_device_are_refused(path: Path, wanted: tuple[str, int, int], said: str) -> None:
    with pytest.raises(VdusefastError, match=said):
        pages_upgrade.reopen(path, *wanted)


def test_pages_that_are_cut_are_refused(path: Path) -> None:
    os.truncate(path, 4096 + 100)
    with pytest.raises(VdusefastError, match="the shared pages were cut, and its in-flight log is gone"):
        pages_upgrade.reopen(path, NAME, QUEUES, SIZE)
    os.truncate(path, 50)
    with pytest.raises(VdusefastError, match="too short"):
        pages_upgrade.reopen(path, NAME, QUEUES, SIZE)


def test_worker_does_not_write_pages_of_another_layout(tmp_path: Path) -> None:
    with shared_pages.SharedPages.create(tmp_path / "pages", NAME, QUEUES, SIZE) as pages:
        worker._check_pages(pages.fd, SIZE)
        with pytest.raises(WorkerError, match="have another layout than this build"):
            worker._check_pages(pages.fd, 2 * SIZE)
    create = shared_pages.SharedPages.create
    with other_layout(), create(tmp_path / "pages", NAME, QUEUES, SIZE) as pages, pytest.raises(WorkerError):
        worker._check_pages(pages.fd, SIZE)


def to_other_layout(path: Path) -> None:
    """Rewrite pages as if a server of another layout had left them."""
    with shared_pages.SharedPages.open(path) as ours:
        logs = [log_of(ours, queue) for queue in range(QUEUES)]
    with other_layout(), shared_pages.SharedPages.create(path, NAME, QUEUES, SIZE) as theirs:
        for queue, log in enumerate(logs):
            set_log(theirs, queue, log)


def test_device_goes_on_where_a_server_of_another_layout_stood(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    config = make_config(name=NAME, uri=f"file:{tmp_path}/disk.img", queues=QUEUES, queue_size=SIZE)
    with LoopbackHost(tmp_path / "bus") as host:

        def make() -> Device:
            return Device(config, run_dir=tmp_path, transport=RemoteLoopbackTransport(host.path))

        first = make()
        first.start()
        with LoopbackDriver(host.bus) as driver:
            for number in range(50):
                driver.write(number * 512, bytes([number]) * 512, queue=number % QUEUES)
            first.hand_over()
            to_other_layout(tmp_path / NAME / "pages")
            second = make()
            second.prove()
            second.start(recover=True)
            for number in range(50):
                assert driver.read(number * 512, 512, queue=1 - number % QUEUES) == bytes([number]) * 512
            assert second.failure is None
        second.stop()


@pytest.fixture(scope="session")
def other_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a build of the same sources with other shared pages."""
    tree = tmp_path_factory.mktemp("other-build")
    for name in ("csrc", "vdusefast"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "bench"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name, old, new in (
        ("csrc/base/counters.h", "#define VF_HIST_MAX_BITS 40u", "#define VF_HIST_MAX_BITS 41u"),
        ("csrc/base/counters.h", f"#define VF_SHM_VERSION {shared_pages.VERSION}u", "#define VF_SHM_VERSION 99u"),
        ("vdusefast/state/shared_pages.py", "HIST_MAX_BITS = 40", "HIST_MAX_BITS = 41"),
        ("vdusefast/state/shared_pages.py", f"\nVERSION = {shared_pages.VERSION}\n", "\nVERSION = 99\n"),
    ):
        text = (tree / name).read_text()
        assert text.count(old) == 1, (name, old)
        (tree / name).write_text(text.replace(old, new))
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "VDUSEFAST_OPTIMIZE": "-O0", "VDUSEFAST_EXTENSIONS": "worker._datapath driver._driver"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout
    assert (tree / "vdusefast/build_id.txt").read_text().strip() != BUILD_ID
    return tree


def start(words: list[str], package: Path) -> subprocess.Popen[str]:
    """Start a server of tests/unit/successor.py with a build, and wait until it serves."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("successor.py")), *words],
        env={**os.environ, "PYTHONPATH": str(package)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0]
    assert process.stdout.readline().strip() == str(process.pid)
    return process


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_server_of_another_build_takes_over_and_gives_back(other_build: Path, tmp_path: Path) -> None:
    """Each takes over from the other, with proof and hand-over; data and requests go on."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    config = resolve_cpus(make_config(name=NAME, uri=f"file:{tmp_path}/disk.img", queues=QUEUES, queue_size=SIZE))
    text = msgspec.json.encode(config).decode()
    with LoopbackHost(tmp_path / "bus") as host:
        words = [str(host.path), str(tmp_path), text]
        server = start([*words, "first", "", "60"], ROOT)
        try:
            with LoopbackDriver(host.bus) as driver:
                for turn, package in enumerate((other_build, ROOT, other_build)):
                    for queue in range(QUEUES):
                        driver.write(queue * 8192, bytes([turn + 1]) * 8192, queue=queue)
                    old, server = server, start([*words, "next", "", "60"], package)
                    old.communicate(timeout=60)
                    assert old.returncode == 0
                    for queue in range(QUEUES):
                        assert driver.read(queue * 8192, 8192, queue=1 - queue) == bytes([turn + 1]) * 8192
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
