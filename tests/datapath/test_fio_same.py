"""fio's options for verification, trim and logs: over the loopback transport fio does what it does on a plain file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import fio_same
import pytest
from fio_rig import retarget

from vdusefast.api import Device
from vdusefast.bench.fio.device import LOOPBACK_MEMORY
from vdusefast.bench.fio.target import Target
from vdusefast.config import make_config
from vdusefast.driver import preload
from vdusefast.driver.attach_server import AttachServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttachServer]:
    store = tmp_path_factory.mktemp("store") / "disk.img"
    store.write_bytes(bytes(fio_same.SIZE_BYTES))
    config = make_config(name="same", uri=f"file:{store}", transport="loopback", queues=2)
    with Device(config) as device, AttachServer(device.bus) as made:
        yield made
        assert device.failure is None
        assert not sum(queue.errors for queue in device.stats().queues)


def on_device(server: AttachServer, name: str, directory: Path) -> fio_same.Seen:
    """Run a combination as `bench fio` does: it chooses the arguments for the device, and the library serves fio."""
    directory.mkdir()
    target = Target(str(server.path), "loopback", "libaio", LOOPBACK_MEMORY)
    arguments = retarget(*fio_same.words_of(name, "disk")).turn_to(target, fio_same.SIZE_BYTES).arguments(directory)
    return fio_same.run(arguments, directory / "run", preload.environment(server))


@pytest.mark.parametrize("name", [name for name in fio_same.COMBINATIONS if not fio_same.trims(name)])
def test_requests_of_a_file(server: AttachServer, tmp_path: Path, name: str) -> None:
    example = tmp_path / "example.img"
    example.write_bytes(bytes(fio_same.SIZE_BYTES))
    wanted = fio_same.run(fio_same.words_of(name, example), tmp_path / "file")
    fio_same.check(name, on_device(server, name, tmp_path / "device"), wanted)


@pytest.mark.loop_device
@pytest.mark.parametrize("name", list(filter(fio_same.trims, fio_same.COMBINATIONS)))
def test_requests_of_a_loop_device(
    server: AttachServer, tmp_path: Path, name: str, attach_loop: Callable[..., str]
) -> None:
    """fio trims no file."""
    example = tmp_path / "example.img"
    example.write_bytes(bytes(fio_same.SIZE_BYTES))
    wanted = fio_same.run(fio_same.words_of(name, attach_loop(example)), tmp_path / "loop")
    fio_same.check(name, on_device(server, name, tmp_path / "device"), wanted)


def test_the_table_has_thirty_combinations() -> None:
    assert len(fio_same.COMBINATIONS) >= 30
    assert set(fio_same.IN_EACH_RUN) <= set(fio_same.COMBINATIONS)
