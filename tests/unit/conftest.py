"""Fixtures of several modules of unit tests."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from vdusefast.host import node_users, sysfs
from vdusefast.transport import kernel_control


@pytest.fixture
def sees_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a server see all processes of the machine, also where the tests run in a container."""
    monkeypatch.setattr(node_users, "unseen_text", lambda node: "")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeKernel:
    made = FakeKernel()
    monkeypatch.setattr(fcntl, "ioctl", made.ioctl)
    monkeypatch.setattr(kernel_control, "CONTROL_NODE", os.devnull)
    monkeypatch.setattr(kernel_control, "open_device", lambda name: os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    monkeypatch.setattr(sysfs, "SYS", tmp_path)
    for path in ("bus/vdpa/drivers/virtio_vdpa", "bus/virtio/drivers/virtio_blk", "class/vduse/vd0"):
        (tmp_path / path).mkdir(parents=True)
    online = tmp_path / "devices/system/cpu/online"
    online.parent.mkdir(parents=True)
    online.write_text("0-1,33\n")
    for attribute in ("msg_timeout", "bounce_size"):
        (tmp_path / "class/vduse/vd0" / attribute).touch()
    return made
