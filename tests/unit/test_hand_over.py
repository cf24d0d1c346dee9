"""One server takes over from another, with real processes: proof, hand-over, and what happens when that goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hand_over_rig import BLOCK_BYTES, READY_S, Load, Servers, said_pid

from vdusefast import errors
from vdusefast.api import Device
from vdusefast.backends import store_scheme
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.config import Config, make_config, resolve_cpus
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.server import hand_over
from vdusefast.server.rpc_client import RpcClient


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def servers(tmp_path: Path, image: Path) -> Iterator[Servers]:
    config = resolve_cpus(make_config(name="vd0", uri=f"file:{image}", queues=2))
    with LoopbackHost(tmp_path / "bus") as host:
        made = Servers(tmp_path / "run", host, config)
        try:
            yield made
        finally:
            made.close()


def wait_serving(path: Path, pid: int) -> None:
    until = time.monotonic() + READY_S
    while hand_over.serving_pid(path) != pid:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_new_server_takes_over_and_the_old_one_ends_once_it_serves(servers: Servers) -> None:
    old = servers.start("first")
    said_pid(old)
    with LoopbackDriver(servers.host.bus) as driver, Load(driver) as load:
        load.wait_more()
        new = servers.start("next")
        assert said_pid(new) == new.pid
        assert old.wait(READY_S) == 0
        load.wait_more()
        assert hand_over.serving_pid(servers.path) == new.pid


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["start", "die", "hang"])
def test_old_server_takes_the_device_back_when_the_new_one_fails(servers: Servers, wrong: str) -> None:
    """Once it has the device; twice, as the old one is a server like any other afterwards."""
    old = servers.start("first", limit_s=3.0 if wrong == "hang" else READY_S)
    said_pid(old)
    with LoopbackDriver(servers.host.bus) as driver, Load(driver) as load:
        for _ in range(2 if wrong == "start" else 1):
            load.wait_more()
            new = servers.start("next", wrong)
            assert new.wait(READY_S) != 0
            wait_serving(servers.path, old.pid)
            load.wait_more()
        assert old.poll() is None


def refused(servers: Servers, config: Config | None = None) -> str:
    new = servers.start("next", config=config)
    _out, err = new.communicate(timeout=READY_S)
    assert new.returncode not in (0, -signal.SIGKILL)
    return err


@pytest.mark.slow
def test_what_the_new_server_could_not_do_is_found_before_the_hand_over(servers: Servers, image: Path) -> None:
    old = servers.start("first")
    said_pid(old)
    with LoopbackDriver(servers.host.bus) as driver, Load(driver) as load:
        image.rename(image.with_suffix(".away"))
        assert "no such file" in refused(servers)
        image.write_bytes(bytes(1 << 19))
        assert "disk.img" in refused(servers) or "size in sectors" in refused(servers)
        image.with_suffix(".away").rename(image)
        engine = msgspec.structs.replace(servers.config.backend, engine="memory")
        assert 'engine: "memory"' in refused(servers, msgspec.structs.replace(servers.config, backend=engine)).replace(
            "'", '"'
        )
        queues = resolve_cpus(make_config(name="vd0", uri=f"file:{image}", queues=1))
        assert "device.queues" in refused(servers, queues)
        load.wait_more()
        assert hand_over.serving_pid(servers.path) == old.pid
    with RpcClient(servers.path) as client:
        client.call("delete")
    assert old.wait(READY_S) == 0


@pytest.mark.slow
def test_worker_that_cannot_start_is_found_before_the_hand_over(tmp_path: Path, image: Path) -> None:
    """Beside a device that is served: its store is locked, and the proof leaves everything as it is."""
    config = resolve_cpus(make_config(name="vd0", uri=f"file:{image}", queues=2))
    run = tmp_path / "run"

    def files() -> list[tuple[str, int]]:
        return sorted((each.name, each.stat().st_ino) for each in (run / "vd0").iterdir())

    with (
        LoopbackHost(tmp_path / "bus") as host,
        Device(config, run_dir=run, transport=RemoteLoopbackTransport(host.path)) as device,
    ):
        transport, before = RemoteLoopbackTransport(host.path), files()
        Device(config, run_dir=run, transport=transport).prove()
        command = ["/bin/sh", "-c", "exit 3"]
        with pytest.raises(errors.WorkerError, match="ended with status 3"):
            Device(config, run_dir=run, transport=transport, worker_command=command).prove()
        assert files() == before
        assert device.failure is None
        with LoopbackDriver(host.bus) as driver:
            driver.write(0, b"x" * BLOCK_BYTES)


def test_pid_of_a_successor_that_has_ended_is_refused(tmp_path: Path) -> None:
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    with pytest.raises(errors.VdusefastError, match="has ended"):
        hand_over.Successor(tmp_path / "vd0", ended.pid, 1.0)


def test_signal_ends_an_old_server_that_waits_for_its_successor(tmp_path: Path) -> None:
    successor = hand_over.Successor(tmp_path / "vd0", os.getpid(), 60.0)
    signal_fd = os.eventfd(1, os.EFD_CLOEXEC)
    try:
        assert successor.wait(signal_fd) == ""
    finally:
        os.close(signal_fd)
        successor.close()


@pytest.mark.parametrize(
    ("uri", "outlives"),
    [
        ("memory:1M", False),
        ("faulty:op=read,error=EIO,every=100:memory:1M", False),
        ("faulty:op=read,error=EIO,every=100:null:1M", True),
        ("null:1M", True),
    ],
)
def test_store_says_whether_the_device_outlives_its_server(tmp_path: Path, uri: str, outlives: bool) -> None:
    config = make_config(name="vd0", uri=uri)
    with LoopbackHost(tmp_path / "bus") as host:
        transport = RemoteLoopbackTransport(host.path)
        with Device(config, run_dir=tmp_path / "run", transport=transport) as device:
            assert device.outlives_server == outlives
    with Device(config, run_dir=tmp_path / "run") as device:
        assert not device.outlives_server  # its bus ends with it


def test_scheme_is_that_of_what_holds_the_bytes() -> None:
    assert store_scheme("faulty:op=read,delay=1ms:null:1M") == "null"
    assert store_scheme("nbd+unix:///?socket=x") == "nbd"
