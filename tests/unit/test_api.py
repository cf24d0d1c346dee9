"""The public API: a device from start to stop, and the effect of signals on a command."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vdusefast import ConfigError, Device, DeviceBusyError, KernelSupportError, VdusefastError, make_config
from vdusefast.config import Config
from vdusefast.control.supervisor import Supervisor
from vdusefast.errors import BackendError
from vdusefast.server.signals import PatientStopSignals, StopRequestedError, StopSignals
from vdusefast.state import orphans
from vdusefast.transport.loopback import LoopbackTransport

BASE = Path(os.environ["VDUSEFAST_RUN_DIR"])
UNWANTED = ("numpy", "rich", "psutil", "click")


def test_bytes_written_through_the_driver_are_in_the_file(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    config = make_config(name="d0", uri=f"file:{image}", queues=2, queue_size=64)
    with Device(config) as device, device.driver() as driver:
        driver.write(8192, b"vdusefast" * 512)
        assert driver.read(8192, 512)[:9] == b"vdusefast"
        driver.flush()
        stats = device.stats()
        assert (stats.ops["write"].requests, stats.bytes_written) == (1, 4608)
        assert sum(queue.requests for queue in stats.queues) == stats.requests == 3
        plain = json.loads(json.dumps(stats.to_dict()))
        assert plain["total"]["ops"]["write"]["bytes"] == 4608
        assert plain["queues"][1]["pid"] == device.queues()[1].pid
    assert image.read_bytes()[8192:8201] == b"vdusefast"
    assert device.failure is None


def test_start_needs_a_process_for_each_queue_and_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is there as soon as its workers are: every pause of its loop would last for ever here."""
    started: list[list[str]] = []
    pauses: list[float] = []
    begin_process, sleep, pause = subprocess.Popen.__init__, time.sleep, asyncio.sleep

    def note_process(process: subprocess.Popen[bytes], command: list[str], **words: Any) -> None:
        started.append(command)
        begin_process(process, command, **words)

    def note_sleep(seconds: float) -> None:
        pauses.append(seconds)
        sleep(seconds)

    async def pause_for_ever(seconds: float) -> None:
        await (asyncio.Event().wait() if seconds else pause(0))

    device = Device(make_config(name="d0", uri="null:1G", queues=2))
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", note_process)
        patch.setattr(time, "sleep", note_sleep)
        patch.setattr(asyncio, "sleep", pause_for_ever)
        device.start()
    device.stop()
    assert ["worker" in " ".join(command) for command in started] == [True, True]
    assert pauses == []


def test_serving_does_not_import_what_it_does_not_need() -> None:
    code = f"""
        import sys
        from vdusefast import Device, make_config
        with Device(make_config(name="d0", uri="null:1G")) as device:
            device.queues()
        sys.exit(", ".join(name for name in {UNWANTED} if name in sys.modules) or 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_device_is_started_once() -> None:
    device = Device(make_config(name="d0", uri="null:1M"))
    with device, pytest.raises(VdusefastError, match="has been started already"):
        device.start()
    with pytest.raises(VdusefastError, match="has been started already"):
        device.start()


def test_name_in_use_is_busy_and_leaves_the_first_alone() -> None:
    config = make_config(name="d0", uri="null:1M")
    with Device(config) as device:
        with pytest.raises(DeviceBusyError):
            Device(config).start()
        assert device.stats().requests == 0


def test_parts_of_a_device_that_does_not_run_are_refused() -> None:
    device = Device(make_config(name="d0", uri="null:1M"))
    assert (device.queues(), device.failure, str(device.state)) == ([], None, "created")
    with pytest.raises(VdusefastError, match="has not been started"):
        _ = device.bus
    with pytest.raises(VdusefastError, match="no counters"):
        device.stats()
    device.stop()
    with device:
        pass
    with pytest.raises(VdusefastError, match="no counters"):
        device.stats()


def test_kernel_transport_says_what_the_kernel_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdusefast.transport.kernel_control.CONTROL_NODE", "/nonexistent/control")
    monkeypatch.setattr("vdusefast.host.sysfs.SYS", Path("/nonexistent"))
    device = Device(make_config(name="d0", uri="memory:1M", transport="kernel"))
    with pytest.raises(KernelSupportError, match="no vduse, virtio_vdpa, virtio_blk: modprobe -a vduse"):
        device.start()


def test_driver_may_be_closed_after_its_device() -> None:
    device = Device(make_config(name="d0", uri="memory:1M"))
    device.start()
    driver = device.driver()
    driver.write(0, bytes(512))
    device.stop()
    driver.close()


def test_no_worker_outlives_a_supervisor_that_is_killed() -> None:
    code = """
        import sys, time
        from vdusefast import Device, make_config
        device = Device(make_config(name="d0", uri="null:1M", queues=2))
        device.start()
        print(*(queue.pid for queue in device.queues()), flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() and b"worker" in _cmdline(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # The next device of that name finds what was left, and takes its place.
    with Device(make_config(name="d0", uri="null:1M")):
        pass


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_signal_is_noted_and_the_second_one_acts(number: signal.Signals) -> None:
    seen: list[int] = []
    previous = signal.signal(number, lambda n, _frame: seen.append(n))
    try:
        with StopSignals() as signals:
            assert not signals.requested
            assert not signals.wait(0.01)
            timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
            timer.start()
            assert signals.wait(10)
            assert (signals.requested, signals.received, seen) == (True, number, [])
            os.kill(os.getpid(), number)  # the same one, sent to the process and to its group
            assert seen == []
            signals.SAME_S = 0.0
            os.kill(os.getpid(), number)
            assert seen == [number]
            timer.join()
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("number", PatientStopSignals.SIGNALS)
def test_patient_signals_are_noted_however_many_come(number: signal.Signals) -> None:
    seen: list[int] = []
    previous = signal.signal(number, lambda n, _frame: seen.append(n))
    try:
        with PatientStopSignals() as signals:
            signals.SAME_S = 0.0
            assert (signals.requested, signals.wait(0.01)) == (False, False)
            for _ in range(3):
                os.kill(os.getpid(), number)
            assert signals.wait(10)
            assert (signals.requested, signals.received, seen) == (True, number, [])
            assert select.select([signals], [], [], 0)[0] == [signals]
            with pytest.raises(StopRequestedError, match=number.name), signals.interrupting():
                pytest.fail("it has come before")
        os.kill(os.getpid(), number)
        assert seen == [number]
    finally:
        signal.signal(number, previous)


def test_signal_that_interrupts_another_thread_ends_the_wait() -> None:
    """Python runs the handler in the main thread, whose system call it does not interrupt."""
    done = threading.Event()
    other = threading.Thread(target=done.wait, args=(60,))
    other.start()  # before the main thread blocks the signal
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    with StopSignals() as signals:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            timer.start()
            assert signals.wait(30)
            assert signals.wait_for(timeout_s=30) == []
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            done.set()
            other.join()
            timer.join()


def test_wait_of_another_thread_ends_with_the_signal() -> None:
    seen: list[bool] = []
    with StopSignals() as signals:
        other = threading.Thread(target=lambda: seen.append(signals.wait(30)))
        other.start()
        os.kill(os.getpid(), signal.SIGTERM)
        other.join()
    assert seen == [True]


def test_wait_for_descriptors_ends_early_for_a_signal_alone() -> None:
    read_fd, write_fd = os.pipe()
    try:
        with StopSignals() as signals:
            assert signals.wait_for(read_fd, timeout_s=0.01) == []
            os.write(write_fd, b"x")
            assert signals.wait_for(read_fd) == [read_fd]
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.wait_for(read_fd) == []
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_hangup_that_nohup_ignores_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PatientStopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.wait(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.wait(5)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_signal_just_after_the_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has started completely is stopped, and not only released."""
    stopped = []
    real_call, real_stop = Device._call, Supervisor.stop

    def call(self: Device, work: Any, timeout_s: float) -> Any:
        result = real_call(self, work, timeout_s)
        if work.__name__ == "start":
            raise StopRequestedError("SIGTERM")
        return result

    async def stop(self: Supervisor, timeout_s: float = 30.0, *, force: bool = False) -> None:
        stopped.append(str(self.state))
        await real_stop(self, timeout_s, force=force)

    monkeypatch.setattr(Device, "_call", call)
    monkeypatch.setattr(Supervisor, "stop", stop)
    device = Device(make_config(name="d0", uri="null:1M"))
    with pytest.raises(StopRequestedError):
        device.start()
    assert stopped == ["attached"]
    device.stop()
    assert str(device.state) == "created"


@pytest.mark.slow
@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_command_that_is_told_to_stop_drains_and_ends_with_status_0(number: signal.Signals) -> None:
    code = """
        import sys
        from vdusefast import Device, make_config
        from vdusefast.server.signals import StopSignals
        with StopSignals() as signals, Device(make_config(name="d0", uri="null:1M", queues=2)) as device:
            print("ready", flush=True)
            signals.wait()
        sys.exit(str(device.failure) if device.failure else 0)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(20) == 0


def test_start_without_descriptors_left_is_one_error_and_leaks_none() -> None:
    code = """
import os, resource, vdusefast
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (before + 24, before + 24))
device = vdusefast.Device(vdusefast.make_config(name="few", uri="null:1M", queues=16))
try:
    device.start()
except vdusefast.VdusefastError as error:
    print(error)
del device
print(len(os.listdir("/proc/self/fd")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    message, leaked = done.stdout.splitlines()
    assert "few" in message
    assert "Too many open files" in message
    assert leaked == "0"


# -- one server after another


def recover_config(tmp_path: Path, **overrides: Any) -> Config:
    image = tmp_path / "disk.img"
    if not image.exists():
        image.write_bytes(bytes(1 << 20))
    return make_config(name="d0", uri=f"file:{image}", **{"queues": 2, "queue_size": 64, **overrides})


def test_device_goes_from_one_object_to_the_next(tmp_path: Path) -> None:
    """Its driver notices nothing: what it asks for in between is answered by the next."""
    config = recover_config(tmp_path)
    first = Device(config)
    first.start()
    bus = first.bus
    with first.driver() as driver:
        driver.write(0, b"first" + bytes(507))
        first.hand_over()
        assert str(first.state) == "stopped"
        assert not first.recovered
        first.stop()
        assert sorted(os.listdir(BASE / "d0")) == ["lock", "pages", "state"]
        answers: list[bytes] = []
        waiting = threading.Thread(target=lambda: answers.append(driver.read(0, 512)))
        waiting.start()
        second = Device(config, transport=LoopbackTransport(bus=bus))
        second.start(recover=True)
        assert second.recovered
        waiting.join(10)
        driver.write(512, b"second" + bytes(506))
        assert answers[0][:5] == driver.read(0, 512)[:5] == b"first"
        assert second.stats().requests > 3  # counted on
    assert second.failure is None
    second.stop()
    assert not (BASE / "d0").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"queues": 1}, r"device\.queues"),
        ({"event_idx": False}, r"device\.event_idx"),
        ({"seg_max": 3}, r"device\.seg_max"),
    ],
)
def test_another_device_does_not_take_its_place(tmp_path: Path, overrides: dict[str, Any], words: str) -> None:
    first = Device(recover_config(tmp_path))
    first.start()
    bus = first.bus
    first.hand_over()
    before = {entry.name: entry.stat() for entry in (BASE / "d0").iterdir()}
    other = Device(recover_config(tmp_path, **overrides), transport=LoopbackTransport(bus=bus))
    with pytest.raises(ConfigError, match=f"^d0: {words}: "):
        other.start(recover=True)
    after = {entry.name: entry.stat() for entry in (BASE / "d0").iterdir()}
    assert set(before) == set(after)
    for name in ("pages", "state"):
        assert (before[name].st_ino, before[name].st_mtime_ns) == (after[name].st_ino, after[name].st_mtime_ns)
    with_it = Device(recover_config(tmp_path), transport=LoopbackTransport(bus=bus))
    with_it.start(recover=True)
    with_it.stop()


def test_features_that_were_shown_are_served_whatever_would_be_offered(tmp_path: Path) -> None:
    """IN_ORDER is not offered with engine uring, as that costs; a driver that has it keeps it."""
    settings = {"in_order": True, "packed": True, "cache": "writeback"}
    first = Device(recover_config(tmp_path, engine="sync", **settings))
    first.start()
    bus, shown = first.bus, first.info()["offered_features"]
    assert "IN_ORDER" in shown
    with first.driver() as driver:
        first.hand_over()
        second = Device(recover_config(tmp_path, engine="uring", **settings), transport=LoopbackTransport(bus=bus))
        second.start(recover=True)
        assert (second.info()["offered_features"], second.queues()[0].engine) == (shown, "uring")
        for number in range(20):
            driver.write(512 * number, bytes([number]) * 512, queue=number % 2)
        assert driver.read(0, 512 * 20) == b"".join(bytes([number]) * 512 for number in range(20))
    second.stop()


@pytest.mark.slow
def test_start_that_cannot_go_on_leaves_all_for_the_next(tmp_path: Path) -> None:
    """The store is somebody else's for a while: `start` waits for it, but not for ever."""
    first = Device(recover_config(tmp_path))
    first.start()
    bus = first.bus
    with first.driver() as driver:
        driver.write(0, b"first" + bytes(507))
        first.hand_over()
        with (tmp_path / "disk.img").open("rb") as image:
            fcntl.flock(image, fcntl.LOCK_EX)
            second = Device(recover_config(tmp_path), transport=LoopbackTransport(bus=bus))
            threading.Timer(0.1, fcntl.flock, (image, fcntl.LOCK_UN)).start()
            second.start(recover=True)
            second.hand_over()
        third = Device(recover_config(tmp_path), transport=LoopbackTransport(bus=bus), worker_command=["/bin/false"])
        with pytest.raises(VdusefastError, match="d0"):
            third.start(recover=True)
        fourth = Device(recover_config(tmp_path), transport=LoopbackTransport(bus=bus))
        fourth.start(recover=True)
        assert driver.read(0, 512)[:5] == b"first"
    fourth.stop()


def test_device_that_is_to_be_removed_fails_its_requests_without_its_store(tmp_path: Path) -> None:
    first = Device(recover_config(tmp_path))
    first.start()
    bus = first.bus
    with first.driver() as driver:
        first.hand_over()
        (tmp_path / "disk.img").unlink()
        missing = Device(recover_config(tmp_path), transport=LoopbackTransport(bus=bus))
        (tmp_path / "disk.img").unlink()
        with pytest.raises(BackendError, match="no such file"):
            missing.start(recover=True)
        second = Device(missing.config, transport=LoopbackTransport(bus=bus))
        second.start(recover=True, fail_requests=True)
        with pytest.raises(OSError, match="Input/output"):
            driver.read(0, 512)
        second.stop()


def test_bytes_in_the_memory_of_a_server_end_with_it() -> None:
    config = make_config(name="d0", uri="memory:1M")
    first = Device(config)
    first.start()
    bus = first.bus
    first.hand_over()
    with pytest.raises(BackendError, match=r"in the memory of the server that has ended.*vdusefast del d0 --force"):
        Device(config, transport=LoopbackTransport(bus=bus)).start(recover=True)
    second = Device(config, transport=LoopbackTransport(bus=bus))
    second.start(recover=True, fail_requests=True)
    second.stop()


def test_pages_of_another_geometry_are_refused(tmp_path: Path) -> None:
    first = Device(recover_config(tmp_path))
    first.start()
    bus = first.bus
    first.hand_over()
    pages = (BASE / "d0/pages").read_bytes()
    for damaged, why in ((pages[:5000], "the shared pages were cut"), (b"x" + pages[1:], "not shared pages of this")):
        (BASE / "d0/pages").write_bytes(damaged)
        with pytest.raises(VdusefastError, match=why):
            Device(recover_config(tmp_path), transport=LoopbackTransport(bus=bus)).start(recover=True)
    (BASE / "d0/pages").write_bytes(pages)
    second = Device(recover_config(tmp_path), transport=LoopbackTransport(bus=bus))
    second.start(recover=True)
    second.stop()


class KernelLike(LoopbackTransport):
    """A device that something keeps when its server has let go of it."""

    kind = "kernel"


def test_device_that_its_driver_keeps_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If `stop` could not remove it, the files that the next server needs stay, too."""
    monkeypatch.setattr(orphans, "is_attached", lambda name: True)
    device = Device(recover_config(tmp_path), transport=KernelLike())
    device.start()
    device.stop()
    assert sorted(os.listdir(BASE / "d0")) == ["lock", "pages", "state"]
    monkeypatch.setattr(orphans, "is_attached", lambda name: False)
    again = Device(recover_config(tmp_path), transport=KernelLike())
    again.start()
    again.stop()
    assert not (BASE / "d0").exists()
