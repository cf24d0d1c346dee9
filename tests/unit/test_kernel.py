"""The kernel transport's conversation with /dev/vduse, with the kernel's answers played; guests test the real one."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_kernel import SPEC, FakeKernel

from vdusefast.config import make_config
from vdusefast.control.assembly import make_transport
from vdusefast.errors import ConfigError, DeviceBusyError, KernelSupportError, TimedOutError, VdusefastError
from vdusefast.host import sysfs, vdpa
from vdusefast.transport import DeviceBrokenError, TransportError, kernel, kernel_control, uapi
from vdusefast.transport.kernel import KernelOptions, KernelTransport


def test_the_newest_protocol_that_both_know_is_used(fake: FakeKernel) -> None:
    assert kernel_control.probe_control() == (1, 3)
    assert fake.words(uapi.VDUSE_SET_API_VERSION) == [struct.pack("=Q", 1)]
    assert fake.words(uapi.VDUSE_SET_FEATURES) == [struct.pack("=Q", 3)]


def test_a_newer_kernel_is_asked_for_what_we_know(fake: FakeKernel) -> None:
    fake.answers[uapi.VDUSE_GET_API_VERSION] = struct.pack("=Q", 7)
    assert kernel_control.probe_control() == (1, 3)


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.ENOTTY])
def test_an_old_kernel_gets_the_old_protocol(fake: FakeKernel, refusal: int) -> None:
    fake.answers[uapi.VDUSE_GET_API_VERSION] = bytes(8)
    fake.answers[uapi.VDUSE_GET_FEATURES] = refusal
    assert kernel_control.probe_control() == (0, 0)
    # A version that is not set binds the newest, under which the old form of CREATE_DEV is refused.
    assert fake.words(uapi.VDUSE_SET_API_VERSION) == [bytes(8)]


@pytest.mark.parametrize("api_version", [0, 1])
def test_the_device_is_created_with_its_queues_and_settings(fake: FakeKernel, tmp_path: Path, api_version: int) -> None:
    fake.answers[uapi.VDUSE_GET_API_VERSION] = struct.pack("=Q", api_version)
    affinity = tmp_path / "class/vduse/vd0/vq1/irq_cb_affinity"
    affinity.parent.mkdir()
    affinity.touch()
    options = KernelOptions(msg_timeout_s=60, bounce_size_bytes=1 << 20, irq_cpus=(None, 33, None))
    transport = KernelTransport(options)
    transport.create(SPEC)
    try:
        (created,) = fake.words(uapi.VDUSE_CREATE_DEV)
        fields = uapi.DEV_CONFIG.unpack_from(created)
        assert fields[0].rstrip(b"\0") == b"vd0"
        assert fields[1:] == (0, 2, SPEC.offered_features, 3, 4096, api_version, api_version, len(SPEC.config))
        assert created[uapi.DEV_CONFIG.size :] == SPEC.config
        assert [uapi.VQ_CONFIG.unpack(words)[:2] for words in fake.words(uapi.VDUSE_VQ_SETUP)] == [
            (0, 256),
            (1, 256),
            (2, 256),
        ]
        settings = tmp_path / "class/vduse/vd0"
        assert (settings / "msg_timeout").read_text() == "60"
        assert (settings / "bounce_size").read_text() == "1048576"
        assert affinity.read_text() == "00000002,00000000"
        port = transport.worker_port(2)
        assert (port.kind, port.port_fd, port.api_version, port.owned_fds) == (
            "kernel",
            transport.message_fd(),
            api_version,
            [],
        )
    finally:
        transport.close()
    assert fake.words(uapi.VDUSE_DESTROY_DEV) == [b"vd0".ljust(256, b"\0")]
    transport.close()
    assert len(fake.words(uapi.VDUSE_DESTROY_DEV)) == 1


@pytest.mark.parametrize(
    ("features", "state", "last_avail_idx"),
    [
        (0, struct.pack("=H6x", 0xFFFE), 0xFFFE),
        (uapi.VIRTIO_F_RING_PACKED, struct.pack("=4H", 1, 0, 1, 0), uapi.PACKED_FRESH),
        (uapi.VIRTIO_F_RING_PACKED, struct.pack("=4H", 0, 7, 1, 255), 0x80FF_0007),
    ],
)
def test_where_a_queue_stands_is_read_as_the_features_have_it(
    fake: FakeKernel, features: int, state: bytes, last_avail_idx: int
) -> None:
    transport = KernelTransport(KernelOptions())
    transport.create(SPEC)
    fake.answers[uapi.VDUSE_DEV_GET_FEATURES] = struct.pack("=Q", features)
    fake.answers[uapi.VDUSE_VQ_GET_INFO] = uapi.VQ_INFO.pack(2, 256, 0x1000, 0x2000, 0x3000, state, 1)
    assert transport.vq_info(2) == uapi.VqInfo(2, 256, 0x1000, 0x2000, 0x3000, last_avail_idx, True)
    transport.close()


def test_no_queue_is_left_with_interrupts_for_absent_cpus_alone(fake: FakeKernel, tmp_path: Path) -> None:
    transport = KernelTransport(KernelOptions(irq_cpus=(None, None, 33)))
    affinities = [tmp_path / f"class/vduse/vd0/vq{index}/irq_cb_affinity" for index in range(3)]
    for affinity in affinities:
        affinity.parent.mkdir()
        affinity.write_text("ffff\n")
    transport.create(SPEC)
    try:
        (tmp_path / "devices/system/cpu/online").write_text("0-1\n")  # CPU 33 has gone meanwhile
        for affinity, mask in zip(affinities, ("3\n", "c\n", "80\n"), strict=True):
            affinity.write_text(mask)
        transport.place_irqs()
        assert [affinity.read_text() for affinity in affinities] == ["3\n", "00000003", "00000003"]
    finally:
        transport.close()


def test_a_cpu_that_is_not_online_gets_no_interrupts(fake: FakeKernel, tmp_path: Path) -> None:
    affinity = tmp_path / "class/vduse/vd0/vq0/irq_cb_affinity"
    affinity.parent.mkdir()
    affinity.touch()
    transport = KernelTransport(KernelOptions(irq_cpus=(7, None, None)))
    with pytest.raises(ConfigError, match="device vd0: irq_cpu: CPU 7 is not online"):
        transport.create(SPEC)
    transport.close()


def test_a_device_of_that_name_on_the_bus_is_somebody_elses(fake: FakeKernel, tmp_path: Path) -> None:
    (tmp_path / "bus/vdpa/devices/vd0").mkdir(parents=True)
    with pytest.raises(DeviceBusyError, match="the vDPA bus has a device of this name"):
        KernelTransport().create(SPEC)
    assert fake.asked == []


def test_a_kernel_that_cannot_set_what_was_asked_for(fake: FakeKernel) -> None:
    transport = KernelTransport(KernelOptions(irq_cpus=(1, None, None)))
    with pytest.raises(KernelSupportError, match="this kernel cannot set vq0/irq_cb_affinity"):
        transport.create(SPEC)
    transport.close()
    assert len(fake.words(uapi.VDUSE_DESTROY_DEV)) == 1


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (errno.EEXIST, DeviceBusyError, "has a VDUSE device of this name already"),
        (errno.EINVAL, TransportError, "the kernel refuses to create it: Invalid argument"),
        (errno.ENOSPC, TransportError, "the kernel refuses to create it: No space"),
    ],
)
def test_a_refused_creation_leaves_nothing_to_destroy(
    fake: FakeKernel, refusal: int, kind: type[VdusefastError], words: str
) -> None:
    fake.answers[uapi.VDUSE_CREATE_DEV] = refusal
    transport = KernelTransport()
    with pytest.raises(kind, match=f"device vd0: .*{words}"):
        transport.create(SPEC)
    transport.close()
    assert fake.words(uapi.VDUSE_DESTROY_DEV) == []


def test_a_device_that_others_hold_cannot_be_destroyed(fake: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_control, "DESTROY_WAIT_S", 0.02)
    transport = KernelTransport()
    transport.create(SPEC)
    fake.answers[uapi.VDUSE_DESTROY_DEV] = errno.EBUSY
    with pytest.raises(DeviceBusyError, match="a process holds /dev/vduse/vd0 open"):
        transport.close()


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("bus/vdpa/drivers/virtio_vdpa", "no virtio_vdpa: modprobe -a virtio_vdpa"),
        ("bus/virtio/drivers/virtio_blk", "no virtio_blk: modprobe -a virtio_blk"),
    ],
)
def test_a_missing_driver_is_named_before_anything_is_made(
    fake: FakeKernel, tmp_path: Path, missing: str, words: str
) -> None:
    (tmp_path / missing).rmdir()
    with pytest.raises(KernelSupportError, match=words):
        KernelTransport().create(SPEC)
    assert fake.asked == []


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (errno.ENOENT, KernelSupportError, "modprobe vduse"),
        (errno.EACCES, KernelSupportError, "no permission for .*(be root|a mount with nodev)"),
        (errno.EPERM, KernelSupportError, "the device cgroup forbids it: .*--device-cgroup-rule='c .*:\\* rw'"),
        (errno.EBUSY, DeviceBusyError, "held by another program"),
        (errno.ENXIO, KernelSupportError, "cannot be opened"),
    ],
)
def test_a_control_node_that_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, refusal: int, kind: type[VdusefastError], words: str
) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(kernel_control.os, "open", refuse)
    with pytest.raises(kind, match=words):
        kernel_control.probe_control()


@pytest.mark.parametrize("wanted", [True, False])
def test_workers_inherit_the_memory_that_may_be_used(fake: FakeKernel, wanted: bool) -> None:
    transport = KernelTransport(KernelOptions(bounce_size_bytes=1 << 20, user_memory=wanted))
    assert transport.memory_text == "the kernel's bounce pages"
    transport.create(SPEC)
    try:
        memory = transport.user_memory()
        before = transport.worker_port(0)
        if memory is None:
            assert not wanted
            assert (before.user_memory_fd, before.user_memory_bytes) == (-1, 0)
            return
        assert (before.user_memory_fd, before.user_memory_bytes) == (memory.fd, 0)
        memory.fill()
        assert memory.register()
        (asked,) = fake.words(uapi.VDUSE_IOTLB_REG_UMEM)
        assert uapi.IOVA_UMEM.unpack(asked)[1:] == (0, 1 << 20, 0)
        assert transport.worker_port(0).user_memory_bytes == 1 << 20
    finally:
        transport.close()
    assert memory.fd == -1


def test_a_client_of_vhost_has_memory_of_its_own(fake: FakeKernel, tmp_path: Path) -> None:
    (tmp_path / "bus/vdpa/drivers/vhost_vdpa").mkdir()
    transport = KernelTransport(KernelOptions(bus="vhost"))
    assert transport.memory_text == "the client's own"
    transport.create(SPEC)
    try:
        assert transport.user_memory() is None
    finally:
        transport.close()


# -- attach


@pytest.fixture
def created(fake: FakeKernel) -> Iterator[KernelTransport]:
    transport = KernelTransport(KernelOptions(attach_timeout_s=0.1))
    transport.create(SPEC)
    yield transport
    transport.close()


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (errno.EPERM, KernelSupportError, "be root"),
        (errno.EEXIST, DeviceBusyError, "choose another name"),
        (errno.EINVAL, TransportError, "refuses to attach it: Invalid"),
    ],
)
def test_a_refused_attach(
    created: KernelTransport,
    monkeypatch: pytest.MonkeyPatch,
    refusal: int,
    kind: type[VdusefastError],
    words: str,
) -> None:
    def refuse(_name: str) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(vdpa, "device_new", refuse)
    with pytest.raises(kind, match=f"device vd0: .*{words}"):
        asyncio.run(created.attach())
    deleted: list[str] = []
    monkeypatch.setattr(vdpa, "device_delete", deleted.append)
    asyncio.run(created.detach())
    assert deleted == []  # a device of that name on the bus is somebody else's


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        (None, "did not finish attaching"),
        ("", "bound to no driver, not to virtio_vdpa"),
        ("virtio_vdpa", "virtio_vdpa has it, but has made no usable node"),
    ],
)
def test_an_attach_that_takes_too_long_says_what_is_missing(
    created: KernelTransport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bound: str | None, words: str
) -> None:
    device = tmp_path / "bus/vdpa/devices/vd0"
    if bound is not None:
        device.mkdir(parents=True)
    if bound:
        (device / "driver").symlink_to(tmp_path / "bus/vdpa/drivers" / bound)
    monkeypatch.setattr(vdpa, "device_new", lambda _name: None)
    monkeypatch.setattr(sysfs, "bind", lambda _name, _driver: None)
    with pytest.raises(TimedOutError, match=f"not attached within 0.1 s: .*{words}"):
        asyncio.run(created.attach())


def test_a_device_that_is_gone_already_counts_as_detached(
    created: KernelTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_name: str) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(vdpa, "device_new", lambda _name: None)
    monkeypatch.setattr(sysfs, "bind", lambda _name, _driver: None)
    monkeypatch.setattr(vdpa, "device_delete", gone)
    with pytest.raises(TimedOutError):
        asyncio.run(created.attach())
    asyncio.run(created.detach())


def test_a_vhost_client_keeps_the_device_in_the_kernel(
    created: KernelTransport, monkeypatch: pytest.MonkeyPatch, fake: FakeKernel
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(vdpa, "device_new", lambda _name: None)
        patch.setattr(sysfs, "bind", lambda _name, _driver: None)
        with pytest.raises(TimedOutError):
            asyncio.run(created.attach())
        patch.setattr(sysfs, "bound_driver", lambda _name: "vhost_vdpa")
        patch.setattr(sysfs, "node", lambda _name: "/dev/vhost-vdpa-0")
        patch.setattr(kernel.node_users, "find_users", lambda _node: ["open by pid 7 (qemu)"])
        with pytest.raises(DeviceBusyError, match=r"vhost-vdpa-0 is open by pid 7 \(qemu\).*vdpa dev del vd0"):
            asyncio.run(created.detach())
        created.close()
    assert fake.words(uapi.VDUSE_DESTROY_DEV) == []


# -- messages


def test_a_broken_device_is_told_from_a_silent_one(created: KernelTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(writer, "wb"), monkeypatch.context() as patch:
        patch.setattr(created, "_fd", reader)
        assert created.receive() is None
        os.write(writer, uapi.pack_request(uapi.Suspend(5)))
        assert created.receive() == uapi.Suspend(5)
        os.close(reader)
        patch.setattr(created, "_fd", writer)  # a pipe without a reader polls as in error
        patch.setattr(kernel.os, "read", _would_block)
        with pytest.raises(DeviceBrokenError, match=r"not answered within its msg_timeout.*recover vd0"):
            created.receive()


def _would_block(*_args: object) -> bytes:
    raise BlockingIOError(errno.EAGAIN, "again")


def test_regions_are_counted_one_after_the_other(created: KernelTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    regions = [(0, 0xFFF), (0x10000, 0x1FFFF)]

    def ioctl(_fd: int, number: int, argument: bytearray) -> int:
        assert number == uapi.VDUSE_IOTLB_GET_INFO
        start = uapi.IOVA_INFO.unpack(argument)[0]
        found = next((region for region in regions if region[1] >= start), None)
        if found is None:
            raise OSError(errno.EINVAL, "Invalid argument")
        argument[:] = uapi.IOVA_INFO.pack(*found, 0, 0)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "ioctl", ioctl)
        assert created.region_count() == 2
        regions.append((1 << 63, uapi.IOVA_LAST))
        assert created.region_count() == 3


# -- kernels before 6.4, whose bounce pages have one size


def options_of(**settings: Any) -> KernelOptions:
    transport = make_transport(make_config(name="vd0", uri="null:1M", transport="kernel", **settings), None)
    assert isinstance(transport, KernelTransport)
    return transport.options


@pytest.mark.parametrize(
    "settings",
    [
        {"queues": 2},
        {"queues": 16},
        {"bounce_size_bytes": 64 << 20},
        {"bounce_size_bytes": 32 << 20},
        {"size_max_bytes": 1 << 20, "seg_max": 32},
    ],
)
def test_kernel_without_bounce_size_serves_with_what_it_has(
    fake: FakeKernel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    (tmp_path / "class/vduse/vd0/bounce_size").unlink()
    transport = KernelTransport(options_of(**settings))
    transport.create(SPEC)
    assert transport.bounce_size_bytes == 64 << 20
    transport.close()
    transport.reopen(SPEC)
    transport.close(keep=True)


@pytest.mark.parametrize("settings", [{"bounce_size_bytes": 128 << 20}, {"size_max_bytes": 1 << 20}])
def test_kernel_without_bounce_size_refuses_what_would_not_fit(
    fake: FakeKernel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """A request larger than the bounce pages would wait for ever."""
    (tmp_path / "class/vduse/vd0/bounce_size").unlink()
    transport = KernelTransport(options_of(**settings))
    with pytest.raises(
        KernelSupportError, match=r"this kernel has 67108864 and .* set device\.bounce_size_bytes = 67108864,"
    ):
        transport.create(SPEC)
    transport.close()


def test_what_the_message_of_a_kernel_without_bounce_size_says_helps(fake: FakeKernel, tmp_path: Path) -> None:
    (tmp_path / "class/vduse/vd0/bounce_size").unlink()
    transport = KernelTransport(options_of(size_max_bytes=1 << 20, bounce_size_bytes=64 << 20))
    transport.create(SPEC)
    transport.close()
