"""Messages between the supervisor and a worker, and the arguments of a worker.

One SOCK_SEQPACKET pair per worker; one message is one packet of a fixed layout in host byte order.
The supervisor's messages carry a sequence number that the worker's answer repeats. Beside the socket there is
one word in the shared pages (`shm.CTL_SEQ`): the supervisor adds one to it after each message. So a busy
loop notices a pending message without a system call.

Only the standard library is imported here: the module is part of a worker's start-up time.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

MESSAGE_MAX_BYTES = 1024
SIZE_DIGITS_MAX = 19  # of a number below 2^63


class Command(IntEnum):
    """A command of the supervisor to a worker."""

    START = 1  # map the rings and serve
    QUIESCE = 2  # finish what is in flight, stop popping; keep mappings
    INVALIDATE = 3  # finish what is in flight, drop mappings of [start, last], continue if running
    RESET = 4  # QUIESCE, then drop every mapping
    STOP = 5  # QUIESCE, then end with status 0
    RESIZE = 6  # the device has `start` sectors from now on; a smaller size applies once nothing is in flight
    HOLD = 7  # INVALIDATE, then pop nothing until RELEASE, also when started meanwhile
    RELEASE = 8  # `last` bytes of user memory stand in for the bounce pages from now on; continue if running


class Event(IntEnum):
    """An answer or event of a worker to the supervisor."""

    HELLO = 101  # process is pinned and ready; text is the engine in use, and its special modes
    DONE = 102  # the command with this sequence number has been carried out
    REFUSED = 103  # the command cannot be carried out; text says why
    RING_FAILED = 104  # the ring is bad; the queue has stopped; text names the reason (unsolicited)
    STARTUP_FAILED = 105  # the process cannot serve; text says why; it exits
    LOG = 106  # text is a line about the store for the device's log (unsolicited)
    STORE_SIZE = 107  # the store has another size from now on; text is the number of bytes (unsolicited)


class ToWorker(NamedTuple):
    """A command. Addresses are IOVAs; `last` is inclusive; fields that a command does not use are 0.

    `last_avail_idx` is as in uapi.VqInfo.
    """

    command: int
    seq: int
    acked_features: int = 0
    desc_addr: int = 0
    driver_addr: int = 0
    device_addr: int = 0
    queue_size: int = 0
    last_avail_idx: int = 0
    start: int = 0
    last: int = 0
    recover: int = 0  # START: continue by the in-flight log of the previous worker, and not from last_avail_idx


class FromWorker(NamedTuple):
    """An answer or an event. `last_avail_idx` is as in uapi.VqInfo, `last_used_idx` a free-running u16."""

    event: int
    seq: int
    last_avail_idx: int = 0
    last_used_idx: int = 0
    exit_code: int = 0  # of the exception that the supervisor should raise; 0 where none
    text: str = ""


_TO_WORKER = struct.Struct("=IIQQQQIIQQI")
_FROM_WORKER = struct.Struct("=IIIII")


def pack_command(message: ToWorker) -> bytes:
    """Return the packet for `message`."""
    return _TO_WORKER.pack(*message)


def unpack_command(packet: bytes) -> ToWorker:
    """Return the command in `packet`. Raises ValueError when it is malformed."""
    if len(packet) != _TO_WORKER.size:
        raise ValueError(f"control message of {len(packet)} bytes, expected {_TO_WORKER.size}")
    return ToWorker(*_TO_WORKER.unpack(packet))


def pack_event(message: FromWorker) -> bytes:
    """Return the packet for `message`; a text too long for one packet is cut."""
    text = message.text.encode(errors="backslashreplace")[: MESSAGE_MAX_BYTES - _FROM_WORKER.size]
    return _FROM_WORKER.pack(*message[:5]) + text


def unpack_event(packet: bytes) -> FromWorker:
    """Return the event in `packet`. Raises ValueError when it is malformed."""
    if len(packet) < _FROM_WORKER.size:
        raise ValueError(f"control message of {len(packet)} bytes, expected {_FROM_WORKER.size} or more")
    text = packet[_FROM_WORKER.size :].decode(errors="replace")
    event, seq, last_avail_idx, last_used_idx, exit_code = _FROM_WORKER.unpack_from(packet)
    if event not in Event.__members__.values() or exit_code > 0xFF:
        raise ValueError(f"event {event}, exit code {exit_code}")
    return FromWorker(event, seq, last_avail_idx, last_used_idx, exit_code, text)


def store_size_bytes(event: FromWorker) -> int:
    """Return the size in a STORE_SIZE event. Raises ValueError if the text is none."""
    digits = event.text
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= SIZE_DIGITS_MAX) or int(digits) >= 1 << 63:
        raise ValueError(f"a store of {digits[:SIZE_DIGITS_MAX]!r} bytes")
    return int(digits)


_TEXT_FIELDS = frozenset({"device", "port", "store", "engine", "cache", "serial", "store_spec", "faults"})


class RequestLimits(NamedTuple):
    """The largest request that a device takes (VIRTIO 1.3, 5.2.4). The driver is shown these, and a worker checks them.

    The fields have the names of `_datapath.Queue` and of struct vf_blk_device.
    """

    seg_max: int = 126  # data segments
    size_max_bytes: int = 0  # of a segment; 0 = no limit
    discard_max_sectors: int = 0  # of a range; 0 = no discard
    discard_max_seg: int = 0  # ranges
    write_zeroes_max_sectors: int = 0
    write_zeroes_max_seg: int = 0


class WorkerSpec(NamedTuple):
    """The arguments of a worker process, as `key=value` texts in a descriptor (handed.py).

    Descriptors are inherited under the same numbers; -1 stands for none. Sizes are in bytes; sectors are of 512 bytes.
    """

    device: str  # name, for messages and `ps`
    queue: int
    queue_size: int  # the largest the driver may choose; sizes the tables
    supervisor_pid: int
    ctl_fd: int  # SOCK_SEQPACKET, this protocol
    shm_fd: int  # the shared pages of the device
    kick_fd: int  # eventfd, driver to device
    life_fd: int = -1  # the write end of a pipe: closed once the process has ended, and all storage I/O that it began
    port: str = "loopback"  # how IOTLB misses and interrupts are done
    port_fd: int = -1  # kernel: /dev/vduse/NAME; loopback: SOCK_SEQPACKET to the bus
    port_api: int = 0  # kernel: VDUSE API version that the device was created under
    irq_fd: int = -1  # loopback: eventfd, device to driver
    user_memory_fd: int = -1  # kernel: a memfd that may stand in for the kernel's bounce pages
    user_memory_bytes: int = 0  # how much of it does already, 0 = it does not
    cpu: int = -1  # -1: not pinned
    lock_memory: int = 0  # be prepared for this machine's memory reclaim (reclaim.py)
    poll_us: int = 200  # upper limit of the adaptive spin, 0 = sleep at once, -1 = never sleep
    irq_delay_us: int = 200  # longest hold of an interrupt for more completions, 0 = interrupt at once
    # the store
    store: str = "null"  # file, blockdev, memory, null, or that of a module (store_spec)
    store_fd: int = -1
    store_witness_fd: int = -1  # another open file description of that file, of this queue alone: csrc/queue/flush.h
    relay_fd: int = -1  # O_PATH, of the socket of the store's relay, which has the engine then
    relay_memory_fd: int = -1  # a memfd that the queue shares with the relay
    store_spec: str = ""  # backends.plugin.StoreSpec as JSON, for a module's engine
    faults: str = ""  # errors and delays by rule, as JSON (backends.faulty)
    store_notes_fd: int = -1  # a file where such a module leaves notes for the workers to come
    store_hold_fd: int = -1  # a socket to itself, in which such a module leaves descriptors for the next worker
    engine: str = "auto"
    cache: str = "writeback"
    sqpoll: int = 0  # io_uring: a thread of the kernel's submits
    merge: int = 1  # engines sync and cached: adjacent requests of a batch become one call
    map_reads: int = 1  # engine sync: a file on tmpfs may be read through a mapping
    direct_align: int = 0  # O_DIRECT: alignment of offset, length and memory; 0 = not O_DIRECT
    granule_bytes: int = 0  # the store's smallest blocks, which may be larger than the device's
    discard_unit_bytes: int = 0  # bytes that the store frees at a time
    discard_offset_bytes: int = 0  # where the first such unit begins
    # the device
    capacity_sectors: int = 0
    block_size: int = 512
    read_only: int = 0
    limits: RequestLimits = RequestLimits()
    ignores_discards: int = 0  # they are answered, and nothing is done
    keeps_zeroes: int = 0  # zeroed ranges stay allocated
    serial: str = ""

    def to_arguments(self) -> list[str]:
        """Return the arguments that `from_arguments` reads."""
        values = self._asdict()
        limits: RequestLimits = values.pop("limits")
        return [f"{key}={value}" for key, value in (values | limits._asdict()).items()]

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> WorkerSpec:
        """Return what `to_arguments` was made from. Raises ValueError that names a wrong argument."""
        values: dict[str, str | int] = {}
        limits: dict[str, int] = {}
        for argument in arguments:
            key, sep, value = argument.partition("=")
            if sep and key in RequestLimits._fields:
                limits[key] = int(value)
            elif sep and key in cls._fields and key != "limits":
                values[key] = value if key in _TEXT_FIELDS else int(value)
            else:
                raise ValueError(f"worker: unknown argument {key!r}")
        missing = [f for f in cls._fields if f not in values and f not in cls._field_defaults]
        if missing:
            raise ValueError(f"worker: missing arguments {', '.join(missing)}")
        return cls(**values, limits=RequestLimits(**limits))  # type: ignore[arg-type]
