"""The kernel's side of /dev/vduse, played: answers to ioctls. The fixture `fake` (conftest.py) puts it in place."""

from __future__ import annotations

import os
import struct

from vdusefast.transport import DeviceSpec, uapi

SPEC = DeviceSpec("vd0", uapi.VIRTIO_F_ACCESS_PLATFORM, b"config", queue_count=3, queue_size_max=256)


class FakeKernel:
    """Answers ioctls: `answers` maps a number to what it fills in, or to an errno that it refuses with."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bytes]] = []
        self.answers: dict[int, bytes | int] = {
            uapi.VDUSE_GET_API_VERSION: struct.pack("=Q", 1),
            uapi.VDUSE_GET_FEATURES: struct.pack("=Q", 0xFF),
        }

    def ioctl(self, fd: int, number: int, argument: bytearray | bytes = b"") -> int:
        self.asked.append((number, bytes(argument)))
        answer = self.answers.get(number, b"")
        if isinstance(answer, int):
            raise OSError(answer, os.strerror(answer))
        if answer:
            assert isinstance(argument, bytearray)
            argument[:] = answer
        return 0

    def words(self, number: int) -> list[bytes]:
        return [argument for asked, argument in self.asked if asked == number]
