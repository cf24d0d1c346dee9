"""Memory in place of the kernel's bounce pages: what is asked of the kernel, and how workers are kept from it."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdusefast.config import make_config
from vdusefast.control import user_memory_switch
from vdusefast.control.assembly import make_transport
from vdusefast.control.user_memory_switch import MemoryControl
from vdusefast.transport import uapi, user_memory
from vdusefast.transport.kernel import KernelTransport
from vdusefast.transport.user_memory import UserMemory, UserMemoryError

SIZE = 4 << 20
Answer = bytes | int


class FakeKernel:
    """One device: `info` and `registered` are answers, or the errno that is refused with."""

    def __init__(self) -> None:
        self.info: Answer = uapi.IOVA_INFO.pack(0, SIZE - 1, uapi.VDUSE_IOVA_CAP_UMEM, 0)
        self.refusal = 0
        self.registered: list[tuple[int, int, int]] = []
        self.seen = b""  # what lay at the address

    def ioctl(self, number: int, argument: bytes) -> bytes:
        if number == uapi.VDUSE_IOTLB_GET_INFO:
            assert uapi.IOVA_INFO.unpack(argument) == (0, SIZE - 1, 0, 0)
            if isinstance(self.info, int):
                raise OSError(self.info, os.strerror(self.info))
            return self.info
        assert number == uapi.VDUSE_IOTLB_REG_UMEM
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        address, iova, size_bytes, _ = uapi.IOVA_UMEM.unpack(argument)
        self.registered.append((address, iova, size_bytes))
        self.seen = ctypes.string_at(address + size_bytes - 8, 8)
        return argument


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def memory(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UserMemory]:
    monkeypatch.setattr(user_memory, "HUGE_PAGES", tmp_path)  # a machine without a pool of them
    made = UserMemory("vd0", SIZE, kernel.ioctl)
    yield made
    made.close()


# -- the memory


def test_all_of_it_is_there_before_it_is_given_away(memory: UserMemory, kernel: FakeKernel) -> None:
    assert os.fstat(memory.fd).st_blocks == 0
    memory.fill()
    assert os.fstat(memory.fd).st_blocks * 512 >= SIZE
    os.pwrite(memory.fd, b"the last", SIZE - 8)
    assert memory.used_bytes == 0
    assert memory.register()
    assert memory.used_bytes == SIZE
    ((address, iova, size_bytes),) = kernel.registered
    assert (address % 4096, iova, size_bytes) == (0, 0, SIZE)
    assert kernel.seen == b"the last"


def test_nothing_can_be_cut_off(memory: UserMemory) -> None:
    for size_bytes in (0, SIZE - 4096, SIZE + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size_bytes)


@pytest.mark.parametrize(
    ("info", "due"),
    [
        (errno.EINVAL, False),
        (uapi.IOVA_INFO.pack(0, SIZE - 1, 0, 0), False),
        (uapi.IOVA_INFO.pack(0, SIZE - 1, uapi.VDUSE_IOVA_CAP_UMEM, 0), True),
    ],
)
def test_it_is_due_once_the_kernel_says_so(memory: UserMemory, kernel: FakeKernel, info: Answer, due: bool) -> None:
    kernel.info = info
    assert memory.is_due() == due


def test_a_broken_device_is_not_taken_for_one_that_is_late(memory: UserMemory, kernel: FakeKernel) -> None:
    kernel.info = errno.EPERM
    with pytest.raises(PermissionError):
        memory.is_due()


def test_a_region_that_has_gone_can_come_back(memory: UserMemory, kernel: FakeKernel) -> None:
    memory.fill()
    kernel.refusal = errno.EINVAL
    assert not memory.register()
    assert memory.used_bytes == 0
    kernel.refusal = 0
    assert memory.register()


@pytest.mark.parametrize("refusal", [errno.ENOMEM, errno.EEXIST, errno.ENOTTY])
def test_a_refusal_is_named(memory: UserMemory, kernel: FakeKernel, refusal: int) -> None:
    memory.fill()
    kernel.refusal = refusal
    with pytest.raises(UserMemoryError, match=f"the kernel refuses 4 MiB of memory: {os.strerror(refusal)}"):
        memory.register()
    assert memory.used_bytes == 0


Limits = list[tuple[int, int]]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """RLIMIT_MEMLOCK of this process, played: the last pair holds."""
    held: Limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _which: held[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _which, pair: held.append(pair))
    monkeypatch.setattr(user_memory, "_pinned_bytes", lambda: 1 << 20)
    return held


@pytest.mark.parametrize(
    ("limit", "after"),
    [
        ((5 << 20, 5 << 20), (5 << 20, 5 << 20)),  # just enough
        ((-1, -1), (-1, -1)),
        ((1 << 20, 9 << 20), (5 << 20, 9 << 20)),
        ((1 << 20, -1), (5 << 20, -1)),
        ((1 << 20, 2 << 20), (5 << 20, 5 << 20)),  # with CAP_SYS_RESOURCE
    ],
)
def test_the_limit_is_raised_as_far_as_it_has_to_be(
    memory: UserMemory, limits: Limits, limit: tuple[int, int], after: tuple[int, int]
) -> None:
    limits.append(limit)
    memory.fill()
    assert memory.register()
    assert limits[-1] == after


def test_a_limit_that_cannot_be_raised_is_named(
    memory: UserMemory, kernel: FakeKernel, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_which: int, _pair: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    limits.append((1 << 20, 1 << 20))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    memory.fill()
    kernel.refusal = errno.ENOMEM
    with pytest.raises(UserMemoryError, match=r"5 MiB would be locked, and RLIMIT_MEMLOCK allows 1 MiB: raise it"):
        memory.register()


@pytest.mark.parametrize(("free", "reserved", "huge"), [("2", "0", True), ("3", "2", False), ("1", "0", False)])
def test_huge_pages_are_used_where_enough_are_free(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: str, reserved: str, huge: bool
) -> None:
    (tmp_path / "free_hugepages").write_text(free)
    (tmp_path / "resv_hugepages").write_text(reserved)
    monkeypatch.setattr(user_memory, "HUGE_PAGES", tmp_path)
    flags: list[int] = []
    memfd_create = os.memfd_create
    monkeypatch.setattr(os, "memfd_create", lambda name, asked: (flags.append(asked), memfd_create(name))[1])
    monkeypatch.setattr(user_memory.fcntl, "fcntl", lambda *_args: 0)  # a file like any other, which takes no seals
    UserMemory("vd0", SIZE - 4096, kernel.ioctl).close()
    assert [bool(asked & os.MFD_HUGETLB) for asked in flags] == [huge]


def test_huge_pages_that_another_has_taken_are_done_without(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "free_hugepages").write_text("2")
    (tmp_path / "resv_hugepages").write_text("0")
    monkeypatch.setattr(user_memory, "HUGE_PAGES", tmp_path)
    memfd_create = os.memfd_create

    def create(name: str, flags: int) -> int:
        if flags & os.MFD_HUGETLB:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return memfd_create(name, flags)

    monkeypatch.setattr(os, "memfd_create", create)
    memory = UserMemory("vd0", SIZE, kernel.ioctl)
    memory.fill()
    assert memory.register()
    memory.close()


def test_memory_that_cannot_be_had_is_named(memory: UserMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_memory, "_madvise", lambda *_args: errno.ENOMEM)
    with pytest.raises(UserMemoryError, match="4 MiB of memory cannot be allocated: Cannot allocate memory"):
        memory.fill()


# -- putting it to use


class FakeVq:
    """A queue that notes what is asked of it in the common `log`."""

    def __init__(self, index: int, log: list[str], *, rests: bool = True):
        self.index, self.log, self.rests = index, log, rests
        self._lock = asyncio.Lock()
        self.hanging = asyncio.Event()
        self.hanging.set()

    @property
    def locked(self) -> bool:
        return self._lock.locked()

    async def lock(self) -> None:
        await self._lock.acquire()

    async def hold(self, last: int, _timeout_s: float) -> bool:
        assert self.locked
        self.log.append(f"hold {self.index} {last:#x}")
        await self.hanging.wait()
        return self.rests

    async def release(self, user_memory_bytes: int) -> None:
        self.log.append(f"release {self.index} {user_memory_bytes:#x}")
        self._lock.release()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_MIN_S", "LOOK_MAX_S", "TRY_AGAIN_S"):
        monkeypatch.setattr(user_memory_switch, name, 0.001)


@pytest.fixture
def logged(memory: UserMemory, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps of queues and memory, in order."""
    log: list[str] = []
    register = memory.register

    def registered() -> bool:
        log.append("register")
        return register()

    monkeypatch.setattr(memory, "register", registered)
    return log


def use(memory: UserMemory, *vqs: FakeVq) -> MemoryControl:
    return MemoryControl("vd0", memory, vqs, "pages of the kernel")  # type: ignore[arg-type]


HOLDS = ["hold 0 0x3fffff", "hold 1 0x3fffff"]
BACK = ["release 0 0x0", "release 1 0x0"]


@pytest.mark.usefixtures("quick")
def test_no_worker_touches_the_pages_while_they_change(memory: UserMemory, logged: list[str]) -> None:
    control = use(memory, FakeVq(0, logged), FakeVq(1, logged))
    assert control.text == "pages of the kernel"
    asyncio.run(control.run())
    assert logged == [*HOLDS, "register", "release 0 0x400000", "release 1 0x400000"]
    assert control.text in ("user memory", "user memory (huge pages)")


@pytest.mark.usefixtures("quick")
def test_nobody_is_disturbed_before_it_is_due(memory: UserMemory, kernel: FakeKernel, logged: list[str]) -> None:
    async def scene() -> None:
        due, kernel.info = kernel.info, errno.EINVAL
        task = asyncio.create_task(use(memory, FakeVq(0, logged)).run())
        await asyncio.sleep(0.05)
        assert logged == []
        kernel.info = due
        await task
        assert logged == [HOLDS[0], "register", "release 0 0x400000"]

    asyncio.run(scene())


@pytest.mark.usefixtures("quick")
def test_a_queue_that_does_not_come_to_rest_is_not_waited_for(
    memory: UserMemory, logged: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    control = use(memory, FakeVq(0, logged), FakeVq(1, logged, rests=False))
    with caplog.at_level(logging.WARNING, "vdusefast"):
        asyncio.run(control.run())
    assert logged == [*HOLDS, *BACK] * user_memory_switch.TRY_COUNT
    assert control.text == "pages of the kernel; no user memory: the workers do not come to rest"
    assert [record.getMessage() for record in caplog.records] == [
        "device vd0: no user memory: the workers do not come to rest"
    ]


@pytest.mark.usefixtures("quick")
def test_a_region_that_goes_meanwhile_is_waited_for_again(
    memory: UserMemory, kernel: FakeKernel, logged: list[str]
) -> None:
    control = use(memory, FakeVq(0, logged))
    kernel.refusal = errno.EINVAL

    async def scene() -> None:
        task = asyncio.create_task(control.run())
        while logged[-1:] != [BACK[0]]:
            await asyncio.sleep(0)
        kernel.refusal = 0
        await task

    asyncio.run(scene())
    assert logged == [HOLDS[0], "register", BACK[0], HOLDS[0], "register", "release 0 0x400000"]
    assert control.text.startswith("user memory")


@pytest.mark.usefixtures("quick")
def test_a_refusal_leaves_the_kernels_pages(
    memory: UserMemory, kernel: FakeKernel, logged: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    kernel.refusal = errno.ENOMEM
    control = use(memory, FakeVq(0, logged), FakeVq(1, logged))
    with caplog.at_level(logging.WARNING, "vdusefast"):
        asyncio.run(control.run())
    assert logged == [*HOLDS, "register", *BACK]
    assert len(caplog.records) == 1
    assert control.text.startswith("pages of the kernel; no user memory: the kernel refuses 4 MiB")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("blocked", ["lock", "hold"])
def test_a_device_that_ends_meanwhile_keeps_no_queue_locked(
    memory: UserMemory, logged: list[str], blocked: str
) -> None:
    async def scene() -> None:
        vqs = [FakeVq(0, logged), FakeVq(1, logged)]
        if blocked == "lock":
            await vqs[1].lock()
        vqs[1].hanging.clear()
        task = asyncio.create_task(use(memory, *vqs).run())
        while HOLDS[blocked == "hold"] not in logged:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [vq.locked for vq in vqs] == [False, blocked == "lock"]
        assert "register" not in logged

    asyncio.run(scene())


@pytest.mark.usefixtures("quick")
def test_a_device_that_breaks_is_told_by_its_messages(
    memory: UserMemory, kernel: FakeKernel, logged: list[str]
) -> None:
    kernel.info = errno.EPERM
    control = use(memory, FakeVq(0, logged))
    asyncio.run(control.run())
    assert logged == []
    assert control.text == "pages of the kernel; no user memory: Operation not permitted"


# -- which devices get it


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),
        ({"cache": "none"}, True),
        ({"cache": "none", "engine": "uring"}, True),
        ({"cache": "none", "engine": "sync"}, False),
        ({"cache": "none", "user_memory": "off"}, False),
        ({"user_memory": "on"}, True),
        ({"cache": "none", "bus": "vhost"}, False),
    ],
)
def test_auto_is_where_it_pays(settings: dict[str, str], wanted: bool) -> None:
    config = make_config(name="vd0", uri="file:/nowhere", transport="kernel", **settings)
    transport = make_transport(config, None)
    assert isinstance(transport, KernelTransport)
    assert transport.options.user_memory == wanted


def test_a_kernel_that_takes_none_is_told_before_any_is_allocated(memory: UserMemory, kernel: FakeKernel) -> None:
    """Linux 5.15 to 5.19 have neither call."""
    kernel.info = errno.ENOTTY
    control = use(memory)
    asyncio.run(control.run())
    assert control.text == "pages of the kernel; no user memory: this kernel does not take any; Linux 6.0 does"
    assert os.fstat(memory.fd).st_blocks == 0
