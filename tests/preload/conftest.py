"""Fixtures of the preload library's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import preload_rig
import pytest

from vdusefast.api import Device
from vdusefast.config import make_config
from vdusefast.driver import preload
from vdusefast.driver.attach_server import AttachServer


@pytest.fixture(scope="session")
def preload_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preload_rig.build(tmp_path_factory.mktemp("preload") / "preload.so")


@pytest.fixture(params=["double", "device"])
def disk(request: pytest.FixtureRequest, preload_library: Path, tmp_path: Path) -> Iterator[preload_rig.Disk]:
    """A disk of the double, and one of a device that programs attach to."""
    made = preload_rig.Disk(preload_library, tmp_path)
    if request.param == "double":
        yield made
        return
    made.path.unlink()
    config = make_config(name=made.path.name, uri=f"file:{made.store}", transport="loopback", queues=2)
    with Device(config) as device, AttachServer(device.bus, directory=tmp_path) as server:
        assert server.path == made.path
        made.environment = preload.environment(server)
        yield made
        assert server.failure is None
        assert device.failure is None
