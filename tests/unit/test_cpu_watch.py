"""A CPU that is gone does not stop a disk: its worker serves on others, and is pinned again when the CPU is back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from vdusefast import config, errors
from vdusefast.api import Device
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.config import Config, make_config
from vdusefast.host import cpu_topology
from vdusefast.transport import DeviceSpec, loopback, uapi
from vdusefast.transport.kernel import KernelOptions, KernelTransport
from vdusefast.worker.main import _pin
from vdusefast.worker.protocol import WorkerSpec

WAIT_S = 20.0
CPUS = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs, one of which may go")


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def loop_thread(name: str) -> int:
    """Return the thread of a device's supervisor, whose CPUs are those that its workers may use."""
    (found,) = [thread for thread in threading.enumerate() if thread.name == f"vdusefast-{name}"]
    assert found.native_id is not None
    return found.native_id


@contextmanager
def shrunk() -> Iterator[None]:
    """Leave this thread, and those that it starts, one CPU alone, as a cpuset does."""
    os.sched_setaffinity(0, CPUS[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, CPUS)


def test_worker_goes_elsewhere_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    placed: list[int] = []
    monkeypatch.setattr(loopback.LoopbackTransport, "place_irqs", lambda self: placed.append(1))
    pinned = make_config(name="d0", uri="memory:1M", cpu=CPUS[1])
    with Device(pinned) as device, device.driver() as driver:
        supervisor, placed_before = loop_thread("d0"), len(placed)
        driver.write(0, b"a" * 512)
        os.sched_setaffinity(supervisor, CPUS[:1])
        wait_until(lambda: device.queues()[0].cpu == -1)
        assert os.sched_getaffinity(device.queues()[0].pid) == {CPUS[0]}
        assert device.info()["missing_cpus"] == f"queue 0 is not pinned: CPU {CPUS[1]} is gone"
        wait_until(lambda: len(placed) > placed_before)  # a mask may have no CPU that is online any more

        before = device.queues()[0].pid
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: device.queues()[0].pid not in (before, -1))
        assert driver.read(0, 512) == b"a" * 512
        assert os.sched_getaffinity(device.queues()[0].pid) == {CPUS[0]}

        os.sched_setaffinity(supervisor, CPUS)
        wait_until(lambda: device.queues()[0].cpu == CPUS[1])
        assert os.sched_getaffinity(device.queues()[0].pid) == {CPUS[1]}
        assert device.info()["missing_cpus"] == ""
        assert driver.read(0, 512) == b"a" * 512
        assert device.failure is None
    where = "device d0: queue 0: CPU"
    assert f"{where} {CPUS[1]} is gone: its worker is not pinned, and runs on {CPUS[0]}" in caplog.text
    assert f"{where} {CPUS[1]} is back: its worker is pinned again" in caplog.text


def test_worker_that_is_not_pinned_is_left_where_it_was_put() -> None:
    with Device(make_config(name="d0", uri="memory:1M")) as device:
        pid = device.queues()[0].pid
        os.sched_setaffinity(pid, CPUS[1:])
        supervisor = loop_thread("d0")
        os.sched_setaffinity(supervisor, CPUS[:1])
        time.sleep(1.5)  # more than a look
        assert os.sched_getaffinity(pid) == set(CPUS[1:])


def test_worker_whose_cpu_is_refused_starts_all_the_same() -> None:
    gone = cpu_topology.CPU_COUNT_MAX - 1
    spec = WorkerSpec(device="d", queue=0, queue_size=2, supervisor_pid=1, ctl_fd=3, shm_fd=4, kick_fd=5, cpu=gone)
    was = os.sched_getaffinity(0)
    now, said = _pin(spec)
    assert now.cpu == -1
    assert said.startswith(f"the worker is not pinned: the kernel refuses CPU {gone}: ")
    assert os.sched_getaffinity(0) == was


def test_device_is_taken_over_without_its_cpu(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    pinned = make_config(name="d0", uri=f"file:{tmp_path}/disk.img", cpu=CPUS[1])
    with LoopbackHost(tmp_path / "bus") as host:

        def make() -> Device:
            return Device(pinned, run_dir=tmp_path, transport=RemoteLoopbackTransport(host.path))

        first = make()
        first.start()
        first.hand_over()
        with shrunk():
            second = make()
            second.start(recover=True)
        try:
            assert second.queues()[0].cpu == -1
            os.sched_setaffinity(loop_thread("d0"), CPUS)
            wait_until(lambda: second.queues()[0].cpu == CPUS[1])
        finally:
            second.stop()


def test_new_device_is_refused_without_its_cpu() -> None:
    pinned = make_config(name="d0", uri="memory:1M", cpu=CPUS[1])
    with shrunk(), pytest.raises(errors.ConfigError, match=rf"queue\[0\]\.cpu: CPU {CPUS[1]} is not allowed"):
        Device(pinned).start()


def offline(*absent: int) -> cpu_topology.Topology:
    """Return a machine with CPU 0, where `absent` are offline."""
    cpus = tuple(cpu_topology.Cpu(index, 0, index, (index,)) for index in (0, *absent))
    return cpu_topology.Topology(cpus[:1], frozenset({0}), cpus[1:], frozenset(absent))


@pytest.mark.parametrize("key", ["cpu", "irq_cpu"])
def test_configuration_may_name_a_cpu_that_is_offline_and_none_that_never_is(key: str) -> None:
    found = Config(
        device=config.DeviceConfig(name="d0"),
        backend=config.BackendConfig(uri="null:1M"),
        queue=[config.QueueConfig(**{key: 5})],
    )
    config.validate(found, offline(5))
    with pytest.raises(errors.ConfigError, match="CPU 5 does not exist; this machine has 0"):
        config.check_cpus(found, offline(5))
    with pytest.raises(errors.ConfigError, match="CPU 5 does not exist"):
        config.validate(found, offline(4))


def test_irq_cpu_that_is_gone_does_not_keep_a_device_from_being_taken_over(fake: FakeKernel, tmp_path: Path) -> None:
    spec = DeviceSpec("vd0", uapi.VIRTIO_F_VERSION_1, bytes(96), queue_count=1, queue_size_max=64)
    mask = tmp_path / "class/vduse/vd0/vq0/irq_cb_affinity"
    mask.parent.mkdir()
    mask.write_text("80\n")  # CPU 7, which is gone
    transport = KernelTransport(KernelOptions(irq_cpus=(7,)))
    with pytest.raises(errors.ConfigError, match="CPU 7 is not online"):
        transport.create(spec)
    transport.close()
    again = KernelTransport(KernelOptions(irq_cpus=(7,)))
    try:
        again.reopen(spec)
        assert mask.read_text() == "00000002,00000003"  # those that are online
        (tmp_path / "devices/system/cpu/online").write_text("0-1,7,33\n")
        again.place_irqs()
        assert mask.read_text().startswith("00000080")  # a file is not cut as an attribute is
    finally:
        again.close(keep=True)
