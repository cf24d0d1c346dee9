"""A vhost-vdpa client by hand: split virtqueues, one request at a time on each, every step under the test's control.

For what a real client does not do at will: queues made ready after DRIVER_OK, taken away again, suspend, indices read
back. linux/vhost.h, linux/vhost_types.h, VIRTIO 1.3, 2.7 and 5.2.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import struct
import time

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED = 1, 2, 4, 8, 128
T_IN, T_OUT, T_FLUSH = 0, 1, 4
F_EVENT_IDX, F_INDIRECT_DESC, F_MQ = 29, 28, 12
BACKEND_F_IOTLB_MSG_V2, BACKEND_F_SUSPEND = 1, 4
DESC_F_NEXT, DESC_F_WRITE = 1, 2
QUEUE_BYTES = 1 << 16  # of the shared memory, for one queue: its rings, then its buffers
AVAIL_AT, USED_AT, HEADER_AT, STATUS_AT, DATA_AT = 0x4000, 0x5000, 0x7800, 0x7810, 0x8000  # rings of up to 1024
IOVA = 0x100000000  # where the memory lies for the device: not where it lies for us


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAF << 8 | number


_W, _R = 1, 2
SET_OWNER = _ioc(0, 0x01, 0)
GET_FEATURES, SET_FEATURES = _ioc(_R, 0x00, 8), _ioc(_W, 0x00, 8)
SET_VRING_NUM, SET_VRING_ADDR = _ioc(_W, 0x10, 8), _ioc(_W, 0x11, 40)
SET_VRING_BASE, GET_VRING_BASE = _ioc(_W, 0x12, 8), _ioc(_W | _R, 0x12, 8)
SET_VRING_KICK, SET_VRING_CALL = _ioc(_W, 0x20, 8), _ioc(_W, 0x21, 8)
SET_BACKEND_FEATURES, GET_BACKEND_FEATURES = _ioc(_W, 0x25, 8), _ioc(_R, 0x26, 8)
GET_STATUS, SET_STATUS = _ioc(_R, 0x71, 1), _ioc(_W, 0x72, 1)
SET_VRING_ENABLE = _ioc(_W, 0x75, 8)
SUSPEND = _ioc(0, 0x7D, 0)


class VhostClient:
    """An open /dev/vhost-vdpa-N with one memfd mapped at IOVA. A context manager; closing it resets the device."""

    def __init__(self, node: str, *, queues: int = 1, size: int = 64):
        self.size = size
        self.fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        self._memfd = os.memfd_create("vhost", os.MFD_CLOEXEC)
        os.ftruncate(self._memfd, queues * QUEUE_BYTES)
        self.memory = mmap.mmap(self._memfd, queues * QUEUE_BYTES)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.kick = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(queues)]
        self.call = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(queues)]
        self._idx = [0] * queues

    def __enter__(self) -> VhostClient:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self.fd, self._memfd, *self.kick, *self.call):
            os.close(fd)

    @property
    def status(self) -> int:
        """The device's status byte."""
        return fcntl.ioctl(self.fd, GET_STATUS, b"\0")[0]

    def add_status(self, bit: int) -> None:
        """Set one more bit of the status."""
        fcntl.ioctl(self.fd, SET_STATUS, bytes([self.status | bit]))

    def start(
        self,
        *,
        enabled: tuple[int, ...] = (),
        left_alone: tuple[int, ...] = (),
        without_features: int = 1 << F_EVENT_IDX,
    ) -> int:
        """Negotiate, map the memory, tell every queue's place, enable those in `enabled`, and set DRIVER_OK.

        left_alone: queues that are given neither a size nor a place. Returns the features acknowledged.
        """
        fcntl.ioctl(self.fd, SET_OWNER)
        self.add_status(0)
        self.add_status(ACKNOWLEDGE)
        self.add_status(DRIVER)
        backend = self._get64(GET_BACKEND_FEATURES)
        fcntl.ioctl(self.fd, SET_BACKEND_FEATURES, struct.pack("<Q", backend & 1 << BACKEND_F_IOTLB_MSG_V2))
        features = self._get64(GET_FEATURES) & ~without_features
        fcntl.ioctl(self.fd, SET_FEATURES, struct.pack("<Q", features))
        self.add_status(FEATURES_OK)
        self.update_iotlb()
        for queue in set(range(len(self.kick))) - set(left_alone):
            self._set_up(queue)
        for queue in enabled:
            self.enable(queue)
        self.add_status(DRIVER_OK)
        return features

    def update_iotlb(self) -> None:
        """Map the whole memory, read-write, at IOVA: struct vhost_msg_v2 with a struct vhost_iotlb_msg."""
        update, read_write, message_v2 = 2, 3, 2
        message = struct.pack("<IIQQQBB", message_v2, 0, IOVA, len(self.memory), self._address, read_write, update)
        os.write(self.fd, message.ljust(72, b"\0"))

    def enable(self, queue: int, on: bool = True) -> None:
        """Make a queue ready, or take it away."""
        fcntl.ioctl(self.fd, SET_VRING_ENABLE, struct.pack("<II", queue, on))

    def suspend(self) -> None:
        """Stop all queues and keep their state."""
        fcntl.ioctl(self.fd, SUSPEND)

    @property
    def can_suspend(self) -> bool:
        """Return whether the device offers VHOST_BACKEND_F_SUSPEND."""
        return bool(self._get64(GET_BACKEND_FEATURES) & 1 << BACKEND_F_SUSPEND)

    def base(self, queue: int) -> int:
        """Return the index that the device would take next from the available ring."""
        raw = fcntl.ioctl(self.fd, GET_VRING_BASE, struct.pack("<II", queue, 0))
        return int(struct.unpack("<II", raw)[1])

    def submit(self, queue: int, kind: int, sector: int, data: bytes = b"", *, length: int = 0) -> None:
        """Put one request into the ring and kick. data: what is written; length: how much is read."""
        base, iova = queue * QUEUE_BYTES, IOVA + queue * QUEUE_BYTES
        size = len(data) or length
        self._put(base + HEADER_AT, struct.pack("<IIQ", kind, 0, sector))
        self._put(base + STATUS_AT, b"\xff")
        self._put(base + DATA_AT, data)
        write = 0 if data else DESC_F_WRITE
        chain = [(iova + HEADER_AT, 16, 0), (iova + DATA_AT, size, write), (iova + STATUS_AT, 1, DESC_F_WRITE)]
        chain = [part for part in chain if part[1]]
        for slot, (address, part_bytes, flags) in enumerate(chain):
            more = DESC_F_NEXT if slot < len(chain) - 1 else 0
            self._put(
                base + 16 * slot, struct.pack("<QIHH", address, part_bytes, flags | more, slot + 1 if more else 0)
            )
        idx = self._idx[queue]
        self._put(base + AVAIL_AT + 4 + 2 * (idx % self.size), struct.pack("<H", 0))
        self._idx[queue] = (idx + 1) & 0xFFFF
        self._put(base + AVAIL_AT + 2, struct.pack("<H", self._idx[queue]))
        os.eventfd_write(self.kick[queue], 1)

    def tear(self, queue: int) -> None:
        """Claim more available requests than the ring has room for, and kick: no device can follow that."""
        self._put(queue * QUEUE_BYTES + AVAIL_AT + 2, struct.pack("<H", (self._idx[queue] + 2 * self.size) & 0xFFFF))
        os.eventfd_write(self.kick[queue], 1)

    def used_idx(self, queue: int) -> int:
        """Return how many requests of a queue are done, modulo 65536."""
        return int(struct.unpack_from("<H", self.memory, queue * QUEUE_BYTES + USED_AT + 2)[0])

    def finish(self, queue: int, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """Wait for the interrupt of the request in flight and return its status and data area. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while select.select([self.call[queue]], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.eventfd_read(self.call[queue])
            if self.used_idx(queue) == self._idx[queue]:
                break  # any other interrupt is one too many, which a driver has to live with
        else:
            done = "done" if self.used_idx(queue) == self._idx[queue] else "not done"
            raise TimeoutError(f"queue {queue}: no interrupt within {timeout_s:g} s; the request is {done}")
        base = queue * QUEUE_BYTES
        return self.memory[base + STATUS_AT], self.memory[base + DATA_AT : base + QUEUE_BYTES]

    def _set_up(self, queue: int) -> None:
        address = IOVA + queue * QUEUE_BYTES
        fcntl.ioctl(self.fd, SET_VRING_NUM, struct.pack("<II", queue, self.size))
        places = (address, address + USED_AT, address + AVAIL_AT)
        fcntl.ioctl(self.fd, SET_VRING_ADDR, struct.pack("<IIQQQQ", queue, 0, *places, 0))
        fcntl.ioctl(self.fd, SET_VRING_BASE, struct.pack("<II", queue, 0))
        fcntl.ioctl(self.fd, SET_VRING_KICK, struct.pack("<Ii", queue, self.kick[queue]))
        fcntl.ioctl(self.fd, SET_VRING_CALL, struct.pack("<Ii", queue, self.call[queue]))

    def _put(self, at: int, data: bytes) -> None:
        self.memory[at : at + len(data)] = data

    def _get64(self, request: int) -> int:
        return int(struct.unpack("<Q", fcntl.ioctl(self.fd, request, bytes(8)))[0])
