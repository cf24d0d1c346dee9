"""Fixtures of the preload library's tests."""

from __future__ import annotations

from pathlib import Path

import preload_rig
import pytest


@pytest.fixture(scope="session")
def preload_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preload_rig.build(tmp_path_factory.mktemp("preload") / "preload.so")


@pytest.fixture
def disk(preload_library: Path, tmp_path: Path) -> preload_rig.Disk:
    return preload_rig.Disk(preload_library, tmp_path)
