"""A device that the previous release serves is adopted, or taken over, by this one; nothing of it is lost."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hand_over_rig import Load, Servers, said_pid
from held_writes import HELD, QUEUES, HeldWrites, check_blocks, wait_until, write_blocks
from previous_release import READY_S, Server, build, find_commit, version_at

import vdusefast
from vdusefast.api import Device
from vdusefast.bench.torture.loopback_host import LoopbackHost, RemoteLoopbackTransport
from vdusefast.cli import app as cli
from vdusefast.config import make_config, resolve_cpus
from vdusefast.driver.loopback_driver import LoopbackDriver
from vdusefast.server import hand_over
from vdusefast.server.rpc_client import RpcClient
from vdusefast.state import saved_state

COMMIT = find_commit()
NAME = "vd0"
PACKAGE = Path(vdusefast.__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not COMMIT, reason="no git history here that has the previous release"),
]


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the previous release, built."""
    made = tmp_path_factory.mktemp("previous-release")
    build(COMMIT, made)
    return made


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LoopbackHost]:
    """Return the bus of the device, which stands for the kernel: it outlives the servers."""
    with LoopbackHost(tmp_path / "bus") as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def config(image: Path) -> dict[str, Any]:
    """Return a configuration, as keywords."""
    return {"name": NAME, "uri": f"file:{image}", "queues": QUEUES}


@pytest.fixture
def servers(host: LoopbackHost, tmp_path: Path, config: dict[str, Any]) -> Iterator[Servers]:
    """Return a starter of servers of this release, on the same bus."""
    made = Servers(tmp_path / "run", host, resolve_cpus(make_config(**config)))
    yield made
    made.close()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_device_of_a_killed_server_is_adopted(
    packed: bool, tree: Path, host: LoopbackHost, image: Path, tmp_path: Path
) -> None:
    """Requests that it had in flight are answered, and what it wrote is there."""
    hold = tmp_path / "hold"
    uri = f"faulty:op=write,range={HELD.start}-{HELD.stop},delay=3600s,file={hold}:file:{image}"
    words = {"name": NAME, "uri": uri, "queues": QUEUES, "packed": packed}
    with ExitStack() as stopping, Server(tree, host.path, tmp_path / "run", **words) as server:
        assert server.info["version"] == version_at(COMMIT) != vdusefast.__version__
        with LoopbackDriver(host.bus) as driver:
            write_blocks(driver)
            hold.touch()
            with HeldWrites(driver) as held:
                wait_until(lambda: all(server.inflight_count(queue) for queue in range(QUEUES)))
                server.end()
                assert held.unanswered()
                hold.unlink()
                state = saved_state.load(server.path / "state")
                assert state is not None
                device = Device(state.config, run_dir=tmp_path / "run", transport=RemoteLoopbackTransport(host.path))
                device.start(recover=True)
                stopping.callback(device.stop)
            assert held.errors == []
            check_blocks(driver)
        assert device.failure is None


def test_server_is_replaced_while_requests_run(
    tree: Path,
    host: LoopbackHost,
    servers: Servers,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """This release's commands understand it; then a new server proves that it can serve, and takes over."""
    monkeypatch.setenv("VDUSEFAST_RUN_DIR", str(servers.base))
    with (
        Server(tree, host.path, servers.base, **config) as old,
        LoopbackDriver(host.bus) as driver,
        Load(driver) as load,
    ):
        load.wait_more()
        for words, shown in ((["list"], NAME), (["show", NAME], NAME), (["stats", NAME], "requests")):
            assert cli.run(words) == 0
            assert shown in capsys.readouterr().out
        new = servers.start("next")
        assert said_pid(new) == new.pid
        assert old.process.wait(READY_S) == 0
        load.wait_more()
        assert hand_over.serving_pid(servers.path) == new.pid
        with RpcClient(servers.path) as client:
            assert client.call("info")["version"] == vdusefast.__version__


def test_server_whose_files_were_replaced_is_followed_by_one_of_this_release(
    tree: Path, host: LoopbackHost, servers: Servers, config: dict[str, Any], tmp_path: Path
) -> None:
    """A worker dies meanwhile. The next one would be of this release, which does not serve for that server."""
    files = tmp_path / "files" / "vdusefast"
    shutil.copytree(tree / "vdusefast", files)
    with Server(files.parent, host.path, servers.base, **config) as old, LoopbackDriver(host.bus) as driver:
        write_blocks(driver)
        shutil.rmtree(files)
        shutil.copytree(PACKAGE, files, ignore=shutil.ignore_patterns("bench", "__pycache__"))
        os.kill(old.info["queues"][0]["pid"], signal.SIGKILL)
        with HeldWrites(driver) as held:
            new = servers.start("next")
            assert said_pid(new) == new.pid
            assert old.process.wait(READY_S) == 0
        assert held.errors == []
        check_blocks(driver)
