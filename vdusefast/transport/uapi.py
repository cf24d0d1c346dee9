"""Structures and numbers of linux/vduse.h and of virtio, as far as the control plane needs them.

Everything is in host byte order, which on the machines that have VDUSE is little-endian. A test compares sizes, offsets
and numbers with what the compiler makes of the kernels' own headers.

Source: Linux 7.3, include/uapi/linux/vduse.h; VIRTIO 1.3, 2.1, 5.2.3 and 6.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

VDUSE_API_VERSION = 0
VDUSE_API_VERSION_1 = 1  # groups of queues and address spaces

# Features of VDUSE itself (not of virtio), as bit numbers
VDUSE_F_QUEUE_READY = 0  # a message for each queue that becomes ready or ceases to be
VDUSE_F_SUSPEND = 1  # a message when the driver suspends the device

# Message types: enum vduse_req_type. The last three need API version 1 or a feature that has to be asked for.
VDUSE_GET_VQ_STATE = 0
VDUSE_SET_STATUS = 1
VDUSE_UPDATE_IOTLB = 2
VDUSE_SET_VQ_GROUP_ASID = 3
VDUSE_SET_VQ_READY = 4
VDUSE_SUSPEND = 5

VDUSE_REQ_RESULT_OK = 0
VDUSE_REQ_RESULT_FAILED = 1

# vduse_iotlb_entry.perm, as the device sees it
VDUSE_ACCESS_RO = 1
VDUSE_ACCESS_WO = 2
VDUSE_ACCESS_RW = 3

VDUSE_IOVA_CAP_UMEM = 1  # vduse_iova_info.capability

VDUSE_EVENTFD_DEASSIGN = -1
VDUSE_NAME_MAX_BYTES = 256  # with the terminating NUL
VDUSE_CONFIG_MAX_BYTES = 4096

IOVA_LAST = 2**64 - 1

# Device status: VIRTIO 1.3, 2.1
VIRTIO_CONFIG_S_ACKNOWLEDGE = 0x01
VIRTIO_CONFIG_S_DRIVER = 0x02
VIRTIO_CONFIG_S_DRIVER_OK = 0x04
VIRTIO_CONFIG_S_FEATURES_OK = 0x08
VIRTIO_CONFIG_S_NEEDS_RESET = 0x40
VIRTIO_CONFIG_S_FAILED = 0x80

# Feature bits, as masks: VIRTIO 1.3, 5.2.3 and 6
VIRTIO_BLK_F_SIZE_MAX = 1 << 1
VIRTIO_BLK_F_SEG_MAX = 1 << 2
VIRTIO_BLK_F_GEOMETRY = 1 << 4
VIRTIO_BLK_F_RO = 1 << 5
VIRTIO_BLK_F_BLK_SIZE = 1 << 6
VIRTIO_BLK_F_FLUSH = 1 << 9
VIRTIO_BLK_F_TOPOLOGY = 1 << 10
VIRTIO_BLK_F_CONFIG_WCE = 1 << 11
VIRTIO_BLK_F_MQ = 1 << 12
VIRTIO_BLK_F_DISCARD = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14
VIRTIO_BLK_F_SECURE_ERASE = 1 << 16
VIRTIO_BLK_F_ZONED = 1 << 17
VIRTIO_RING_F_INDIRECT_DESC = 1 << 28
VIRTIO_RING_F_EVENT_IDX = 1 << 29
VIRTIO_F_VERSION_1 = 1 << 32
VIRTIO_F_ACCESS_PLATFORM = 1 << 33
VIRTIO_F_RING_PACKED = 1 << 34
VIRTIO_F_IN_ORDER = 1 << 35

VIRTIO_ID_BLOCK = 2

STATUS_NAMES = {
    value: name.removeprefix("VIRTIO_CONFIG_S_")
    for name, value in list(globals().items())
    if name.startswith("VIRTIO_CONFIG_S_")
}

FEATURE_NAMES = {
    value: name.partition("_F_")[2]
    for name, value in list(globals().items())
    if name.startswith(("VIRTIO_BLK_F_", "VIRTIO_RING_F_", "VIRTIO_F_"))
}

REQUEST = struct.Struct("=II16x128s")  # type, request_id, body; 152 bytes
RESPONSE = struct.Struct("=II16s128s")  # request_id, result, reserved, body; 152 bytes
DEV_CONFIG = struct.Struct("=256sIIQIIII44xI")  # name, vendor_id, device_id, features, vq_num, vq_align, ngroups, nas,
# config_size; 336 bytes, then the configuration space
CONFIG_DATA = struct.Struct("=II")  # offset, length; 8 bytes, then the data
IOTLB_ENTRY = struct.Struct("=QQQB7x")  # offset, start, last, perm; 32 bytes
IOTLB_ENTRY_V2 = struct.Struct("=QQQB7xI44x")  # offset, start, last, perm, asid; 80 bytes
IOVA_UMEM = struct.Struct("=QQQI20x")  # uaddr, iova, size, asid; 48 bytes
IOVA_INFO = struct.Struct("=QQQI20x")  # start, last, capability, asid; 48 bytes
VQ_CONFIG = struct.Struct("=IHHI20x")  # index, max_size, reserved, group; 32 bytes
VQ_INFO = struct.Struct("=IIQQQ8sB7x")  # index, num, desc, driver, device, split or packed, ready; 48 bytes
VQ_EVENTFD = struct.Struct("=Ii")  # index, fd; 8 bytes


def _ioc(direction: int, number: int, size_bytes: int) -> int:
    """Return an ioctl number, as <asm-generic/ioctl.h> makes it."""
    return direction << 30 | size_bytes << 16 | VDUSE_BASE << 8 | number


VDUSE_BASE = 0x81
_W, _R = 1, 2

# On /dev/vduse/control
VDUSE_GET_API_VERSION = _ioc(_R, 0x00, 8)
VDUSE_SET_API_VERSION = _ioc(_W, 0x01, 8)
VDUSE_CREATE_DEV = _ioc(_W, 0x02, DEV_CONFIG.size)
VDUSE_DESTROY_DEV = _ioc(_W, 0x03, VDUSE_NAME_MAX_BYTES)
VDUSE_GET_FEATURES = _ioc(_R, 0x04, 8)
VDUSE_SET_FEATURES = _ioc(_W, 0x05, 8)

# On /dev/vduse/NAME
VDUSE_IOTLB_GET_FD = _ioc(_R | _W, 0x10, IOTLB_ENTRY.size)
VDUSE_DEV_GET_FEATURES = _ioc(_R, 0x11, 8)
VDUSE_DEV_SET_CONFIG = _ioc(_W, 0x12, CONFIG_DATA.size)
VDUSE_DEV_INJECT_CONFIG_IRQ = _ioc(0, 0x13, 0)
VDUSE_VQ_SETUP = _ioc(_W, 0x14, VQ_CONFIG.size)
VDUSE_VQ_GET_INFO = _ioc(_R | _W, 0x15, VQ_INFO.size)
VDUSE_VQ_SETUP_KICKFD = _ioc(_W, 0x16, VQ_EVENTFD.size)
VDUSE_VQ_INJECT_IRQ = _ioc(_W, 0x17, 4)
VDUSE_IOTLB_REG_UMEM = _ioc(_W, 0x18, IOVA_UMEM.size)
VDUSE_IOTLB_DEREG_UMEM = _ioc(_W, 0x19, IOVA_UMEM.size)
VDUSE_IOTLB_GET_INFO = _ioc(_R | _W, 0x1A, IOVA_INFO.size)
VDUSE_IOTLB_GET_FD2 = _ioc(_R | _W, 0x1B, IOTLB_ENTRY_V2.size)

_VQ_STATE = struct.Struct("=I8s")  # index, split or packed
_SPLIT_STATE = struct.Struct("=H")  # avail_index
_PACKED_STATE = struct.Struct("=4H")  # last_avail_counter, last_avail_idx, last_used_counter, last_used_idx
PACKED_FRESH = 0x8000_8000  # state of a packed queue that was never used: index 0, both wrap counters 1
_STATUS = struct.Struct("=B")
_IOVA_RANGE = struct.Struct("=QQ")
_VQ_GROUP_ASID = struct.Struct("=II")  # group, asid
_VQ_READY = struct.Struct("=II")  # num, ready
_RESERVED = bytes(16)


class GetVqState(NamedTuple):
    """The driver asks for the position of queue `vq_index`."""

    request_id: int
    vq_index: int


class SetStatus(NamedTuple):
    """The driver sets the device status; 0 resets the device."""

    request_id: int
    status: int


class UpdateIotlb(NamedTuple):
    """Mappings that overlap IOVA [start, last] must go."""

    request_id: int
    start: int
    last: int


class SetVqGroupAsid(NamedTuple):
    """The queues of `group` are to use address space `asid`."""

    request_id: int
    group: int
    asid: int


class SetVqReady(NamedTuple):
    """The driver makes queue `vq_index` ready, or no longer ready."""

    request_id: int
    vq_index: int
    ready: bool


class Suspend(NamedTuple):
    """The driver stops the device, which keeps its state."""

    request_id: int


class UnknownRequest(NamedTuple):
    """A message of a type that we have not negotiated."""

    request_id: int
    type: int


Request = GetVqState | SetStatus | UpdateIotlb | SetVqGroupAsid | SetVqReady | Suspend | UnknownRequest


class Response(NamedTuple):
    """An answer. `vq_index`, `avail_idx` (as VqInfo.last_avail_idx) and `packed` answer GetVqState only."""

    request_id: int
    ok: bool
    vq_index: int = 0
    avail_idx: int = 0
    packed: bool = False  # the driver has acked VIRTIO_F_RING_PACKED


class VqInfo(NamedTuple):
    """The driver's settings of one queue. Addresses are IOVAs.

    `last_avail_idx` is where the device begins. In a split queue that is a free-running u16; in a packed
    one, as in vhost, bits 0 to 14 name the next descriptor to pop, bit 15 is the driver's wrap counter,
    bits 16 to 30 name the next used descriptor to write, and bit 31 is the device's wrap counter.
    """

    vq_index: int
    size: int = 0  # descriptors; 0 where the driver does not use the queue, also where it is ready
    desc_addr: int = 0
    driver_addr: int = 0
    device_addr: int = 0
    last_avail_idx: int = 0
    ready: bool = False

    @property
    def in_use(self) -> bool:
        """Whether the driver has set the queue up: SeaBIOS leaves all but the first one, and QEMU makes all ready."""
        return self.ready and self.size > 0


class IotlbEntry(NamedTuple):
    """One region of IOVA [start, last], found at `offset_bytes` of the descriptor that comes with it."""

    offset_bytes: int
    start: int
    last: int
    perm: int

    def pack(self) -> bytes:
        """Return struct vduse_iotlb_entry."""
        return IOTLB_ENTRY.pack(*self)


def pack_request(request: Request) -> bytes:
    """Return struct vduse_dev_request for `request`."""
    match request:
        case GetVqState(request_id, vq_index):
            return REQUEST.pack(VDUSE_GET_VQ_STATE, request_id, _VQ_STATE.pack(vq_index, b""))
        case SetStatus(request_id, status):
            return REQUEST.pack(VDUSE_SET_STATUS, request_id, _STATUS.pack(status))
        case UpdateIotlb(request_id, start, last):
            return REQUEST.pack(VDUSE_UPDATE_IOTLB, request_id, _IOVA_RANGE.pack(start, last))
        case SetVqGroupAsid(request_id, group, asid):
            return REQUEST.pack(VDUSE_SET_VQ_GROUP_ASID, request_id, _VQ_GROUP_ASID.pack(group, asid))
        case SetVqReady(request_id, vq_index, ready):
            return REQUEST.pack(VDUSE_SET_VQ_READY, request_id, _VQ_READY.pack(vq_index, ready))
        case Suspend(request_id):
            return REQUEST.pack(VDUSE_SUSPEND, request_id, b"")
        case UnknownRequest(request_id, kind):
            return REQUEST.pack(kind, request_id, b"")


def unpack_request(packet: bytes) -> Request:
    """Return the request in struct vduse_dev_request. Raises ValueError when it is not of that size."""
    if len(packet) != REQUEST.size:
        raise ValueError(f"vduse request of {len(packet)} bytes, expected {REQUEST.size}")
    kind, request_id, body = REQUEST.unpack(packet)
    if kind == VDUSE_GET_VQ_STATE:
        return GetVqState(request_id, _VQ_STATE.unpack_from(body)[0])
    if kind == VDUSE_SET_STATUS:
        return SetStatus(request_id, body[0])
    if kind == VDUSE_UPDATE_IOTLB:
        return UpdateIotlb(request_id, *_IOVA_RANGE.unpack_from(body))
    if kind == VDUSE_SET_VQ_GROUP_ASID:
        return SetVqGroupAsid(request_id, *_VQ_GROUP_ASID.unpack_from(body))
    if kind == VDUSE_SET_VQ_READY:
        vq_index, ready = _VQ_READY.unpack_from(body)
        return SetVqReady(request_id, vq_index, bool(ready))
    if kind == VDUSE_SUSPEND:
        return Suspend(request_id)
    return UnknownRequest(request_id, kind)


def is_packed(acked_features: int) -> bool:
    """Return whether queues under these features are packed ones."""
    return bool(acked_features & VIRTIO_F_RING_PACKED)


def fresh_vq_state(acked_features: int) -> int:
    """Return the position of a queue that was never used, as VqInfo.last_avail_idx."""
    return PACKED_FRESH if is_packed(acked_features) else 0


def pack_vq_state(last_avail_idx: int, *, packed: bool) -> bytes:
    """Return struct vduse_vq_state_split or _packed for VqInfo.last_avail_idx."""
    if not packed:
        return _SPLIT_STATE.pack(last_avail_idx)
    avail, used = last_avail_idx & 0xFFFF, last_avail_idx >> 16
    return _PACKED_STATE.pack(avail >> 15, avail & 0x7FFF, used >> 15, used & 0x7FFF)


def unpack_vq_state(state: bytes, *, packed: bool) -> int:
    """Return VqInfo.last_avail_idx for the 8 bytes that hold struct vduse_vq_state_split or _packed."""
    if not packed:
        return int(_SPLIT_STATE.unpack_from(state)[0])
    counters: tuple[int, int, int, int] = _PACKED_STATE.unpack(state)
    avail_counter, avail_idx, used_counter, used_idx = counters
    avail, used = bool(avail_counter) << 15 | avail_idx & 0x7FFF, bool(used_counter) << 15 | used_idx & 0x7FFF
    return used << 16 | avail


def pack_response(response: Response) -> bytes:
    """Return struct vduse_dev_response for `response`."""
    result = VDUSE_REQ_RESULT_OK if response.ok else VDUSE_REQ_RESULT_FAILED
    body = _VQ_STATE.pack(response.vq_index, pack_vq_state(response.avail_idx, packed=response.packed))
    return RESPONSE.pack(response.request_id, result, _RESERVED, body)


def unpack_response(packet: bytes, *, packed: bool = False) -> Response:
    """Return the answer in struct vduse_dev_response; `packed` says how to read the state of a queue in it.

    Raises ValueError when it is not of that size, or when its reserved words are not zero (the kernel says EINVAL).
    """
    if len(packet) != RESPONSE.size:
        raise ValueError(f"vduse response of {len(packet)} bytes, expected {RESPONSE.size}")
    request_id, result, reserved, body = RESPONSE.unpack(packet)
    if reserved != _RESERVED:
        raise ValueError("vduse response with reserved words that are not zero")
    vq_index, state = _VQ_STATE.unpack_from(body)
    return Response(request_id, result == VDUSE_REQ_RESULT_OK, vq_index, unpack_vq_state(state, packed=packed), packed)


def names_of(features: int) -> list[str]:
    """Return the names of the bits in `features`, lowest first; a bit without a name is given as `bit N`."""
    bits = [1 << n for n in range(64) if features >> n & 1]
    return [FEATURE_NAMES.get(bit, f"bit {bit.bit_length() - 1}") for bit in bits]


def feature_names(features: int) -> str:
    """Return the names of the bits in `features`, for a message."""
    return ", ".join(names_of(features))


def status_names(status: int) -> list[str]:
    """Return the names of the bits in a device status, lowest first."""
    return [name for bit, name in STATUS_NAMES.items() if status & bit]


def vduse_feature_names(vduse_features: int) -> list[str]:
    """Return the names of VDUSE's own features in a mask; a bit without a name is given as `bit N`."""
    named = {VDUSE_F_QUEUE_READY: "QUEUE_READY", VDUSE_F_SUSPEND: "SUSPEND"}
    return [named.get(bit, f"bit {bit}") for bit in range(64) if vduse_features >> bit & 1]
