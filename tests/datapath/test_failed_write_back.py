"""A flush that fails once fails for good: on all queues, for all processes to come, until an operator forgives it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from vdusefast.api import Device
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.config import make_config
from vdusefast.control.write_back import take_report
from vdusefast.driver.loopback_driver import LoopbackDriver

MIB = 1 << 20
WAIT_S = 20.0
ROOM = MIB  # of the file system under the store

pytestmark = pytest.mark.loop_device


@pytest.fixture
def full_node(tmp_path: Path, attach_loop: Callable[[Path], str]) -> Iterator[str]:
    """Give a block device of 64 MiB whose write-back fails after the first MiB: its file's file system is full."""
    there = tmp_path / "full"
    there.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", there], check=True, timeout=20)
    try:
        image = there / "image"
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        yield attach_loop(image)
    finally:
        # The loop device goes with its fixture, which is behind this one: it keeps the file system until then.
        subprocess.run(["umount", "--lazy", there], check=True, timeout=20)


def config_for(node: str, **options: Any) -> Any:
    return make_config(name="d0", uri=f"file:{node}", **{"queues": 2, "engine": "sync"} | options)


def overfill(driver: LoopbackDriver, queue: int = 0) -> None:
    """Write what cannot be stored; the page cache takes it."""
    for index in range(4):
        driver.write((16 + 8 * queue + index) * MIB, os.urandom(MIB), queue=queue)


def flush_error(driver: LoopbackDriver, queue: int = 0) -> int:
    try:
        driver.flush(queue=queue)
    except OSError as error:
        return error.errno or 0
    return 0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def steal_report(device: Device) -> None:
    """Take the kernel's report by the workers' description, as one does that is killed before it has said so."""
    assert device._store is not None
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.fdatasync(device._store.fd)


def kill_worker(device: Device, queue: int) -> None:
    pid = device.queues()[queue].pid
    os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: device.queues()[queue].pid not in (pid, -1) and device.queues()[queue].state == "running",
        "the next worker",
    )


@pytest.mark.parametrize("engine", ["sync", "cached", "uring"])
def test_every_queue_is_told_and_no_flush_succeeds_any_more(full_node: str, engine: str, tmp_path: Path) -> None:
    with Device(config_for(full_node, engine=engine), run_dir=tmp_path) as device, device.driver() as driver:
        overfill(driver, 0)
        overfill(driver, 1)
        assert [flush_error(driver, queue) for queue in (0, 1, 0, 1)] == [errno.EIO] * 4
        driver.write(0, b"y" * 512)  # nothing else is refused
        assert driver.read(0, 512) == b"y" * 512
        info, stats = device.info(), device.stats()
    assert f"vdusefast recover {device.name}" in info["failure"]
    assert info["store_failure"]["errno"] == errno.EIO
    assert abs(info["store_failure"]["since_s"] - time.time()) < 100
    assert stats.to_dict()["store_failure"] == info["store_failure"]
    assert stats.ops["flush"].errors == 4


def test_queue_is_told_of_what_another_one_was_told(full_node: str, tmp_path: Path) -> None:
    with Device(config_for(full_node), run_dir=tmp_path) as device, device.driver() as driver:
        overfill(driver)
        steal_report(device)
        assert device.failure is None
        assert flush_error(driver, 1) == errno.EIO


def test_worker_that_dies_with_a_failed_flush_is_no_loss(full_node: str, tmp_path: Path) -> None:
    with Device(config_for(full_node), run_dir=tmp_path) as device, device.driver() as driver:
        overfill(driver)
        steal_report(device)
        for fd in device._write_back.queue_fds:  # and by its witness
            assert take_report(fd) == errno.EIO
        kill_worker(device, 0)
        assert flush_error(driver, 1) == flush_error(driver, 0) == errno.EIO


def test_durable_write_is_told_of_what_another_one_was_told(full_node: str, tmp_path: Path) -> None:
    config = config_for(full_node, cache="writethrough", engine="uring")
    with Device(config, run_dir=tmp_path) as device, device.driver() as driver:
        assert device._store is not None
        fd = os.open(full_node, os.O_RDWR)
        try:
            os.pwrite(fd, os.urandom(4 * MIB), 16 * MIB)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.fdatasync(fd)
        finally:
            os.close(fd)
        steal_report(device)  # as the write of another queue does
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            driver.write(0, b"x" * 4096)


@pytest.mark.slow
def test_failure_outlives_the_servers_until_it_is_forgiven(full_node: str, tmp_path: Path) -> None:
    config = config_for(full_node)
    with ExitStack() as opened:
        host = opened.enter_context(LoopbackHost(tmp_path / "bus"))

        def serve(**options: Any) -> Device:
            device = Device(config, run_dir=tmp_path, transport=RemoteLoopbackTransport(host.path, 30.0))
            opened.callback(device.stop)
            device.start(**options)
            return device

        first = serve()
        driver = opened.enter_context(LoopbackDriver(host.bus))
        overfill(driver)
        assert flush_error(driver) == errno.EIO
        first.hand_over()
        second = serve(recover=True)
        assert "every flush fails" in str(second.failure)
        assert [flush_error(driver, queue) for queue in (0, 1)] == [errno.EIO] * 2
        second.hand_over()
        third = serve(recover=True, forgive=True)
        assert third.failure is None
        assert [flush_error(driver, queue) for queue in (0, 1)] == [0, 0]


def test_report_that_nobody_had_reaches_the_next_server(full_node: str, tmp_path: Path) -> None:
    config = config_for(full_node)
    with ExitStack() as opened:
        host = opened.enter_context(LoopbackHost(tmp_path / "bus"))
        first = Device(config, run_dir=tmp_path, transport=RemoteLoopbackTransport(host.path, 30.0))
        opened.callback(first.stop)
        first.start()
        driver = opened.enter_context(LoopbackDriver(host.bus))
        overfill(driver)
        first.hand_over()
        second = Device(config, run_dir=tmp_path, transport=RemoteLoopbackTransport(host.path, 30.0))
        opened.callback(second.stop)
        second.start(recover=True)
        assert flush_error(driver, 1) == flush_error(driver, 0) == errno.EIO


def test_operator_forgives_a_store_that_is_served(full_node: str, tmp_path: Path) -> None:
    with Device(config_for(full_node), run_dir=tmp_path) as device, device.driver() as driver:
        overfill(driver)
        assert flush_error(driver) == errno.EIO
        wait_until(lambda: "every flush fails" in str(device.failure), "a visible failure")
        device.forgive_store()
        assert [flush_error(driver, queue) for queue in (0, 1)] == [0, 0]
        assert driver.read(20 * MIB - 4096, 4096) == bytes(4096)  # what is lost is not shown as if it were there
        wait_until(lambda: device.failure is None, "its end")
        overfill(driver, 1)
        assert flush_error(driver) == errno.EIO  # a new one is seen


def test_what_others_lost_before_is_none_of_the_device(
    full_node: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert shutil.which("dd")
    subprocess.run(
        ["dd", "if=/dev/urandom", f"of={full_node}", "bs=1M", "seek=16", "count=4", "conv=notrunc", "status=none"],
        check=False,
        timeout=30,
        capture_output=True,
    )
    with Device(config_for(full_node), run_dir=tmp_path) as device, device.driver() as driver:
        assert "data written to it earlier may be lost" in caplog.text
        assert flush_error(driver) == 0


def test_failed_flush_of_a_rule_is_kept_too(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(MIB)
    config = make_config(name="d0", uri=f"faulty:op=flush,error=ENOSPC,count=1:file:{image}", queues=2)
    with Device(config, run_dir=tmp_path) as device, device.driver() as driver:
        assert [flush_error(driver, queue) for queue in (0, 1, 0)] == [errno.EIO] * 3
        assert device.info()["store_failure"]["errno"] == errno.ENOSPC
