"""Real workers under a real supervisor: pinning, life and death, signals, what they cost, what they may not do."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import vdusefast
from vdusefast.control.limits import Limits
from vdusefast.transport import uapi

MIB = 1 << 20
CPUS = sorted(os.sched_getaffinity(0))

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse file of 16 MiB."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


def wait_until(condition: object, seconds: float = 5.0) -> bool:
    """Return whether `condition()` came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


def gone(pid: int) -> bool:
    """Return whether a process has ended; one that nobody has waited for counts as ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_worker_is_pinned_to_the_configured_cpu(image: Path) -> None:
    cpus = [CPUS[-1], CPUS[0]]
    config = vdusefast.make_config(name="pin", uri=f"file:{image}", queues=2, cpus=cpus)
    with vdusefast.Device(config) as device:
        for queue, cpu in zip(device.queues(), cpus, strict=True):
            status = Path(f"/proc/{queue.pid}/status").read_text()
            allowed = next(line for line in status.splitlines() if line.startswith("Cpus_allowed_list"))
            assert allowed.split()[1] == str(cpu)
            assert queue.cpu == cpu


def test_bytes_in_the_file_are_what_was_written(image: Path) -> None:
    config = vdusefast.make_config(name="bytes", uri=f"file:{image}", queues=2)
    blocks = {offset: os.urandom(12 * 512) for offset in (0, 512, 9 * MIB + 512, 16 * MIB - 12 * 512)}
    with vdusefast.Device(config) as device, device.driver() as driver:
        for number, (offset, data) in enumerate(blocks.items()):
            driver.write(offset, data, queue=number % 2)
            driver.flush(queue=1)
            assert driver.read(offset, len(data), queue=(number + 1) % 2) == data
    expected = bytearray(16 * MIB)
    for offset, data in blocks.items():
        expected[offset : offset + len(data)] = data
    assert image.read_bytes() == bytes(expected)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["writeback", "writethrough", "none", "unsafe"])
@pytest.mark.parametrize("engine", ["sync", "uring"])
def test_every_cache_mode_and_engine_keeps_data(image: Path, cache: str, engine: str) -> None:
    config = vdusefast.make_config(name="modes", uri=f"file:{image}", cache=cache, engine=engine)
    data = os.urandom(256 * 1024)
    with vdusefast.Device(config) as device, device.driver() as driver:
        driver.write(4 * MIB, data)
        driver.write_zeroes(4 * MIB, 8192, unmap=True)
        driver.write_zeroes(4 * MIB + 8192, 8192)
        driver.discard(4 * MIB + 65536, 65536)
        driver.flush()
        got = driver.read(4 * MIB, len(data))
        assert device.queues()[0].engine == engine
    assert got[:16384] == bytes(16384)
    assert got[16384:65536] == data[16384:65536]
    assert got[131072:] == data[131072:]
    assert image.read_bytes()[4 * MIB : 4 * MIB + len(data)] == got


def test_killed_worker_is_named_and_replaced_and_others_go_on(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = vdusefast.make_config(name="victim", uri=f"file:{image}", queues=2)
    with caplog.at_level(logging.WARNING, "vdusefast"), vdusefast.Device(config) as device, device.driver() as driver:
        victim = device.queues()[0]
        os.kill(victim.pid, signal.SIGKILL)
        driver.write(0, b"x" * 512, queue=1)
        assert driver.read(0, 512, queue=1) == b"x" * 512
        assert driver.read(0, 512, queue=0) == b"x" * 512
        assert wait_until(lambda: str(device.queues()[0].state) == "running")
        assert device.queues()[0].restarts == 1
        assert device.failure is None
    (message,) = [record.getMessage() for record in caplog.records if "SIGKILL" in record.getMessage()]
    for part in ("victim", "queue 0", str(victim.pid), "replaced"):
        assert part in message


def test_worker_told_to_end_drains_ends_with_status_0_and_is_replaced(
    image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = vdusefast.make_config(name="term", uri=f"file:{image}")
    with caplog.at_level(logging.WARNING, "vdusefast"), vdusefast.Device(config) as device, device.driver() as driver:
        process = psutil.Process(device.queues()[0].pid)
        process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: device.queues()[0].restarts == 1)
        driver.write(0, b"y" * 512)
        assert driver.read(0, 512) == b"y" * 512
    assert "status 0" in caplog.text


SERVE = """
import sys, vdusefast
from vdusefast.server.signals import StopSignals
config = vdusefast.make_config(name=sys.argv[1], uri="file:" + sys.argv[2], queues=2)
with StopSignals() as stop, vdusefast.Device(config) as device, device.driver() as driver:
    driver.write(0, b"z" * 512)
    print(*(queue.pid for queue in device.queues()), flush=True)
    stop.wait(30)
"""


def serve(image: Path, name: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a process that serves `image` with two workers; returns it and the workers' pids."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, name, str(image)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "VDUSEFAST_RUN_DIR": str(image.parent)},  # what is left there is for a successor
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_no_worker_survives_its_supervisor(image: Path, how: signal.Signals) -> None:
    process, pids = serve(image, "orphan")
    with process:
        assert len(pids) == 2
        assert not any(gone(pid) for pid in pids)
        process.send_signal(how)
        assert process.wait(10) == -how
    assert wait_until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_group", [False, True])
def test_stop_signals_drain_and_end_with_status_0(image: Path, how: signal.Signals, to_group: bool) -> None:
    process, pids = serve(image, "drain")
    with process:
        if to_group:
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        assert process.wait(10) == 0
    assert wait_until(lambda: all(gone(pid) for pid in pids))


def test_stuck_worker_does_not_hold_up_messages(image: Path) -> None:
    config = vdusefast.make_config(name="stuck", uri=f"file:{image}", queues=2)
    with vdusefast.Device(config, limits=Limits(quiesce_s=0.5)) as device:
        driver = device.driver()
        stuck = device.queues()[0].pid
        os.kill(stuck, signal.SIGSTOP)
        started = time.monotonic()
        driver.close()  # status 0: quiesces both queues, and cannot wait for the stopped one
        assert time.monotonic() - started < 5
        assert wait_until(lambda: gone(stuck))
        with device.driver() as again:
            again.write(0, b"y" * 512, queue=0)
            assert again.read(0, 512, queue=1) == b"y" * 512
        assert device.queues()[0].pid != stuck


@pytest.mark.slow
def test_idle_worker_sleeps(image: Path) -> None:
    config = vdusefast.make_config(name="idle", uri=f"file:{image}", queues=2)
    with vdusefast.Device(config) as device, device.driver() as driver:
        driver.write(0, b"x" * 4096)
        workers = [psutil.Process(queue.pid) for queue in device.queues()]
        before = [sum(worker.cpu_times()[:2]) for worker in workers]
        time.sleep(2)
        used = [sum(worker.cpu_times()[:2]) - start for worker, start in zip(workers, before, strict=True)]
        assert max(used) <= 0.02 + 0.01  # 1 % of two seconds, and a clock tick
        assert all(worker.memory_info().rss < 24 * MIB for worker in workers)


@pytest.mark.slow
@pytest.mark.loop_device
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("engine", ["sync", "uring"])
def test_block_device_is_served(image: Path, attach_loop: Callable[[Path], str], cache: str, engine: str) -> None:
    image.write_bytes(b"\xee" * 16 * MIB)
    node = attach_loop(image)
    config = vdusefast.make_config(name="bdev", uri=f"file:{node}", cache=cache, engine=engine)
    data = os.urandom(65536)
    with vdusefast.Device(config) as device, device.driver() as driver:
        assert driver.capacity_bytes == 16 * MIB
        driver.write(MIB, data)
        driver.write_zeroes(MIB + 4096, 8192)
        driver.write_zeroes(MIB + 16384, 8192, unmap=True)
        driver.discard(8 * MIB, MIB)
        driver.flush()
        got = driver.read(MIB, len(data))
        stats = device.stats()
    assert got == data[:4096] + bytes(8192) + data[12288:16384] + bytes(8192) + data[24576:]
    assert stats.errors == 0
    written = image.read_bytes()
    assert written[MIB : MIB + len(data)] == got
    assert written[:MIB] == b"\xee" * MIB
    assert not any(written[8 * MIB : 9 * MIB])  # the loop driver punched a hole


# Loads the system call's number and its last argument; a number that matches fails with EPERM, all else is allowed.
# With FLAGS only calls whose sixth argument is not 0 fail.
SERVE_FORBIDDEN = """
import ctypes, json, struct, sys
number, with_flags, options, features = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
allow, deny = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)
code = [(0x20, 0, 0, 0), (0x15, 1, 0, number), allow]
code += [(0x20, 0, 0, 16 + 8 * 5), (0x15, 0, 1, 0), allow, deny] if with_flags else [deny]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
class Filter(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
fprog = Filter(len(code), ctypes.addressof(program))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(fprog), 0, 0) == 0
import vdusefast
from vdusefast.driver.loopback_driver import LoopbackDriver
config = vdusefast.make_config(name="seccomp", **options)
try:
    with vdusefast.Device(config) as device, LoopbackDriver(device.bus, features=features) as driver:
        driver.write(0, b"x" * 4096)
        print(device.queues()[0].engine)
except (vdusefast.VdusefastError, OSError) as error:
    print(type(error).__name__, error)
"""
IO_URING_SETUP = 425
PWRITEV2 = {"x86_64": 328, "aarch64": 287}.get(os.uname().machine)


def serve_forbidden(number: int | None, with_flags: bool, features: int | None = None, **options: str) -> str:
    """Return what a device printed that ran, with its worker, where one system call is forbidden."""
    words = json.dumps([number, with_flags, options, features])
    command = [sys.executable, "-c", SERVE_FORBIDDEN, words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "answer"), [("auto", "sync"), ("uring", "KernelSupportError"), ("sync", "sync")])
def test_kernel_that_forbids_io_uring(image: Path, engine: str, answer: str) -> None:
    out = serve_forbidden(IO_URING_SETUP, False, uri=f"file:{image}", engine=engine, cache="none")
    assert out.split()[0] == answer
    if engine == "uring":
        assert "refuses io_uring" in out
        assert "queue 0" in out


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@pytest.mark.parametrize("flush", [True, False])
def test_writes_are_durable_unless_the_driver_can_flush(image: Path, cache: str, flush: bool) -> None:
    """Durable is RWF_DSYNC, the flags of pwritev2: where these are forbidden, exactly such writes fail."""
    features = uapi.VIRTIO_F_VERSION_1 | uapi.VIRTIO_F_ACCESS_PLATFORM
    if flush and cache == "writeback":  # writethrough does not offer it
        features |= uapi.VIRTIO_BLK_F_FLUSH
    out = serve_forbidden(PWRITEV2, True, features, uri=f"file:{image}", engine="sync", cache=cache)
    assert out.split()[0] == ("sync" if flush and cache == "writeback" else "OSError")


def test_sleeping_worker_is_woken_by_io_uring(image: Path) -> None:
    """Not by the timer that looks at the ring every 100 ms: such a request counts as a relook."""
    config = vdusefast.make_config(name="wake", uri=f"file:{image}", engine="uring", cache="none", poll_us=0)
    with vdusefast.Device(config) as device, device.driver() as driver:
        for block in range(64):
            driver.read(block * 4096, 4096)
        queue = device.stats().queues[0]
    assert queue.sleeps > 16
    assert queue.relooks < 5


def test_worker_imports_nothing_from_the_current_directory(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (image.parent / "mmap.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(image.parent)
    with vdusefast.Device(vdusefast.make_config(name="cwd", uri=f"file:{image}")) as device, device.driver() as driver:
        driver.write(0, b"x" * 512)


def test_auto_takes_io_uring_for_o_direct(image: Path) -> None:
    config = vdusefast.make_config(name="auto", uri=f"file:{image}", cache="none")
    with vdusefast.Device(config) as device:
        assert device.queues()[0].engine == "uring"
