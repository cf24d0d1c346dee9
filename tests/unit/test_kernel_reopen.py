"""The kernel transport takes over a device that a server has left, with the kernel's answers played."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_kernel import SPEC, FakeKernel

from vdusefast.errors import DeviceBusyError, KernelSupportError, VdusefastError
from vdusefast.host import sysfs, vdpa
from vdusefast.transport import DeviceBrokenError, TransportError, kernel_control, uapi
from vdusefast.transport.kernel import KernelOptions, KernelTransport

STATUS_DRIVER = uapi.VIRTIO_CONFIG_S_ACKNOWLEDGE | uapi.VIRTIO_CONFIG_S_DRIVER | uapi.VIRTIO_CONFIG_S_FEATURES_OK


@pytest.fixture
def reopened(fake: FakeKernel, tmp_path: Path) -> Iterator[KernelTransport]:
    (tmp_path / "bus/vdpa/devices/vd0").mkdir(parents=True)
    transport = KernelTransport(
        KernelOptions(
            msg_timeout_s=45, attach_timeout_s=0.1, bounce_size_bytes=1 << 20, api_version=1, vduse_features=2
        )
    )
    transport.reopen(SPEC)
    yield transport
    transport.close(keep=True)


def test_a_device_is_taken_over_as_it_is(reopened: KernelTransport, fake: FakeKernel, tmp_path: Path) -> None:
    """Nothing of it is made again; what may change is set."""
    assert fake.asked == []
    assert (reopened.api_version, reopened.vduse_features, reopened.name) == (1, 2, "vd0")
    settings = tmp_path / "class/vduse/vd0"
    assert ((settings / "msg_timeout").read_text(), (settings / "bounce_size").read_text()) == ("45", "")
    assert reopened.worker_port(0).api_version == 1


def test_a_device_that_was_let_go_of_stays(reopened: KernelTransport, fake: FakeKernel) -> None:
    reopened.close(keep=True)
    reopened.close()
    assert reopened.message_fd() == -1
    assert fake.words(uapi.VDUSE_DESTROY_DEV) == []


def test_a_device_that_was_taken_over_is_removed(
    reopened: KernelTransport, fake: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[str] = []
    monkeypatch.setattr(vdpa, "device_delete", deleted.append)
    asyncio.run(reopened.detach())
    reopened.close()
    assert deleted == ["vd0"]
    assert len(fake.words(uapi.VDUSE_DESTROY_DEV)) == 1


def test_a_device_that_is_held_for_a_moment_is_waited_for(fake: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def held(_name: str) -> int:
        tries.append(1)
        if len(tries) < 4:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    monkeypatch.setattr(kernel_control, "open_device", held)
    transport = KernelTransport()
    transport.reopen(SPEC)
    transport.close(keep=True)
    assert len(tries) == 4


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (errno.EBUSY, DeviceBusyError, "a process holds /dev/vduse/vd0 open"),
        (errno.EACCES, TransportError, "cannot be adopted: /dev/vduse/vd0: Permission denied"),
    ],
)
def test_a_device_that_cannot_be_opened_is_left_alone(
    fake: FakeKernel, monkeypatch: pytest.MonkeyPatch, refusal: int, kind: type[VdusefastError], words: str
) -> None:
    def refuse(_name: str) -> int:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(kernel_control, "open_device", refuse)
    monkeypatch.setattr(kernel_control, "REOPEN_WAIT_S", 0.02)
    transport = KernelTransport()
    with pytest.raises(kind, match=f"device vd0: .*{words}"):
        transport.reopen(SPEC)
    transport.close()
    assert fake.asked == []


def test_a_broken_device_is_not_taken_over(fake: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_control, "is_broken", lambda _fd: True)
    transport = KernelTransport()
    with pytest.raises(DeviceBrokenError, match="device vd0 is broken"):
        transport.reopen(SPEC)
    assert transport.message_fd() == -1
    transport.close()
    assert fake.asked == []


def test_a_device_that_nobody_serves_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe without a reader polls as a broken device does."""

    def open_pipe(path: str, _flags: int) -> int:
        assert path == "/dev/vduse/vd0"
        reader, writer = os.pipe()
        opened.append(reader)
        return writer

    def held(_path: str, _flags: int) -> int:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    opened: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(kernel_control.os, "open", open_pipe)
        assert not kernel_control.is_left_broken("vd0")
        patch.setattr(kernel_control.os, "open", lambda path, flags: _without_reader(open_pipe(path, flags), opened))
        assert kernel_control.is_left_broken("vd0")
        broken = [errno.EBUSY, errno.EBUSY, 0]  # workers of a server that was killed have it for a moment
        patch.setattr(
            kernel_control.os,
            "open",
            lambda path, flags: held(path, flags) if broken.pop(0) else _without_reader(open_pipe(path, flags), opened),
        )
        assert kernel_control.is_left_broken("vd0")
        patch.setattr(kernel_control, "LEFT_WAIT_S", 0.02)
        patch.setattr(kernel_control.os, "open", held)
        assert not kernel_control.is_left_broken("vd0")
    for fd in opened:
        os.close(fd)


def _without_reader(writer: int, readers: list[int]) -> int:
    os.close(readers.pop())
    return writer


def test_settings_that_are_refused_leave_the_device(fake: FakeKernel, tmp_path: Path) -> None:
    transport = KernelTransport(KernelOptions(irq_cpus=(1, None, None)))
    with pytest.raises(KernelSupportError, match="this kernel cannot set vq0/irq_cb_affinity"):
        transport.reopen(SPEC)
    (tmp_path / "class/vduse/vd0/msg_timeout").unlink()
    (tmp_path / "class/vduse/vd0/msg_timeout").mkdir()
    with pytest.raises(TransportError, match=r"device vd0: cannot be set up: .*msg_timeout"):
        KernelTransport().reopen(SPEC)
    transport.close()
    assert fake.words(uapi.VDUSE_DESTROY_DEV) == []


@pytest.mark.parametrize(
    ("features", "irq", "status"),
    [
        (0, b"", 0),
        (7, errno.EINVAL, STATUS_DRIVER),
        (7, b"", STATUS_DRIVER | uapi.VIRTIO_CONFIG_S_DRIVER_OK),
    ],
)
@pytest.mark.parametrize("bus", ["virtio", "vhost"])
def test_the_status_is_told_by_what_the_kernel_takes(
    reopened: KernelTransport,
    fake: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    bus: str,
    features: int,
    irq: int | bytes,
    status: int,
) -> None:
    """A queue of vhost with an eventfd is interrupted whatever the status: there it is the configuration's turn."""
    number = uapi.VDUSE_DEV_INJECT_CONFIG_IRQ if bus == "vhost" else uapi.VDUSE_VQ_INJECT_IRQ
    fake.answers |= {uapi.VDUSE_DEV_GET_FEATURES: struct.pack("=Q", features), number: irq}
    monkeypatch.setattr(reopened, "options", KernelOptions(bus=bus))
    assert reopened.driver_status() == status
    assert {asked for asked, _ in fake.asked} <= {uapi.VDUSE_DEV_GET_FEATURES, number}


def test_a_status_that_cannot_be_asked_for_is_told(reopened: KernelTransport, fake: FakeKernel) -> None:
    fake.answers |= {uapi.VDUSE_DEV_GET_FEATURES: struct.pack("=Q", 1), uapi.VDUSE_VQ_INJECT_IRQ: errno.EPERM}
    with pytest.raises(PermissionError):
        reopened.driver_status()


def test_attach_does_what_the_server_before_has_not(
    reopened: KernelTransport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bound: list[str] = []

    def bind(_name: str, driver: str) -> None:
        bound.append(driver)
        (tmp_path / "bus/vdpa/devices/vd0/driver").symlink_to(tmp_path / "bus/vdpa/drivers" / driver)
        monkeypatch.setattr(sysfs, "node", lambda _name: "/dev/vda")

    monkeypatch.setattr(vdpa, "device_new", lambda _name: pytest.fail("it is on the bus"))
    monkeypatch.setattr(sysfs, "bind", bind)
    for _ in range(2):
        asyncio.run(reopened.attach())
    assert bound == ["virtio_vdpa"]


def test_the_kernel_waits_less_long_while_no_driver_comes_or_goes(
    reopened: KernelTransport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Linux 7.3 resets each device at shutdown and waits for servers that have died."""
    limit = tmp_path / "class/vduse/vd0/msg_timeout"
    monkeypatch.setattr(sysfs, "bind", lambda _name, _driver: None)
    monkeypatch.setattr(sysfs, "node", lambda _name: "/dev/vda")
    monkeypatch.setattr(sysfs, "bound_driver", lambda _name: "virtio_vdpa")
    limit.write_text("")
    asyncio.run(reopened.attach())
    assert limit.read_text() == "2"
    at_unbind: list[str] = []
    monkeypatch.setattr(sysfs, "unbind", lambda _name: at_unbind.append(limit.read_text()))
    monkeypatch.setattr(vdpa, "device_delete", lambda _name: None)
    limit.write_text("")
    asyncio.run(reopened.detach())
    assert at_unbind == ["45"]


def test_a_device_that_was_left_before_it_was_on_the_bus_is_put_there(
    fake: FakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    added: list[str] = []
    monkeypatch.setattr(vdpa, "device_new", added.append)
    monkeypatch.setattr(sysfs, "bind", lambda _name, _driver: None)
    monkeypatch.setattr(sysfs, "node", lambda _name: "/dev/vda")
    transport = KernelTransport()
    transport.reopen(SPEC)
    asyncio.run(transport.attach())
    transport.close(keep=True)
    assert added == ["vd0"]
